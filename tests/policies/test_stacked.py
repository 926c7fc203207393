"""Stacked small transformers: equal to a plain model, and each run alone to the bit."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from preftune.numerics import normal, stream_keys, uniform
from preftune.policies.base import Policy
from preftune.policies.stacked import StackedTransformer
from preftune.samples import Samples

SMALL: dict[str, Any] = {"vocab": 7, "length": 4, "layers": 2, "heads": 2, "width": 32}
NANO: dict[str, Any] = {"vocab": 100, "length": 9, "layers": 3, "heads": 3, "width": 48}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def keys_of(*seeds: int) -> Tensor:
    return stream_keys(seeds, "weights")


def moved(
    keys: Tensor, shape: dict[str, Any], dtype: torch.dtype = torch.float64, std: float = 0.2
) -> StackedTransformer:
    """A policy all of whose weights, biases and gains too, were moved from where they begin."""
    policy = StackedTransformer(keys, **shape, dtype=dtype)
    with torch.no_grad():
        for i, (_, w) in enumerate(policy.tensors()):
            for r, key in enumerate(keys):
                w[r] += std * normal(key, 1000 + i, torch.arange(w[r].numel())).view(w[r].shape)
    return policy


def given(
    policy: StackedTransformer, keys: Tensor, n: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, tokens, and a gradient of the log-probs, each a function of the run's key."""
    vocab = policy.vocab

    def draw(stream: int, *shape: int) -> Tensor:
        index = torch.arange(torch.Size(shape).numel())
        return torch.stack([uniform(key, stream, index).view(shape) for key in keys])

    prompt, tokens = draw(0, n, 1) * vocab, draw(1, n, k, policy.length) * vocab
    grad = (draw(2, n, k, policy.length) - 0.3).to(policy._weights["token"].dtype)
    return prompt.long(), tokens.long(), grad


def samples(prompt: Tensor, tokens: Tensor) -> Samples:
    return Samples(
        prompt=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        finished=torch.ones(tokens.shape[:-1], dtype=torch.bool),
        origin=torch.zeros(tokens.shape[:-1], dtype=torch.int64),
        row=prompt.squeeze(-1),
    )


def score(policy: StackedTransformer, prompt: Tensor, tokens: Tensor) -> Tensor:
    s = samples(prompt, tokens)
    return policy.score(prompt, s.prompt_mask, tokens, s.mask)


def stream(keys: Tensor) -> Callable[[int, tuple[int, ...]], Tensor]:
    """Uniforms of each run's own."""

    def draw(t: int, shape: tuple[int, ...]) -> Tensor:
        n, k = torch.arange(shape[1]).view(1, -1, 1), torch.arange(shape[2])
        return uniform(keys.view(-1, 1, 1), t, n, k)

    return draw


def sample(policy: StackedTransformer, prompt: Tensor, k: int, keys: Tensor) -> Samples:
    mask = torch.ones_like(prompt, dtype=torch.bool)
    return policy.sample(prompt, mask, k, stream(keys), 5)


