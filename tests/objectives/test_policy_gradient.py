"""Numbers and identities of REINFORCE, PPO's clipped loss and its value loss."""

import math

import pytest
import torch

from preftune import objectives as o


def test_reinforce_by_hand() -> None:
    """Advantages 2 and -1 on log-probs -3 and -0.5: -2·-3 = 6, 1·-0.5 = -0.5."""
    loss = o.reinforce(torch.tensor([-3.0, -0.5]), torch.tensor([2.0, -1.0]))
    assert loss.tolist() == [6.0, -0.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_ppo_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """Clip 0.2, so the clipped ratio lies in [0.8, 1.2]; d ratio / d logp = ratio.

    ratio 1.1, A  2: min(2.2, 2.2) = 2.2, loss -2.2, gradient -2.2 (inside)
    ratio 1.5, A  2: min(3, 2.4) = 2.4, loss -2.4, gradient 0 (gain is capped)
    ratio 0.5, A  2: min(1, 1.6) = 1, loss -1, gradient -1 (a loss is never capped)
    ratio 1.5, A -2: min(-3, -2.4) = -3, loss 3, gradient 3 (a loss is never capped)
    ratio 0.5, A -2: min(-1, -1.6) = -1.6, loss 1.6, gradient 0 (gain is capped)
    ratio 0.9, A -2: min(-1.8, -1.8) = -1.8, loss 1.8, gradient 1.8 (inside)
    """
    logp_old = torch.tensor([-1.0], dtype=torch.float64)
    logp = (logp_old + math.log(ratio)).requires_grad_()
    out = o.ppo_clip(logp, logp_old, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    out.backward()
    assert logp.grad is not None
    assert out.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_ppo_clip_at_ratio_one_has_the_gradient_of_reinforce() -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(16, generator=generator, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(16, generator=generator, dtype=torch.float64)
    (ppo,) = torch.autograd.grad(o.ppo_clip(logp, logp.detach(), advantage, clip=0.2).sum(), [logp])
    (reinforce,) = torch.autograd.grad(o.reinforce(logp, advantage).sum(), [logp])
    torch.testing.assert_close(ppo, reinforce, rtol=0, atol=1e-14)


def test_ppo_clip_survives_an_overflowing_ratio() -> None:
    """A log-ratio of 200 at advantage 0, where exp overflows float32, gives 0 and not NaN."""
    logp = torch.tensor([0.0], requires_grad=True)
    loss = o.ppo_clip(logp, torch.tensor([-200.0]), torch.tensor([0.0]), clip=0.2)
    loss.backward()
    assert logp.grad is not None
    assert loss.item() == 0 and logp.grad.item() == 0


@pytest.mark.parametrize(
    ("value", "value_old", "target", "loss", "gradient"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),
        (2.0, 1.0, 3.0, 1.62, 0.0),
        (2.0, 1.0, 0.0, 2.0, 2.0),
    ],
)
def test_value_clip_by_hand(
    value: float, value_old: float, target: float, loss: float, gradient: float
) -> None:
    """Clip 0.2; the gradient of the unclipped branch is value - target, thanks to the 0.5.

    1.1 from 1.0 (inside), target 2: 0.5·0.9² = 0.405, gradient -0.9
    2.0 from 1.0, clipped to 1.2, target 3: 0.5·max(1², 1.8²) = 1.62, gradient 0
    2.0 from 1.0, clipped to 1.2, target 0: 0.5·max(2², 1.2²) = 2, gradient 2
    """
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    old, goal = (torch.tensor(x, dtype=torch.float64) for x in (value_old, target))
    out = o.value_clip(v, old, goal, clip=0.2)
    out.backward()
    assert v.grad is not None
    assert out.item() == pytest.approx(loss, abs=1e-12)
    assert v.grad.item() == pytest.approx(gradient, abs=1e-12)
