"""KL, coverage profile, log C and the offline gap against their exact values."""

import math

import pytest
import torch
from enumerable import gen, holds, normal, population, prompts, sample, uniform
from torch import Tensor

from preftune.estimators import divergence
from preftune.estimators.estimate import Estimate
from preftune.theory import coverage
from preftune.theory.closed_form import kl, tilted

P = population(shift=0.8)
KINDS = len(P.reward)


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def own(g: torch.Generator, count: int, k: int, p: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    i = prompts(g, len(p), count)
    y = sample(g, p[i], k)
    return p[i].gather(1, y), ref[i].gather(1, y)


def test_by_hand() -> None:
    """l = (1, 3), (0, 2): mean 1.5; log mean e^l = log((2.718 + 20.086 + 1 + 7.389) / 4) = 2.054,
    which two prompts cannot carry; l >= log 4 = 1.386 in two of four."""
    logp, ref = f64(-1, -1, -2, -1).view(2, 2), f64(-2, -4, -2, -3).view(2, 2)
    assert divergence.reverse_kl(logp, ref).value == 1.5
    assert divergence.coverage_profile(logp, ref, (4.0,)).shares[0].value == 0.5
    found = divergence.log_concentrability(logp, ref)
    assert found.log_c.value is None and found.largest_share == pytest.approx(20.086 / 31.193, 1e-3)
    token_kl, mask = f64(1, 2, 3, 9).view(2, 1, 2), torch.tensor([[[True, True]], [[True, False]]])
    assert divergence.reverse_kl_by_tokens(token_kl, mask).value == 3.0
    gap = divergence.offline_gap(logp, ref, f64(-1, -3), f64(-3, -5))
    assert gap.value == pytest.approx(((2 + 2) + (1 + 4)) / 2)


def test_kl_is_held() -> None:
    exact = kl(P.log_policy, P.log_ref).mean().item()
    holds(lambda g: divergence.reverse_kl(*own(g, 40, 4, P.log_policy, P.log_ref)), exact)


def test_kl_by_tokens_is_held_and_narrower() -> None:
    """Three tokens of six values: 216 responses, each token's distribution given all before."""
    g = gen(3)
    tables = [[normal(g, 6**t, 6).log_softmax(-1) for t in range(3)] for _ in range(2)]
    flat = [
        (a[0][0][:, None, None] + a[1][:, :, None] + a[2].view(6, 6, 6)).flatten() for a in tables
    ]
    exact = kl(flat[0], flat[1]).item()
    by_token = [kl(p, q) for p, q in zip(*tables, strict=True)]

    def both(g: torch.Generator) -> tuple[Estimate, Estimate]:
        y = sample(g, flat[0].expand(40, -1), 4)
        token = torch.stack(
            [by_token[0][0].expand_as(y), by_token[1][y // 36], by_token[2][y // 6]], -1
        )
        rao = divergence.reverse_kl_by_tokens(token, torch.ones_like(token, dtype=torch.bool))
        return divergence.reverse_kl(flat[0][y], flat[1][y]), rao

    holds(lambda g: both(g)[0], exact)
    holds(lambda g: both(g)[1], exact)
    k1, rao = both(gen(0))
    assert k1.high is not None and k1.low is not None
    assert rao.high is not None and rao.low is not None
    assert rao.high - rao.low < 0.6 * (k1.high - k1.low)


def test_by_tokens_is_not_always_narrower() -> None:
    """π is the reference without one of four responses: l = log 4/3 always, the tokens not."""
    second = kl(f64(0.0, 1.0).log(), f64(0.5, 0.5).log()).item()
    first = kl(f64(1 / 3, 2 / 3).log(), f64(0.5, 0.5).log()).item()
    sums = f64(first + second, first, first)  # of the three responses that are left
    assert sums.mean().item() == pytest.approx(math.log(4 / 3)) and sums.std() > 0.3


def test_a_kl_below_zero_is_refused() -> None:
    """Samples of the reference scored as the policy's own: the mean is -KL(ref, policy)."""
    logp, ref = own(gen(0), 200, 4, P.log_ref, P.log_policy)
    found = divergence.reverse_kl(ref, logp)
    assert found.value is None and "no KL is" in found.note


@pytest.mark.parametrize("level", [2.0, 4.0, 8.0])
def test_profile_is_held(level: float) -> None:
    """At 8 one response in a hundred: most draws see none or one prompt with it."""
    p = population(shift=1.1)
    exact = coverage.coverage_profile(p.log_policy, p.log_ref, level).mean().item()

    def estimate(g: torch.Generator) -> Estimate:
        pair = own(g, 50, 4, p.log_policy, p.log_ref)
        return divergence.coverage_profile(*pair, (level,)).shares[0]

    assert exact > 0.005
    holds(estimate, exact)


def test_kl_bounds_the_profile() -> None:
    """On random pairs of policies, exactly and as estimated."""
    g = gen(5)
    p = (3 * normal(g, 300, 12) * uniform(g, 300, 1)).log_softmax(-1)
    q = (3 * normal(g, 300, 12) * uniform(g, 300, 1)).log_softmax(-1)
    for level in divergence.LEVELS:
        exact = coverage.coverage_profile(p, q, level)
        assert (exact <= coverage.profile_bound(kl(p, q), level) + 1e-12).all()
    found = divergence.coverage_profile(*own(g, 300, 4, p, q))
    assert found.levels[0] == 4 and found.levels[-1] == 2**20
    values = [one.value for one in found.shares]
    assert all(v is not None and v <= b for v, b in zip(values, found.bounds, strict=True))
    assert values == sorted(values, reverse=True) and found.bounds[-1] < 1


def test_a_response_without_mass_is_never_covered() -> None:
    logp = torch.full((30, 2), -1.0)
    ref = logp.clone()
    ref[:, 0] = -torch.inf
    found = divergence.coverage_profile(logp, ref)
    assert {one.value for one in found.shares} == {0.5} and set(found.bounds) == {1.0}
    assert "infinite" in divergence.log_concentrability(logp, ref).log_c.note


def test_log_c_is_held() -> None:
    exact = coverage.chi2_concentrability(P.log_policy, P.log_ref).mean().log().item()

    def estimate(g: torch.Generator) -> Estimate:
        return divergence.log_concentrability(*own(g, 100, 8, P.log_policy, P.log_ref)).log_c

    holds(estimate, exact, trusted=0.8)


def test_heavy_weights_give_a_bound() -> None:
    """l = a x exponential: e^l is Pareto with k = a. The log of its mean, -log(1 - a), is infinite
    from a = 1 on; below the bound is a, the KL."""

    def found(a: float) -> divergence.Concentrability:
        ratio = -a * uniform(gen(1), 200, 8).log()
        return divergence.log_concentrability(ratio, torch.zeros_like(ratio))

    light, heavy = found(0.3), found(1.5)
    assert light.log_c.trusted and light.log_c.value == pytest.approx(-math.log(0.7), abs=0.03)
    assert light.k_hat == pytest.approx(0.3, abs=0.15)
    assert heavy.k_hat == pytest.approx(1.5, abs=0.4)
    low = heavy.log_c.low
    assert heavy.log_c.value is None and low is not None and 1.3 < low < 1.5
    assert "k-hat" in heavy.log_c.note


def test_few_samples_and_one_large_weight_give_a_bound() -> None:
    few, many = torch.zeros(20, 1), torch.zeros(100, 4)
    assert divergence.log_concentrability(few, few).k_hat == math.inf
    many[0, 0] = 6.0
    found = divergence.log_concentrability(many, torch.zeros_like(many))
    assert found.largest_share > 0.4 and not found.log_c.trusted


def test_bounds_hold() -> None:
    """A policy far from the reference: what is given is below the exact value every time."""
    far = tilted(P.log_ref, P.reward - 2 * P.log_ref, 0.7)
    exact = coverage.chi2_concentrability(far, P.log_ref).mean().log().item()
    found = [
        divergence.log_concentrability(*own(gen(i), 40, 2, far, P.log_ref)).log_c for i in range(20)
    ]
    bounds = [one.low for one in found if not one.trusted]
    assert len(bounds) == 20 and all(low is not None and 0 < low < exact for low in bounds)


def test_log_c_of_a_far_policy_is_held() -> None:
    """1,600 samples carry a log C of 5.3 and a KL of 3.6."""
    far = tilted(P.log_ref, P.reward - 2 * P.log_ref, 0.7)
    exact = coverage.chi2_concentrability(far, P.log_ref).mean().log().item()
    assert exact > 5
    holds(lambda g: divergence.log_concentrability(*own(g, 200, 8, far, P.log_ref)).log_c, exact)


def test_equal_policies_have_a_ratio_of_one() -> None:
    logp, ref = own(gen(0), 60, 4, P.log_ref, P.log_ref)
    found = divergence.log_concentrability(logp, ref)
    assert found.log_c.value == 0 and found.k_hat == -math.inf


def test_gap_is_held() -> None:
    """Data from the reference: G = KL(π, ref) + KL(ref, π)."""
    exact = (kl(P.log_policy, P.log_ref) + kl(P.log_ref, P.log_policy)).mean().item()

    def estimate(g: torch.Generator) -> Estimate:
        i = prompts(g, KINDS, 40)
        y, data = sample(g, P.log_policy[i], 4), sample(g, P.log_ref[i], 2)
        ratio = (P.log_policy - P.log_ref)[i].gather(1, data)
        pair = P.log_policy[i].gather(1, y), P.log_ref[i].gather(1, y)
        return divergence.offline_gap(*pair, ratio[:, 0], ratio[:, 1])

    holds(estimate, exact)


def test_k_hat_of_known_tails() -> None:
    """Pareto tails of k = ¼, ½, 1 in 4,000 draws; a bounded weight has none."""
    u = uniform(gen(2), 4000)
    for k in (0.25, 0.5, 1.0):
        assert divergence.pareto_k(-k * u.log()) == pytest.approx(k, abs=0.12)
    assert divergence.pareto_k(u.log()) < 0
    tied = torch.cat([torch.zeros(390), torch.full((10,), 3.0)])
    assert divergence.pareto_k(tied) < 0.5
