"""Chunked log-probs against the whole table, and draws that depend on their counters alone."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from preftune import numerics
from preftune.numerics import (
    masked_sum,
    permutation,
    sample_index,
    stream_key,
    token_collision,
    token_kl,
    token_log_probs,
    uniform,
)

ROWS, WIDTH, VOCAB = 13, 6, 11
CHI2_999 = {9: 27.88, 15: 37.70}
"""The 99.9 % point of chi-square by degrees of freedom."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output embedding, bias and targets."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    return hidden, weight, bias, torch.randint(VOCAB, (ROWS,), generator=g)


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 2**25])
def test_token_log_probs_is_log_softmax_and_gather(
    monkeypatch: pytest.MonkeyPatch, elements: int, dtype: torch.dtype, near: float, with_bias: bool
) -> None:
    monkeypatch.setitem(numerics.CHUNK_ELEMENTS, "cpu", elements)
    hidden, weight, bias, target = head(dtype)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    grads = []
    for function in (token_log_probs, whole):
        leaves = [x.clone().requires_grad_(True) for x in inputs]
        h, w, *b = leaves
        if function is whole:
            out = whole(h, w, b[0] if b else None, target)
        else:
            out = token_log_probs(h, w, target, b[0] if b else None)
        assert out.dtype == dtype
        (out * torch.arange(ROWS)).sum().backward()
        grads.append([out.detach(), *(x.grad for x in leaves)])
    for mine, direct in zip(*grads, strict=True):
        torch.testing.assert_close(mine, direct, rtol=near, atol=near * 20)


