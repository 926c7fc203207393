"""`Transformer.outputs`: log-probs, values and collisions of one forward, and their gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.policies.base import Policy, Trainable
from preftune.policies.transformer import Transformer
from preftune.policies.trunk import Trunk
from preftune.samples import Samples

ALL = frozenset({"logp", "value", "collision"})
PATHS = ["llama", "llama_tied", "gpt2", "mistral", "gemma2", "granite", "cohere", "bloom"]
WHOLE = ["gemma2", "granite", "cohere"]
EXACT = ["llama", "llama_tied", "gpt2", "qwen3", "mistral", "granite"]
"""Float64 throughout once `with_values` has replaced their norms; parts of others are float32."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def exact_norm(module: Any, x: Tensor) -> Tensor:
    """Transformers' root mean square norm, which computes in float32 whatever the weights."""
    scale = x.square().mean(-1, keepdim=True).add(module.variance_epsilon).rsqrt()
    return module.weight * (x * scale)


def with_values(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Transformer:
    """A policy with a value head that was moved off zero."""
    model = tiny.make(name, dtype)
    for module in model.modules() if dtype == torch.float64 and name in EXACT else ():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)
    made = Transformer(model, end_ids=[tiny.END], value_head=True, **options)
    assert made.value_head is not None
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.value_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return made


def near(name: str) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-10 if name in EXACT else 1e-5}


