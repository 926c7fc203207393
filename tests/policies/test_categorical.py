"""The table of logits: everything about it is known exactly."""

import pytest
import torch
from torch import Tensor

from preftune.numerics import uniform
from preftune.policies.base import Policy
from preftune.policies.categorical import Categorical

STATES, ARMS = 3, 5


def table(seed: int, runs: tuple[int, ...] = ()) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*runs, STATES, ARMS, generator=g, dtype=torch.float64)


def prompts(*runs: int) -> tuple[Tensor, Tensor]:
    prompt = torch.tensor([[2], [0], [2], [1]]).expand(*runs, 4, 1)
    return prompt, torch.ones_like(prompt, dtype=torch.bool)


@pytest.mark.parametrize("runs", [(), (2,)])
def test_score_is_the_log_softmax_of_the_state(runs: tuple[int, ...]) -> None:
    logits = table(0, runs)
    policy = Categorical(logits)
    assert isinstance(policy, Policy) and policy.batch_shape == runs
    prompt, prompt_mask = prompts(*runs)
    tokens = torch.arange(4 * 2).view(4, 2, 1).remainder(ARMS).expand(*runs, 4, 2, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    scored = policy.score(prompt, prompt_mask, tokens, mask)
    expected = logits.log_softmax(-1)[..., prompt.reshape(-1, 4)[0], :]
    for i in range(4):
        for k in range(2):
            arm = int(tokens.reshape(-1, 4, 2)[0, i, k])
            torch.testing.assert_close(scored[..., i, k, 0].detach(), expected[..., i, arm])
    mask = mask.clone()
    mask[..., 1, 0, 0] = False
    assert not policy.score(prompt, prompt_mask, tokens, mask)[..., 1, 0, 0].any()


def test_samples_follow_the_distribution() -> None:
    policy = Categorical(table(0))
    count = 20000
    drawn = policy.sample(
        torch.tensor([[1]]),
        torch.tensor([[True]]),
        count,
        lambda t, shape: uniform(5, t, torch.arange(shape[-1])).expand(shape),
        7,
    )
    counts = torch.bincount(drawn.tokens.flatten(), minlength=ARMS)
    p = table(0).softmax(-1)[1]
    assert float(((counts - count * p) ** 2 / (count * p)).sum()) < 18.5  # 99.9 %, 4 degrees
    assert drawn.logp is not None
    scored = policy.score(drawn.prompt, drawn.prompt_mask, drawn.tokens, drawn.mask)
    assert torch.equal(drawn.logp, scored.detach())
    assert bool(drawn.finished.all()) and bool((drawn.origin == 7).all())


def test_a_response_does_not_depend_on_those_beside() -> None:
    policy = Categorical(table(0))
    prompt, prompt_mask = prompts()

    def draw(rows: list[int], count: int) -> Tensor:
        index = torch.tensor(rows)

        def stream(t: int, shape: tuple[int, ...]) -> Tensor:
            return uniform(1, t, index[:, None], torch.arange(shape[-1]))

        return policy.sample(prompt[index], prompt_mask[index], count, stream, 0).tokens

    assert torch.equal(draw([3, 1], 6), draw([0, 1, 2, 3], 40)[[3, 1], :6])


def test_step_kl_is_the_exact_expectation() -> None:
    policy, reference = Categorical(table(0)), Categorical(table(1))
    prompt, prompt_mask = prompts()
    tokens = torch.arange(ARMS).view(1, ARMS, 1).expand(4, ARMS, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logp = policy.score(prompt, prompt_mask, tokens, mask).detach()[..., 0]
    ref_logp = reference.score(prompt, prompt_mask, tokens, mask).detach()[..., 0]
    exact = (logp.exp() * (logp - ref_logp)).sum(-1)  # over every arm
    drawn = policy.sample(
        prompt, prompt_mask, 3, lambda t, shape: uniform(0, t, torch.arange(12)).view(shape), 0
    )
    kl = policy.step_kl(reference, drawn)
    torch.testing.assert_close(kl, exact[:, None, None].expand(4, 3, 1))
    assert not kl.requires_grad


def test_a_frozen_copy_stays() -> None:
    policy = Categorical(table(0))
    copy = policy.frozen_copy()
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        policy.logits.add_(torch.randn_like(policy.logits))
    assert torch.equal(copy.logits, table(0))
    assert [name for name, _ in policy.named_parameters()] == ["logits"]