@pytest.mark.parametrize("elements", [2 * VOCAB, 2**25])
def test_token_log_probs_gradcheck(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setitem(numerics.CHUNK_ELEMENTS, "cpu", elements)
    *inputs, target = head(torch.float64)
    leaves = [x.requires_grad_(True) for x in inputs]
    assert torch.autograd.gradcheck(lambda h, w, b: token_log_probs(h, w, target, b), leaves)


def test_a_part_of_the_inputs_may_need_gradients() -> None:
    hidden, weight, bias, target = head(torch.float64)
    weight.requires_grad_(True)
    token_log_probs(hidden, weight, target, bias).sum().backward()
    assert weight.grad is not None and hidden.grad is None and bias.grad is None


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _, target = head(torch.float64)
    hidden.requires_grad_(True)
    (first,) = torch.autograd.grad(
        token_log_probs(hidden, weight, target).square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_table_of_logits_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, target = head(torch.float64)
    monkeypatch.setitem(numerics.CHUNK_ELEMENTS, "cpu", 3 * VOCAB)
    sizes = []
    original = numerics._logits

    def record(*args: Tensor) -> Tensor:
        out = original(*args)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(numerics, "_logits", record)
    token_log_probs(hidden.requires_grad_(True), weight, target, bias).sum().backward()
    token_kl(hidden, hidden, (weight, bias), (weight, bias))
    token_collision(hidden, weight, bias)
    assert max(sizes) <= 3 * VOCAB
    assert sum(sizes) == 5 * ROWS * VOCAB  # forward, backward, twice in the KL, the collision


def test_float32_under_bfloat16_autocast() -> None:
    hidden, weight, bias, target = head(torch.float32)
    exact = token_log_probs(hidden, weight, target, bias)
    kl = token_kl(hidden, hidden.flip(0), (weight, bias), (weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        inside = token_log_probs(hidden, weight, target, bias)
        kl_inside = token_kl(hidden, hidden.flip(0), (weight, bias), (weight, bias))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, exact)
    assert torch.equal(kl_inside, kl)


def test_half_precision_inputs_are_widened() -> None:
    hidden, weight, bias, target = head(torch.bfloat16)
    exact = whole(hidden.float(), weight.float(), bias.float(), target)
    torch.testing.assert_close(token_log_probs(hidden, weight, target, bias), exact)


@pytest.mark.parametrize("elements", [VOCAB, 2**25])
def test_token_kl(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setitem(numerics.CHUNK_ELEMENTS, "cpu", elements)
    hidden, weight, bias, _ = head(torch.float64)
    ref_hidden, ref_weight, ref_bias, _ = head(torch.float64, seed=1)
    p = torch.distributions.Categorical(logits=hidden @ weight.T + bias)
    q = torch.distributions.Categorical(logits=ref_hidden @ ref_weight.T + ref_bias)
    direct = torch.distributions.kl_divergence(p, q)
    kl = token_kl(hidden, ref_hidden, (weight, bias), (ref_weight, ref_bias))
    torch.testing.assert_close(kl, direct, rtol=1e-12, atol=1e-12)
    # it is not symmetric: policy first
    assert (
        token_kl(ref_hidden, hidden, (ref_weight, ref_bias), (weight, bias)) - kl
    ).abs().max() > 0.1


@pytest.mark.parametrize("elements", [VOCAB, 2**25])
@pytest.mark.parametrize("with_bias", [True, False])
def test_token_collision(monkeypatch: pytest.MonkeyPatch, elements: int, with_bias: bool) -> None:
    monkeypatch.setitem(numerics.CHUNK_ELEMENTS, "cpu", elements)
    hidden, weight, bias, _ = head(torch.float64)
    hidden.requires_grad_(True)
    given = bias if with_bias else None
    p = (hidden @ weight.T + (bias if with_bias else 0)).softmax(-1)
    collision = token_collision(hidden, weight, given)
    torch.testing.assert_close(collision, p.square().sum(-1).log().detach(), rtol=1e-12, atol=1e-12)
    assert not collision.requires_grad and bool((collision < 0).all())


def test_token_collision_at_its_ends_and_widths() -> None:
    """A uniform distribution has 1 / V, a certain one 1, however large its logits."""
    eye = torch.eye(VOCAB)
    uniform_one = token_collision(torch.zeros(1, VOCAB), eye)
    torch.testing.assert_close(uniform_one, torch.tensor([-math.log(VOCAB)]))
    assert token_collision(1e4 * eye[:1], eye).tolist() == [0.0]
    hidden, weight, bias, _ = head(torch.bfloat16)
    exact = token_collision(hidden.float(), weight.float(), bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = token_collision(hidden, weight, bias)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, exact)


def test_masked_sum_ignores_nan() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0]])
    assert masked_sum(x, torch.tensor([[True, False, True]])).tolist() == [3.0]


# --- random draws -------------------------------------------------------------------------------


def chi_square(counts: Tensor, probability: Tensor) -> float:
    expected = probability * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniform_depends_on_its_counters_alone() -> None:
    key = stream_key(7, "test")
    table = uniform(key, torch.arange(5)[:, None], torch.arange(9))
    for i in range(5):
        for j in range(9):
            assert uniform(key, i, j) == table[i, j]
    assert torch.equal(uniform(key, torch.tensor([3]), torch.tensor([8, 1])), table[3, [8, 1]])
    assert not torch.equal(
        uniform(stream_key(8, "test"), torch.arange(5)[:, None], torch.arange(9)), table
    )
    assert uniform(key, 1, 2) != uniform(key, 2, 1)
    assert uniform(key, 1) != uniform(key, 1, 0)


def test_draws_are_the_same_on_every_machine() -> None:
    """Runs resume from integers: another formula would silently change every run."""
    assert stream_key(0, "a") == 4513031048185085819
    assert uniform(stream_key(0, "a"), 1, 2).item() == 0.28323708646227264


def test_uniform_is_uniform() -> None:
    draws = uniform(stream_key(0), torch.arange(400)[:, None], torch.arange(50))
    assert draws.dtype == torch.float64
    assert 0 <= draws.min() and draws.max() < 1
    tenth = torch.full((10,), 0.1, dtype=torch.float64)
    for part in (draws, draws[0::2], draws[:, 0], draws[0:10]):
        assert chi_square(torch.histc(part, 10, 0, 1), tenth) < CHI2_999[9]
    # neighbours in either counter are independent
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        cell = (a * 4).long() * 4 + (b * 4).long()
        counts = torch.bincount(cell.flatten(), minlength=16)
        assert chi_square(counts, torch.full((16,), 1 / 16)) < CHI2_999[15]


def test_permutation() -> None:
    for n in (0, 1, 2, 17):
        assert permutation(3, 0, n).sort().values.tolist() == list(range(n))
    assert torch.equal(permutation(3, 5, 17), permutation(3, 5, 17))
    assert not torch.equal(permutation(3, 5, 17), permutation(3, 6, 17))
    first = torch.stack([permutation(1, epoch, 10)[0] for epoch in range(2000)])
    tenth = torch.full((10,), 0.1, dtype=torch.float64)
    assert chi_square(torch.bincount(first, minlength=10), tenth) < CHI2_999[9]


def test_sample_index_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    u = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert sample_index(p.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("total", [1e-30, 0.1, 0.5, 0.51, 0.7, 1.0, 1 + 2**-52, 1.9999, 3.0, 1e30])
def test_tokens_of_no_probability_are_never_drawn(total: float) -> None:
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64) * total
    u = torch.tensor([0.0, 2**-53, 0.3, 0.5, 1 - 2**-52, 1 - 2**-53], dtype=torch.float64)
    assert set(sample_index(p.expand(6, -1), u).tolist()) <= {1, 3}
    one = torch.zeros(5, dtype=torch.float64)
    one[2] = total
    assert set(sample_index(one.expand(6, -1), u).tolist()) == {2}


def test_every_index_is_reached_as_often_as_it_should() -> None:
    p = torch.arange(1, 11, dtype=torch.float64)
    u = uniform(stream_key(1), torch.arange(20000))
    counts = torch.bincount(sample_index(p.expand(20000, -1), u), minlength=10)
    assert (counts > 0).all()
    assert chi_square(counts, p / p.sum()) < CHI2_999[9]