# --- a plain model ------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP, one module for each product."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.merge = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        q, k, v = (
            m(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + self.merge((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class Plain(nn.Module):
    """One run."""

    def __init__(self, vocab: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(1 + length, width)
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """The log-probs before each token: prompt [n, 1], tokens [n, K, T] -> [n, K, T, V]."""
        n, k, length = tokens.shape
        ids = torch.cat([prompt.unsqueeze(1).expand(n, k, 1), tokens[..., :-1]], -1)
        x = self.token(ids.flatten(0, 1)) + self.position(torch.arange(length))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).log_softmax(-1).view(n, k, length, -1)


def plain_weights(model: Any, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The model's weights, or their gradients, by the names and in the layout of the policy."""
    blocks = list(model.blocks)

    def matrix(m: Any) -> Tensor:
        return of(m.weight).T

    def stack(each: Callable[..., Tensor]) -> Tensor:
        return torch.stack([each(b) for b in blocks])

    return {
        "token": of(model.token.weight),
        "position": of(model.position.weight),
        "gain": of(model.norm.weight),
        "shift": of(model.norm.bias),
        "head": matrix(model.head),
        "attend_gain": stack(lambda b: of(b.first.weight)),
        "attend_shift": stack(lambda b: of(b.first.bias)),
        "attend": stack(lambda b: torch.cat([matrix(m) for m in (b.q, b.k, b.v)], 1)),
        "attend_bias": stack(lambda b: torch.cat([of(m.bias) for m in (b.q, b.k, b.v)])),
        "merge": stack(lambda b: matrix(b.merge)),
        "merge_bias": stack(lambda b: of(b.merge.bias)),
        "mlp_gain": stack(lambda b: of(b.second.weight)),
        "mlp_shift": stack(lambda b: of(b.second.bias)),
        "up": stack(lambda b: matrix(b.up)),
        "up_bias": stack(lambda b: of(b.up.bias)),
        "down": stack(lambda b: matrix(b.down)),
        "down_bias": stack(lambda b: of(b.down.bias)),
    }


def plain_models(runs: int, shape: dict[str, Any]) -> tuple[list[Plain], StackedTransformer]:
    """Random plain models, one a run, and the policy with their weights."""
    torch.manual_seed(0)
    models = [Plain(**shape).double() for _ in range(runs)]
    with torch.no_grad():
        for p in (p for m in models for p in m.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    each = [plain_weights(m, lambda p: p.detach()) for m in models]
    policy = StackedTransformer(keys_of(*range(runs)), **shape, dtype=torch.float64)
    policy.load({name: torch.stack([w[name] for w in each]) for name in each[0]})
    return models, policy


@pytest.mark.parametrize("n, k", [(3, 4), (5, 1)])
@pytest.mark.parametrize("shape", [SMALL, NANO])
def test_equals_plain_models(shape: dict[str, Any], n: int, k: int) -> None:
    """Log-probs, whole distributions, collisions, and the gradient of every weight."""
    models, policy = plain_models(2, shape)
    assert isinstance(policy, Policy) and policy.batch_shape == (2,)
    prompt, tokens, weight = given(policy, keys_of(0, 1), n, k)
    table = torch.stack([m(prompt[r], tokens[r]) for r, m in enumerate(models)])
    expected = table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert float(expected.detach().std()) > 0.3
    near = {"rtol": 0, "atol": 1e-10}
    out = policy.outputs(samples(prompt, tokens), frozenset({"logp", "collision"}))
    torch.testing.assert_close(out["logp"], expected, **near)
    torch.testing.assert_close(policy.next_log_probs(prompt, tokens), table.detach(), **near)
    collision = table.detach().exp().square().sum(-1).log()
    torch.testing.assert_close(out["collision"], collision, **near)
    assert not out["collision"].requires_grad
    (expected * weight).sum().backward()
    (out["logp"] * weight).sum().backward()
    grads = [plain_weights(m, lambda p: p.grad) for m in models]  # type: ignore[arg-type]
    named = policy.named_parameters()
    assert [name for name, _ in named] == list(grads[0])
    for name, p in named:
        grad = torch.stack([g[name] for g in grads])
        assert p.grad is not None and bool((grad != 0).any())
        torch.testing.assert_close(p.grad, grad, **near, msg=lambda m, name=name: f"{name}: {m}")


def test_a_token_is_scored_from_what_stands_before_it() -> None:
    keys = keys_of(0, 1)
    policy = moved(keys, SMALL)
    prompt, tokens, _ = given(policy, keys, 3, 2)
    table, logp = policy.next_log_probs(prompt, tokens), score(policy, prompt, tokens)
    for t in range(policy.length):
        other = tokens.clone()
        other[..., t:] = (other[..., t:] + 1 + t) % SMALL["vocab"]
        changed = policy.next_log_probs(prompt, other)
        assert torch.equal(changed[..., : t + 1, :], table[..., : t + 1, :])
        assert t + 1 == policy.length or bool(
            (changed[..., t + 1, :] != table[..., t + 1, :]).all()
        )
        assert torch.equal(score(policy, prompt, other)[..., :t], logp[..., :t])
    assert bool((policy.next_log_probs((prompt + 1) % SMALL["vocab"], tokens) != table).all())


def test_next_log_probs_are_normalised() -> None:
    keys = keys_of(0, 1, 2)
    policy = moved(keys, NANO)
    table = policy.next_log_probs(*given(policy, keys, 3, 2)[:2])
    assert table.shape == (3, 3, 2, 9, 100) and not table.requires_grad
    assert float((table.exp().sum(-1) - 1).abs().max()) < 1e-12
    assert float(table.exp().max()) > 0.1  # and far from uniform


# --- a run does not depend on the batch ---------------------------------------------------------


def everything(seeds: list[int], n: int, k: int) -> dict[str, Tensor]:
    """What each run of a batch draws, scores and learns, and a reference that follows it."""
    keys = keys_of(*seeds)
    policy = moved(keys, NANO, torch.float32, 0.1)
    prompt, tokens, weight = given(policy, keys, n, k)
    drawn = sample(policy, prompt, k, keys)
    assert drawn.logp is not None
    out = policy.outputs(samples(prompt, tokens), frozenset({"logp", "collision"}))
    (out["logp"] * weight).sum().backward()
    found = {"tokens": drawn.tokens, "drawn": drawn.logp} | {n: x.detach() for n, x in out.items()}
    start = StackedTransformer(keys, **NANO).frozen_copy()
    found["kl"] = policy.step_kl(start, drawn)
    found["table"] = policy.next_log_probs(prompt, tokens)
    start.follow(policy, 0.9)
    for name, p in policy.named_parameters():
        assert p.grad is not None
        found[f"d {name}"] = p.grad
    return found | {f"follows {name}": w for name, w in start.tensors()}


@pytest.mark.parametrize("n, k", [(10, 10), (3, 2)])
def test_a_run_is_bitwise_the_same_in_any_batch(n: int, k: int) -> None:
    batch = everything([0, 1, 2, 3, 4], n, k)
    assert len({tuple(x.flatten().tolist()) for x in batch["tokens"]}) == 5
    order = [3, 0, 4, 2, 1]
    permuted = everything(order, n, k)
    chunk = everything([*range(100, 129), *range(5), *range(200, 230)], n, k)
    assert chunk["tokens"].shape[0] == 64
    alone = [everything([r], n, k) for r in range(5)]
    for name, x in batch.items():
        assert bool(x.isfinite().all()), name
        assert torch.equal(x, permuted[name][[order.index(r) for r in range(5)]]), name
        assert torch.equal(x, chunk[name][29:34]), name
        assert torch.equal(x, torch.cat([a[name] for a in alone])), name


def test_first_weights_depend_on_the_key_alone() -> None:
    together = {n: x.detach() for n, x in StackedTransformer(keys_of(0, 1, 2)).tensors()}
    for name, x in StackedTransformer(keys_of(2)).tensors():
        assert torch.equal(x[0], together[name][2]) and x.dtype == torch.float32, name
    for name, x in together.items():
        if name.endswith(("gain", "shift", "bias")):
            assert bool((x == float(name.endswith("gain"))).all()), name
            continue
        assert not torch.equal(x[0], x[1]), name
        std = 0.02 / 6**0.5 if name in ("merge", "down") else 0.02
        assert float(x.std()) == pytest.approx(std, rel=0.1), name
        assert abs(float(x.mean())) < 0.1 * std, name
    assert len({float(x[0].flatten()[0]) for x in together.values() if x.std() > 0}) == 7


# --- samples ------------------------------------------------------------------------------------


def test_samples_follow_the_distribution() -> None:
    """The first two tokens against the product of exact probabilities."""
    vocab, count = 6, 20000
    keys = keys_of(3)
    policy = moved(keys, {"vocab": vocab, "length": 2, "layers": 1, "heads": 1, "width": 16})
    pairs = torch.tensor(list(itertools.product(range(vocab), repeat=2))).view(1, 1, -1, 2)
    prompt = torch.tensor([[[4]]])
    exact = score(policy, prompt, pairs).detach().sum(-1).exp().flatten()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-12)
    assert float(exact.max() / exact.min()) > 5
    drawn = sample(policy, prompt, count, keys).tokens[0, 0]
    counts = torch.bincount(drawn[:, 0] * vocab + drawn[:, 1], minlength=len(exact))
    chi = float(((counts - count * exact) ** 2 / (count * exact)).sum())
    assert chi < 66.6  # 99.9 %, 35 degrees


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_samples_come_with_their_log_probs(dtype: torch.dtype, close: float) -> None:
    keys = keys_of(0, 1)
    policy = moved(keys, NANO, dtype)
    prompt = given(policy, keys, 4, 5)[0]
    drawn = sample(policy, prompt, 5, keys)
    assert drawn.logp is not None and drawn.logp.dtype == dtype and policy.exact_sampler
    assert not drawn.logp.is_inference() and not drawn.tokens.is_inference()
    assert drawn.tokens.shape == drawn.mask.shape == (2, 4, 5, 9)
    assert bool(drawn.mask.all()) and bool(drawn.finished.all()) and bool((drawn.origin == 5).all())
    assert torch.equal(drawn.row, prompt.squeeze(-1))
    scored = score(policy, prompt, drawn.tokens).detach()
    torch.testing.assert_close(drawn.logp, scored, rtol=close, atol=close)
    assert len(drawn.tokens.unique()) > 30


def test_a_response_does_not_depend_on_those_beside() -> None:
    keys = keys_of(0)
    policy = moved(keys, SMALL)
    prompt = torch.tensor([[[2], [6], [2]]])
    many, few = sample(policy, prompt, 8, keys), sample(policy, prompt[:, :2], 3, keys)
    assert torch.equal(many.tokens[:, :2, :3], few.tokens)
    assert not torch.equal(many.tokens[:, 0], many.tokens[:, 2])


# --- the rest of the protocol -------------------------------------------------------------------


def test_step_kl_is_exact() -> None:
    keys = keys_of(0, 1)
    policy, reference = moved(keys, SMALL), moved(keys_of(5, 6), SMALL)
    prompt, tokens, _ = given(policy, keys, 3, 2)
    s = samples(prompt, tokens)
    p, q = (x.next_log_probs(prompt, tokens) for x in (policy, reference))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(policy.step_kl(reference, s), expected)
    assert float(expected.min()) > 1e-3
    mask = s.mask.clone()
    mask[0, 1, 0, 2:] = False
    masked = replace(s, mask=mask)
    assert torch.equal(policy.step_kl(reference, masked) == 0, ~mask)


def test_what_is_masked_is_zero_and_without_gradient() -> None:
    keys = keys_of(0)
    policy = moved(keys, SMALL)
    prompt, tokens, _ = given(policy, keys, 2, 2)
    s = samples(prompt, tokens)
    mask = s.mask.clone()
    mask[..., 2:] = False
    out = policy.outputs(replace(s, mask=mask), frozenset({"logp", "collision"}))
    assert torch.equal(out["logp"] == 0, ~mask) and torch.equal(out["collision"] == 0, ~mask)
    out["logp"].sum().backward()
    grads = {n: p.grad for n, p in policy.named_parameters()}
    assert grads["position"] is not None
    assert not grads["position"][:, 2:].any() and bool(grads["position"][:, :2].any())


def test_what_is_not_named_is_not_given() -> None:
    keys = keys_of(0)
    policy = moved(keys, SMALL)
    s = samples(*given(policy, keys, 2, 2)[:2])
    together = policy.outputs(s, frozenset({"logp", "collision"}))
    for name in ("logp", "collision"):
        alone = policy.outputs(s, frozenset({name}))
        assert set(alone) == {name} and torch.equal(alone[name], together[name])
    with torch.no_grad():
        without = policy.outputs(s, frozenset({"logp"}))["logp"]
    assert torch.equal(without, together["logp"]) and not without.requires_grad
    for name in ("value", "score"):
        with pytest.raises(AssertionError, match=name):
            policy.outputs(s, frozenset({name}))


def test_a_frozen_copy_stays_and_follows() -> None:
    keys = keys_of(0, 1)
    policy = moved(keys, SMALL)
    prompt, tokens, _ = given(policy, keys, 2, 2)
    copy = policy.frozen_copy()
    before, start = score(copy, prompt, tokens), {n: w.clone() for n, w in copy.tensors()}
    assert not before.requires_grad and not copy.parameters() and not copy.named_parameters()
    assert torch.equal(before, score(policy, prompt, tokens))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    assert torch.equal(score(copy, prompt, tokens), before)
    copy.follow(policy, 0.75)
    for name, w in copy.tensors():
        torch.testing.assert_close(w, start[name] + 0.25)
        assert not w.requires_grad
    assert not torch.equal(score(copy, prompt, tokens), before)
    assert len(policy.parameters()) == len(start) == 17


def test_two_forward_passes_before_their_backward_passes() -> None:
    """Neither takes what the other left for its gradient."""
    keys = keys_of(0, 1)
    policy = moved(keys, SMALL)
    first, second = (given(policy, keys_of(r, r + 1), 2, 3) for r in (2, 7))

    def gradient(losses: list[Tensor]) -> list[Tensor]:
        for p in policy.parameters():
            p.grad = None
        for loss in losses:
            loss.backward()
        return [p.grad for p in policy.parameters()]  # type: ignore[misc]

    def loss(prompt: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        return (score(policy, prompt, tokens) * weight).sum()

    apart = [gradient([loss(*g)]) for g in (first, second)]
    together = gradient([loss(*first), loss(*second)])
    for x, y, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(both, x + y)


def test_what_is_refused() -> None:
    keys = keys_of(0)
    policy = StackedTransformer(keys, **SMALL)
    prompt, tokens, _ = given(policy, keys, 2, 2)
    with pytest.raises(AssertionError, match="no controls"):
        policy.condition(prompt, prompt > -1, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(AssertionError, match="4 tokens"):
        score(policy, prompt, tokens[..., :3])
    with pytest.raises(AssertionError, match="multiple of 48"):
        StackedTransformer(keys, heads=3, width=24)
    with pytest.raises(AssertionError, match="one token"):
        StackedTransformer(keys, length=1)
    total = score(policy, prompt, tokens).sum()
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="has run before"):
        total.backward()
