"""A policy against its frozen copy, and KL to a reference, on every path through the model."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.objectives import dpo
from preftune.policies.transformer import Transformer
from preftune.samples import Samples

PATHS = {
    "shared": ("llama", True),
    "shared, tied": ("llama_tied", True),
    "shared, absolute positions": ("gpt2", True),
    "plain": ("llama", False),
    "plain, absolute positions": ("gpt2", False),
    "window": ("mistral", None),
    "whole model": ("gemma2", None),
    "whole model, shared": ("granite", True),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request: pytest.FixtureRequest) -> tuple[str, bool | None]:
    return request.param


def dpo_losses(policy: Transformer, reference: Transformer, s: Samples) -> tuple[Tensor, Tensor]:
    """Losses [n] of first against second response, and log-ratios."""
    logp = tiny.score(policy, s)
    with torch.no_grad():
        ref_logp = tiny.score(reference, s)
    chosen, rejected = logp[:, 0].sum(-1), logp[:, 1].sum(-1)
    ref_chosen, ref_rejected = ref_logp[:, 0].sum(-1), ref_logp[:, 1].sum(-1)
    return dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1), logp - ref_logp


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_step_zero(path: tuple[str, bool | None], autocast: torch.dtype | None) -> None:
    name, share = path
    policy = tiny.policy(name, torch.float32, share_prefix=share, autocast=autocast)
    assert share is None or policy.share_prefix == share
    losses, ratio = dpo_losses(policy, policy.frozen_copy(), tiny.ragged())
    assert bool((ratio == 0).all())
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)


def test_gradients_reach_every_parameter_and_not_the_copy(path: tuple[str, bool | None]) -> None:
    name, share = path
    policy = tiny.policy(name, torch.float32, share_prefix=share)
    reference, s = policy.frozen_copy(), tiny.ragged()
    before = tiny.score(reference, s).clone()
    assert not list(reference.parameters()) and not before.requires_grad
    losses, _ = dpo_losses(policy, reference, s)
    losses.mean().backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), key
    assert all(p.grad is None for p in reference.model.parameters())

    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    assert torch.equal(tiny.score(reference, s), before)
    losses, ratio = dpo_losses(policy, reference, s)
    assert bool((ratio[s.mask] != 0).all())
    assert float(losses.detach().mean()) < math.log(2)


def test_parameters_are_named_once_though_tied() -> None:
    names = [name for name, _ in tiny.policy("llama_tied").named_parameters()]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names


def test_dropout_is_off() -> None:
    model, s = tiny.make("gpt2"), tiny.ragged()
    assert model.training and model.config.resid_pdrop == 0.1
    policy = Transformer(model, end_ids=[tiny.END])
    assert torch.equal(tiny.score(policy, s), tiny.score(policy, s))
    assert not policy.frozen_copy().model.training
    assert not policy.with_model(tiny.make("gpt2")).model.training


def test_another_model_as_reference_is_looked_at_anew() -> None:
    """Its head and its attention may not allow what the policy's do."""
    policy, s = tiny.policy("llama"), tiny.ragged()
    for name in ("gemma2", "bloom", "mistral", "llama"):
        reference = policy.with_model(tiny.make(name, seed=1))
        alone = Transformer(tiny.make(name, seed=1), end_ids=[tiny.END], share_prefix=False)
        scored = tiny.score(reference, s)
        assert not scored.requires_grad and not list(reference.parameters())
        torch.testing.assert_close(scored, tiny.score(alone, s).detach(), rtol=0, atol=1e-6)


# --- KL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ref_name"),
    [("llama", "llama"), ("gpt2", "gpt2"), ("llama", "gemma2"), ("gemma2", "llama"),
     ("llama", "mistral"), ("mistral", "llama")],
)  # fmt: skip
def test_step_kl_sums_over_the_whole_vocabulary(name: str, ref_name: str) -> None:
    policy, s = tiny.policy(name), tiny.ragged()
    reference = policy.with_model(tiny.make(ref_name, seed=1))
    kl = policy.step_kl(reference, s)
    assert not kl[~s.mask].any() and not kl.requires_grad
    for i, k, prompt, response in tiny.unpadded(s):
        p = tiny.next_log_probs(policy.model, prompt, response)
        q = tiny.next_log_probs(reference.model, prompt, response)
        direct = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(kl[i, k, : len(response)], direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_step_kl_of_a_copy_is_zero_and_wide_under_autocast(name: str) -> None:
    policy = tiny.policy(name, torch.float32, autocast=torch.bfloat16)
    kl = policy.step_kl(policy.frozen_copy(), tiny.ragged())
    assert kl.dtype == torch.float32 and not kl.any()


def test_step_kl_estimates_the_sequence_kl_without_bias() -> None:
    """Over all responses of at most three tokens of a vocabulary of four (0 ends)."""
    policy, reference = (
        Transformer(tiny.make("llama", seed=i, vocab_size=4, pad_token_id=0), end_ids=[0])
        for i in (0, 1)
    )
    every = [
        list(r)
        for length in (1, 2, 3)
        for r in itertools.product(range(4), repeat=length)
        if 0 not in r[:-1] and (length == 3 or r[-1] == 0)
    ]
    s = tiny.samples([[1, 2, 3]], [every])
    logp, ref_logp = (tiny.score(p, s).detach().sum(-1) for p in (policy, reference))
    probability = logp.exp()
    assert float(probability.sum()) == pytest.approx(1)
    exact = float((probability * (logp - ref_logp)).sum())
    assert exact > 0.1
    steps = policy.step_kl(reference, s).sum(-1)
    assert float((probability * steps).sum()) == pytest.approx(exact, abs=1e-10)
