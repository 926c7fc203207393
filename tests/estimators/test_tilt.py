"""The optimum for a reward, from reference samples: exact values, bounds and the gate."""

import math

import pytest
import torch
from enumerable import Population, gen, holds, normal, population, prompts, sample, uniform
from torch import Tensor

from preftune.estimators import tilt
from preftune.estimators.estimate import Estimate
from preftune.theory.closed_form import kl, tilted
from preftune.theory.coverage import chi2_concentrability

P = population()


def exact(reward: Tensor, beta: float) -> tuple[float, float]:
    star = tilted(P.log_ref, reward, beta)
    c = chi2_concentrability(star, P.log_ref)
    return kl(star, P.log_ref).mean().item(), c.log().mean().item()


def drawn(g: torch.Generator, reward: Tensor, m: int, count: int = 60, p: Population = P) -> Tensor:
    i = prompts(g, len(p.log_ref), count)
    return reward[i].gather(1, sample(g, p.log_ref[i], m))


def test_by_hand() -> None:
    """Rewards (0, 0, 0, log 3) at β = 1: w = (1, 1, 1, 3) / 6, ESS = 36 / 12 = 3,
    KL = log 4 - H(w) = 1.3863 - 1.2425 = .1438, log C = log 4/3. Four samples are too few."""
    r = torch.tensor([0.0, 0.0, 0.0, math.log(3)], dtype=torch.float64).expand(2, 4)
    (kl_hat, log_c), ess = tilt._divergences(r)[0][0].tolist(), tilt._divergences(r)[1]
    assert ess.tolist() == pytest.approx([3, 3])
    assert (kl_hat, log_c) == pytest.approx((0.1438, math.log(4 / 3)), abs=1e-4)
    found = tilt.target_tilt(r, 1.0)
    assert found.ess == pytest.approx(3) and not found.kl.trusted
    assert found.needed == 7  # 5 effective of 3 in 4; e^1.14 is less


def test_jackknife_by_hand() -> None:
    """Two samples: each alone has KL 0, so that the estimate is doubled."""
    z = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert tilt._jackknifed(z)[0].tolist() == pytest.approx(
        (2 * tilt._divergences(z)[0][0]).tolist()
    )


@pytest.mark.parametrize(("m", "beta"), [(8, 3.0), (16, 2.0), (32, 1.0)])
def test_kl_and_log_c_are_held(m: int, beta: float) -> None:
    true_kl, true_c = exact(P.reward, beta)
    holds(lambda g: tilt.target_tilt(drawn(g, P.reward, m), beta).kl, true_kl, trusted=0.8)
    if m == 16:
        holds(
            lambda g: tilt.target_tilt(drawn(g, P.reward, m), 2 * beta).log_c,
            exact(P.reward, 2 * beta)[1],
        )
    assert true_c > true_kl


def test_a_narrow_target_gives_a_bound_not_a_number() -> None:
    """Exact KL above 5, m = 8: the plain number is about log 8, at most 2.08."""
    reward = P.reward - P.log_ref
    true_kl, true_c = exact(reward, 0.15)
    assert true_kl > 5
    found = tilt.target_tilt(drawn(gen(0), reward, 8), 0.15)
    assert found.kl.value is None and found.log_c.value is None
    assert found.kl.low is not None and 1 < found.kl.low < true_kl
    assert found.log_c.low is not None and 1 < found.log_c.low < true_c
    assert "cannot tell with 8 samples" in found.kl.note and found.needed is not None
    assert found.needed >= math.exp(found.kl.low + 1)


@pytest.mark.parametrize("chance", [0.03, 0.3])
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_bounds_hold_for_all_or_nothing_rewards(chance: float, beta: float) -> None:
    """Where plain estimates may be too high as well as too low. A rare good response is in few
    prompts' samples: the others have all 8 effective samples, and say nothing."""
    reward = (uniform(gen(4), *P.reward.shape) < chance).double()
    true_kl = exact(reward, beta)[0]
    for seed in range(15):
        found = tilt.target_tilt(drawn(gen(seed), reward, 8), beta)
        assert not found.kl.trusted and found.kl.low is not None and found.kl.low <= true_kl
        assert chance == 0.3 or found.ess > 5


def test_rewards_that_never_differ_tell_nothing() -> None:
    found = tilt.target_tilt(torch.ones(30, 16), 1.0)
    assert found.kl.value is None and found.kl.low == 0 and found.ess == pytest.approx(16)


def test_one_sample_tells_nothing() -> None:
    assert not tilt.target_tilt(torch.ones(30, 1), 1.0).kl.trusted


def test_the_curve_says_which_betas_are_resolvable() -> None:
    reward = drawn(gen(0), P.reward, 32, 100)
    curve = tilt.tilt_curve(reward, (0.05, 0.2, 0.5, 1.0, 2.0, 4.0))
    trusted = [one.kl.trusted for one in curve]
    assert trusted == sorted(trusted) and trusted[-1] and not trusted[0]
    smallest = tilt.smallest_resolvable(curve)
    assert smallest == curve[trusted.index(True)].beta
    assert all((one.needed is None) == one.kl.trusted for one in curve)
    values = [one.kl.value for one in curve if one.kl.value is not None]
    assert values == sorted(values, reverse=True)
    assert tilt.smallest_resolvable(curve[:1]) is None


def test_scale_and_shift() -> None:
    """Only r / β within a prompt counts."""
    reward = drawn(gen(1), P.reward, 16)
    moved = 3 * reward + 7 * normal(gen(2), 60, 1)
    first, second = tilt.target_tilt(reward, 2.0), tilt.target_tilt(moved, 6.0)
    assert first.kl.value == pytest.approx(second.kl.value or 0, abs=1e-9)


def test_the_estimate_is_an_estimate() -> None:
    assert isinstance(tilt.target_tilt(drawn(gen(0), P.reward, 16), 3.0).kl, Estimate)