@torch.no_grad()
def plain_states(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The hidden state before each response token: one row, no padding, nothing shared."""
    ids = torch.tensor([[*prompt, *response]])
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0][
        len(prompt) - 1 : -1
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equal_plain_forwards(name: str, share: bool) -> None:
    """Every ragged row, the end token included; 0 where masked."""
    policy, s = with_values(name, share_prefix=share), tiny.ragged()
    assert isinstance(policy, Policy)
    out = {key: x.detach() for key, x in policy.outputs(s, ALL).items()}
    assert set(out) == ALL and policy._whole_model == (name in WHOLE)
    assert policy.value_head is not None
    for x in out.values():
        assert x.shape == s.mask.shape and not x[~s.mask].any() and x.dtype == torch.float64
    for i, k, prompt, response in tiny.unpadded(s):
        table = tiny.next_log_probs(policy.model, prompt, response)
        states = plain_states(policy.model, prompt, response)
        expected = {
            "logp": tiny.plain_log_probs(policy.model, prompt, response),
            "value": policy.value_head(states).squeeze(-1).detach(),
            "collision": table.exp().square().sum(-1).log(),
        }
        for key, plain in expected.items():
            assert plain.shape == (len(response),)
            torch.testing.assert_close(out[key][i, k, : len(response)], plain, **near(name))
    assert float(out["value"][s.mask].std()) > 0.2


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", PATHS)
def test_survey_equals_plain_forwards(name: str, share: bool) -> None:
    policy, s = tiny.policy(name, share_prefix=share), tiny.ragged()
    out = policy.survey(s)
    assert not any(x[~s.mask].any() for x in (out["logp"], out["entropy"], out["variance"]))
    for i, k, prompt, response in tiny.unpadded(s):
        table = tiny.next_log_probs(policy.model, prompt, response)
        entropy = -(table.exp() * table).sum(-1)
        expected = {
            "logp": tiny.plain_log_probs(policy.model, prompt, response),
            "entropy": entropy,
            "variance": (table.exp() * table.square()).sum(-1) - entropy.square(),
        }
        for key, plain in expected.items():
            got = out[key][i, k, : len(response)].double()
            torch.testing.assert_close(got, plain.double(), rtol=0, atol=1e-4)
        states = plain_states(policy.model, prompt, response).sum(0).float()
        torch.testing.assert_close(out["hidden"][i, k], states, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_what_is_not_named_is_not_given(name: str) -> None:
    policy, s = with_values(name), tiny.ragged()
    together = policy.outputs(s, ALL)
    for names in ({"logp"}, {"value"}, {"collision"}, {"logp", "value"}):
        out = policy.outputs(s, frozenset(names))
        assert set(out) == names
        for key in names:
            assert torch.equal(out[key], together[key]), key
    assert torch.equal(together["logp"], tiny.score(policy, s))
    assert not policy.outputs(s, frozenset({"collision"}))["collision"].requires_grad
    assert not together["collision"].requires_grad
    with pytest.raises(AssertionError, match="gives no score"):
        policy.outputs(s, frozenset({"score"}))
    with pytest.raises(AssertionError, match="without a value head"):
        tiny.policy(name).outputs(s, frozenset({"value"}))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_forward_gives_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = with_values(name), []
    original = Trunk.forward

    def count(self: Trunk, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(Trunk, "forward", count)
    policy.outputs(tiny.ragged(), ALL)
    assert len(calls) == 1


def gradients(policy: Transformer, s: Samples, names: set[str]) -> dict[str, Tensor]:
    """Of a sum over tokens, each with a weight of its own."""
    for _, parameter in policy.named_parameters():
        parameter.grad = None
    out = policy.outputs(s, frozenset(names))
    weight = torch.linspace(-1, 1, s.mask.numel(), dtype=torch.float64).view(s.mask.shape)
    sum((out[key] * weight).sum() for key in sorted(names)).backward()  # type: ignore[union-attr]
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in policy.named_parameters()
    }


@pytest.mark.parametrize("name", PATHS)
def test_gradients_of_both_are_the_sum_of_each(name: str) -> None:
    policy, s = with_values(name), tiny.ragged()
    logp, value = gradients(policy, s, {"logp"}), gradients(policy, s, {"value"})
    both = gradients(policy, s, {"logp", "value"})
    for key, grad in both.items():
        expected = logp[key] + value[key]
        scale = max(1.0, float(expected.abs().max()))
        close = 1e-10 if name in EXACT else 1e-5
        torch.testing.assert_close(grad, expected, rtol=0, atol=close * scale)
    trunk = [key for key in both if not key.startswith("value_head") and "lm_head" not in key]
    assert all(bool((value[key] != 0).any()) for key in trunk)
    assert bool((value["value_head.weight"] != 0).any())
    assert not logp["value_head.weight"].any()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen3", "granite"])
def test_layouts_agree_in_values_and_gradients(name: str) -> None:
    shared, plain = (with_values(name, share_prefix=share) for share in (True, False))
    assert shared.share_prefix and not plain.share_prefix
    s = tiny.ragged()
    one, other = shared.outputs(s, ALL), plain.outputs(s, ALL)
    for key in ALL:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-10)
    one, other = (gradients(p, s, {"logp", "value"}) for p in (shared, plain))
    for key, grad in one.items():
        scale = max(1.0, float(other[key].abs().max()))
        torch.testing.assert_close(grad, other[key], rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_value_loss_by_finite_differences(name: str) -> None:
    """A squared value loss, with respect to the head and to a weight deep in the trunk."""
    policy, s = with_values(name), tiny.ragged()
    target = torch.linspace(-1, 1, s.mask.numel(), dtype=torch.float64).view(s.mask.shape)

    def loss() -> Tensor:
        value = policy.outputs(s, frozenset({"value"}))["value"]
        return torch.where(s.mask, (value - target).square(), 0.0).sum()

    loss().backward()
    named = dict(policy.named_parameters())
    deep = next(n for n in named if ("o_proj" in n or "c_proj" in n) and n.endswith("weight"))
    for key in ("value_head.weight", "value_head.bias", deep):
        flat, grad = named[key].data.view(-1), named[key].grad
        assert grad is not None
        for place in {0, flat.numel() // 2, flat.numel() - 1}:
            at, step = float(flat[place]), 1e-4
            values = []
            for moved in (at + step, at - step):
                flat[place] = moved
                values.append(float(loss().detach()))
            flat[place] = at
            slope = (values[0] - values[1]) / (2 * step)
            assert float(grad.view(-1)[place]) == pytest.approx(slope, rel=1e-5, abs=1e-5), key


def test_the_value_head_begins_at_zero_and_is_named_last() -> None:
    policy, s = tiny.policy("llama", value_head=True), tiny.ragged()
    value = policy.outputs(s, frozenset({"value"}))["value"]
    assert not value.any()
    names = [name for name, _ in policy.named_parameters()]
    assert names[-2:] == ["value_head.weight", "value_head.bias"]
    assert names[:-2] == [name for name, _ in policy.model.named_parameters()]
    assert len(list(policy.parameters())) == len(names)
    (value.sum() - 3 * value.square().sum()).backward()
    assert policy.value_head is not None and policy.value_head.bias.grad is not None
    assert float(policy.value_head.bias.grad) == int(s.mask.sum())
    assert isinstance(policy, Trainable)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_value_head_is_wide_and_beside_the_model(dtype: torch.dtype) -> None:
    head = tiny.policy("gpt2", dtype, value_head=True).value_head
    assert head is not None
    assert head.weight.shape == (1, 16) and head.weight.device.type == "cpu"
    assert head.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_under_autocast_weights_and_outputs_stay_wide(name: str) -> None:
    policy, s = with_values(name, torch.float32, autocast=torch.bfloat16), tiny.ragged()
    exact = with_values(name, torch.float32).outputs(s, ALL)
    out = policy.outputs(s, ALL)
    for key in ALL:
        assert out[key].dtype == torch.float32
        off = (out[key] - exact[key]).detach().abs().max()
        assert 0 < float(off) < 0.5, key
    with torch.autocast("cpu", torch.bfloat16):  # one that a caller left on does not reach a head
        again = policy.outputs(s, ALL)
    assert all(torch.equal(again[key], out[key]) for key in ALL)
    (out["logp"].sum() + out["value"].sum()).backward()
    for key, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
        assert bool(parameter.grad.isfinite().all())


def test_empty_responses_and_padding() -> None:
    policy = with_values("llama")
    s = tiny.samples([[5, 6], [7, 8, 9]], [[[], [10, 1]], [[11, 12, 1], []]])
    out = policy.outputs(s, ALL)
    for x in out.values():
        assert not x[~s.mask].any() and bool((x[s.mask] != 0).all())
    none = tiny.samples([[5, 6]], [[[], []]])
    for x in policy.outputs(none, ALL).values():
        assert x.shape == none.mask.shape and not x.any()


def test_outputs_do_not_depend_on_the_rows_beside() -> None:
    policy, s = with_values("gpt2"), tiny.ragged()
    together = policy.outputs(s, ALL)
    for i in range(4):
        alone = policy.outputs(s.take(torch.tensor([i])), ALL)
        for key in ALL:
            torch.testing.assert_close(alone[key][0], together[key][i], rtol=0, atol=1e-10)


# --- control tokens -----------------------------------------------------------------------------


def test_control_tokens_stand_at_the_end_of_the_prompt() -> None:
    policy = tiny.policy("llama", controls=([40, 41, 42], [50]))
    s = tiny.samples([[5, 6, 7], [8], [9, 10]], [[[1]], [[1]], [[1]]])
    good = torch.tensor([True, False, False])
    prompt, mask = policy.condition(s.prompt, s.prompt_mask, good)
    rows = [p[m].tolist() for p, m in zip(prompt, mask, strict=True)]
    assert rows == [[5, 6, 7, 50], [8, 40, 41, 42], [9, 10, 40, 41, 42]]
    assert prompt.shape == mask.shape == (3, 5) and prompt.dtype == s.prompt.dtype
    assert bool((mask.long().diff(dim=-1) >= 0).all())  # padded on the left
    scored = policy.score(prompt, mask, s.tokens, s.mask).detach()
    for i, row in enumerate(rows):
        plain = tiny.plain_log_probs(policy.model, row, [1])
        torch.testing.assert_close(scored[i, 0], plain, rtol=0, atol=1e-10)


def test_conditioning_needs_control_tokens() -> None:
    s = tiny.ragged()
    with pytest.raises(AssertionError, match="without control tokens"):
        tiny.policy("llama").condition(s.prompt, s.prompt_mask, torch.ones(4).bool())
    copy = tiny.policy("llama", controls=([2], [3])).frozen_copy()
    assert copy.condition(s.prompt, s.prompt_mask, torch.ones(4).bool())[0].shape == (4, 14)
    other = copy.with_model(tiny.make("llama", seed=1))
    assert other.controls == ([2], [3])
