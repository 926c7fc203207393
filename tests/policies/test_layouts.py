"""Packing, sharing and precision: every switch gives what plain float64 rows of one response give,
in losses and in gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.numerics import masked_sum
from preftune.objectives import dpo
from preftune.policies import attention
from preftune.policies.attention import NAME, packed_attention, tiles_of
from preftune.policies.scoring import by_length, micro_batches
from preftune.policies.transformer import Transformer
from preftune.samples import Samples

PACKED = ["llama", "llama_tied", "gpt2", "qwen3", "granite", "cohere", "mistral"]
NEVER = ["gemma2", "bloom"]
SWITCHES = [(packing, share) for packing in (True, False) for share in (True, False)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def cases() -> dict[str, Samples]:
    """Ragged rows; one-token responses; prompts that nothing is shared with; one long prompt."""
    ids = torch.randint(2, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(7)).tolist()
    return {
        "ragged": tiny.ragged(),
        "one_token": tiny.samples([[5, 6, 7], [9]], [[[1], [8, 1]], [[1], [1]]]),
        "single": tiny.samples([[5, 6], [7, 8, 9]], [[[3, 4, 1]], [[10, 1]]]),
        "long": tiny.samples([ids, [5]], [[[3, 4, 1], [10, 1]], [[8, 1], ids[:20]]]),
    }


def plain(model: Any, s: Samples) -> Tensor:
    """[N, K]: summed log-probs, a row a response, nothing shared, with gradients."""
    out = torch.zeros(s.mask.shape[:2], dtype=torch.float64)
    for i, k, prompt, response in tiny.unpadded(s):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        logp = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        out[i, k] = logp.gather(-1, torch.tensor(response)[:, None]).sum()
    return out


def loss(summed: Tensor) -> Tensor:
    """DPO's of pairs, else the negative log-prob."""
    if summed.shape[1] == 1:
        return -summed.mean()
    zero = torch.zeros_like(summed[:, 0])
    return dpo(summed[:, 0], summed[:, 1], zero, zero, beta=0.1).mean()


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    value.backward()
    return {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", list(cases()))
@pytest.mark.parametrize(("packing", "share"), SWITCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_every_switch_gives_the_plain_loss_and_gradient(
    name: str, packing: bool, share: bool, case: str
) -> None:
    s = cases()[case]
    model = tiny.make(name).eval()
    expected = loss(plain(model, s))
    wanted = gradients(model, expected)
    scorer = Transformer(model, end_ids=[tiny.END], packing=packing, share_prefix=share)
    assert (scorer.packing, scorer.share_prefix) == (packing, share)
    found = loss(masked_sum(tiny.score(scorer, s), s.mask))
    # some norms compute in float32 whatever the weights are
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    got = gradients(model, found)
    size = max(float(g.abs().max()) for g in wanted.values())
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=3e-6 * size)


@pytest.mark.parametrize(("packing", "share"), SWITCHES)
@pytest.mark.parametrize("name", PACKED)
def test_float32_is_within_a_hundred_thousandth_a_token(
    name: str, packing: bool, share: bool
) -> None:
    s = tiny.ragged() if name != "mistral" else cases()["single"]
    exact, rounded = tiny.make(name).eval(), tiny.make(name, torch.float32).eval()
    scorer = Transformer(rounded, end_ids=[tiny.END], packing=packing, share_prefix=share)
    got = tiny.score(scorer, s).detach().double()
    for i, k, prompt, response in tiny.unpadded(s):
        wanted = tiny.plain_log_probs(exact, prompt, response).double()
        # rtol: a log-prob of -6 has that rounding in a plain float32 row too
        torch.testing.assert_close(got[i, k, : len(response)], wanted, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_autocast_is_near(packing: bool) -> None:
    """Rounded to bfloat16 throughout: some hundredths of a nat, and the gradient's direction."""
    s = tiny.ragged()
    model = tiny.make("llama").eval()
    wanted = gradients(model, loss(plain(model, s)))
    model = tiny.make("llama", torch.float32).eval()
    scorer = Transformer(model, end_ids=[tiny.END], packing=packing, autocast=torch.bfloat16)
    got = gradients(model, loss(masked_sum(tiny.score(scorer, s), s.mask)))
    a, b = (torch.cat([g[n].flatten() for n in sorted(wanted)]) for g in (got, wanted))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.99
    assert float((a - b).norm() / b.norm()) < 0.15


@pytest.mark.parametrize("name", NEVER)
def test_a_model_that_cannot_pack_says_so_and_pads(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = tiny.policy(name, packing=True)
    assert not scorer.packing
    assert caplog.text.count("packing: not possible") == 1
    assert scorer.model.config._attn_implementation != NAME


def test_a_window_that_bites_is_not_packed() -> None:
    """Tiles hold no window: longer rows go their own way, and give the model's own log-probs."""
    scorer = tiny.policy("mistral")
    assert scorer.packing
    s = tiny.ragged()
    layout = scorer.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask)
    assert len(layout.input_ids) == 12
    for i, k, prompt, response in tiny.unpadded(s):
        got = tiny.score(scorer, s)[i, k, : len(response)].detach()
        wanted = tiny.plain_log_probs(scorer.model, prompt, response)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_a_packed_row_holds_no_padding_and_each_prompt_once() -> None:
    s = tiny.ragged()
    layout = tiny.policy("llama").trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask)
    fed = s.prompt_mask.sum() + (s.lengths() - 1).sum()
    assert layout.input_ids.shape == (1, int(fed))


@pytest.mark.parametrize("block", [1, 3, 256])
def test_tiles_are_the_mask(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query's keys, listed, are those before it of its prompt and of its own response."""
    monkeypatch.setattr(attention, "BLOCK", block)
    tiles = tiles_of(4, [4, 7, 7], [3, 0, 2], offset=10)
    seen: dict[int, list[int]] = {}
    for q0, q1, p0, p1, o0 in tiles:
        for query in range(q0, q1):
            assert query not in seen
            seen[query] = [*range(p0, p1), *range(o0, query + 1)]
    prompt = list(range(10, 14))
    expected = {q: list(range(10, q + 1)) for q in prompt}
    expected |= {q: [*prompt, *range(14, q + 1)] for q in (14, 15, 16)}
    expected |= {q: [*prompt, *range(17, q + 1)] for q in (17, 18)}
    assert {q: sorted(set(k)) for q, k in seen.items()} == expected
    assert all(len(k) == len(set(k)) for k in seen.values())


@pytest.mark.parametrize("block", [2, 256])
def test_the_operator_by_finite_differences(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    tiles = torch.tensor(tiles_of(3, [3, 5], [2, 3], 0) + tiles_of(2, [2], [2], 8))

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, 12, 4, dtype=torch.float64, generator=g, requires_grad=True)

    query, key, value = draw(4), draw(2), draw(2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, tiles, 0.5), (query, key, value)
    )


def test_a_prompt_longer_than_the_budget_has_a_pass_of_its_own() -> None:
    s = cases()["long"]
    parts = [p.tolist() for p in micro_batches(s, 30)]
    assert parts == [[0], [1]]
    scorer = tiny.policy("llama")
    whole = tiny.score(scorer, s).detach()
    for i in range(2):
        one = s.take(torch.tensor([i])).trimmed()
        got = tiny.score(scorer, one).detach()[0]
        torch.testing.assert_close(got, whole[i, :, : got.shape[-1]], rtol=0, atol=1e-8)


def test_groups_are_few_and_about_equal() -> None:
    parts = [p.tolist() for p in by_length([286] * 8, 2048)]
    assert [len(p) for p in parts] == [4, 4]
    assert [len(p) for p in by_length([1000, *[10] * 100], 2048)] == [4, 97]  # padded, it is wider
    size = [500, 20, 30, 400, 90, 10, 70, 300]
    parts = [p.tolist() for p in by_length(size, 520)]
    assert sorted(i for p in parts for i in p) == list(range(8))
    assert all(sum(size[i] for i in p) <= 520 for p in parts)
