"""Coverage constants are the suprema they claim to be, and every bound holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.theory import coverage
from preftune.theory.closed_form import kl, tilted

BATCH = 200
many = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sizes = st.integers(2, 9)
betas = st.floats(0.05, 5)


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, *shape, generator=gen, dtype=torch.float64)


def policies(seed: int, arms: int, count: int) -> list[Tensor]:
    """Log-probs [BATCH, arms] each, from nearly uniform to nearly deterministic."""
    drawn = normal(seed, count, arms) * normal(seed + 1, count, 1).abs() * 2
    return list(drawn.log_softmax(-1).unbind(1))


def test_by_hand() -> None:
    """π_ref = (½, ¼, ¼), π = (¼, ¾, 0): C_glo 4, max ratio 3, E[π/π_ref] = ⅛ + 9/4 = 19/8, and the
    share with π/π_ref ≥ 2 is ¾. An uncovered arm makes them infinite, an unused one does not."""
    ref, p = f64(0.5, 0.25, 0.25).log(), f64(0.25, 0.75, 0.0).log()
    assert coverage.global_coverage(ref).item() == pytest.approx(4)
    assert coverage.max_ratio(p, ref).item() == pytest.approx(3)
    assert coverage.chi2_concentrability(p, ref).item() == pytest.approx(19 / 8)
    assert coverage.coverage_profile(p, ref, 2.0).item() == pytest.approx(0.75)
    assert coverage.global_coverage(p).item() == math.inf
    assert coverage.max_ratio(ref, p).item() == math.inf
    assert coverage.chi2_concentrability(ref, p).item() == math.inf
    assert coverage.max_ratio(p, p).item() == coverage.chi2_concentrability(p, p).item() == 1


def test_global_is_infinite_where_local_is_not() -> None:
    """π_ref = (½, ½, 0): C_glo = ∞, but C_ε = 2 q with kl(q ‖ ½) = ε, at most 2 = 1 / min_supp."""
    ref = f64(0.5, 0.5, 0.0).log()
    eps = coverage.binary_kl(f64(0.75), f64(0.5))[0]
    assert coverage.global_coverage(ref).item() == math.inf
    assert coverage.local_coverage(ref, eps).item() == pytest.approx(1.5, abs=1e-7)
    assert coverage.local_coverage(ref, 50 * eps).item() == 2
    assert coverage.local_coverage(ref, 0 * eps).item() == pytest.approx(1, abs=1e-7)


def test_local_coverage_is_vacuous_for_rare_events() -> None:
    """At ε = .1 the best ratio grows without limit as p falls; ε / log(1/p) is but the
    order of q: .0072 at p = 1e−6, where q = .0119."""
    p = f64(*(10.0**-k for k in range(1, 13)))
    ratio = coverage.best_event_mass(p, torch.full_like(p, 0.1)) / p
    assert (ratio[1:] > 3 * ratio[:-1]).all() and ratio[-1] > 1e9
    assert ratio[5].item() * 1e-6 == pytest.approx(0.0119, abs=1e-4)


@given(seeds, sizes)
@many
def test_constants_are_suprema(seed: int, arms: int) -> None:
    """1 ≤ e^KL ≤ 1 + χ² ≤ max ratio ≤ C_glo, and the point mass on the rarest arm attains C_glo."""
    p, ref = policies(seed, arms, 2)
    chi2, ratio = coverage.chi2_concentrability(p, ref), coverage.max_ratio(p, ref)
    slack = 1 + 1e-12
    assert (kl(p, ref).exp() <= chi2 * slack).all() and (chi2 <= ratio * slack).all()
    assert (ratio <= coverage.global_coverage(ref) * slack).all()
    torch.testing.assert_close(chi2, (p.exp() ** 2 / ref.exp()).sum(-1), rtol=1e-12, atol=0)
    rarest = torch.nn.functional.one_hot(ref.argmin(-1), arms).double().log()
    attained = coverage.max_ratio(rarest, ref)
    torch.testing.assert_close(attained, coverage.global_coverage(ref), rtol=1e-12, atol=0)


@given(seeds, sizes)
@many
def test_no_policy_in_the_ball_exceeds_local_coverage(seed: int, arms: int) -> None:
    """At ε = KL of a random policy, neither an event nor a ratio of that policy exceeds the best;
    the two-point policy has the KL stated and attains the constant; q lies in its bracket."""
    p, ref = policies(seed, arms, 2)
    eps = kl(p, ref)
    local = coverage.local_coverage(ref, eps)
    assert (coverage.max_ratio(p, ref) <= local * (1 + 1e-9) + 1e-6).all()
    event = normal(seed + 2, arms) > 0
    mass, ours = (x.exp().where(event, 0.0).sum(-1).clamp(0, 1) for x in (ref, p))
    best = coverage.best_event_mass(mass, eps)
    assert (ours <= best + 1e-7).all()
    rare, index = ref.exp().min(-1)
    q = coverage.best_event_mass(rare, eps)
    hit = torch.nn.functional.one_hot(index, arms).bool()
    rest = ref + torch.log1p(-q)[:, None] - torch.log1p(-rare)[:, None]
    two_point = q.log()[:, None].where(hit, rest)
    whole = eps >= -rare.log()
    torch.testing.assert_close(kl(two_point, ref)[~whole], eps[~whole], rtol=1e-9, atol=1e-9)
    assert (kl(two_point, ref) <= eps + 1e-9).all()
    torch.testing.assert_close(coverage.max_ratio(two_point, ref), local, rtol=1e-9, atol=0)
    bound = 1 / -rare.log()
    assert (q >= eps.minimum(-rare.log()) * bound - 1e-12).all()
    assert (q <= (eps + math.log(2)) * bound + 1e-12).all()


@given(seeds, sizes, st.floats(1.01, 200))
@many
def test_profile_bound(seed: int, arms: int, level: float) -> None:
    """P[π/π_ref ≥ N] never exceeds (KL + 1/e) / log N, and is 1 at N → 0."""
    p, ref = policies(seed, arms, 2)
    profile = coverage.coverage_profile(p, ref, level)
    assert (profile <= coverage.profile_bound(kl(p, ref), level) + 1e-12).all()
    assert ((coverage.coverage_profile(p, ref, 1e-300) - 1).abs() < 1e-12).all()
    direct = p.exp().where((p - ref) >= math.log(level), 0.0).sum(-1)
    assert torch.equal(profile, direct)


def test_profile_bound_is_nearly_tight() -> None:
    """A policy that is certain of an arm of reference mass 1 / N: share 1,
    and the bound 1 + 1/(e log N)."""
    p, ref = f64(1.0, 0.0).log(), f64(1e-9, 1 - 1e-9).log()
    assert coverage.coverage_profile(p, ref, 1e9 * (1 - 1e-9)).item() == 1
    assert coverage.profile_bound(kl(p, ref), 1e9).item() == pytest.approx(1.0178, abs=1e-4)


@given(seeds, sizes, betas)
@many
def test_tilt_bound(seed: int, arms: int, beta: float) -> None:
    """KL ≤ min(R/β, R²/8β²) and max ratio ≤ e^(R/β) for the optimum of any reward."""
    (ref,) = policies(seed, arms, 1)
    reward = normal(seed + 3, arms)
    best = tilted(ref, reward, beta)
    spread = reward.max(-1).values - reward.min(-1).values
    assert (kl(best, ref) <= coverage.tilt_kl_bound(spread, beta) + 1e-12).all()
    assert (coverage.max_ratio(best, ref).log() <= spread / beta + 1e-12).all()


def test_tilt_bound_is_tight_on_both_sides() -> None:
    """Fair coin, R/β → 0: KL → R²/8β². A best arm of reference mass
    e^(20 − R/β): KL → R/β."""
    small = tilted(f64(0.0, 0.0), f64(0.0, 0.01), 1.0)
    bound = coverage.tilt_kl_bound(f64(0.01), 1.0)[0].item()
    assert kl(small, f64(0.5, 0.5).log()).item() == pytest.approx(bound, rel=1e-3)
    large = tilted(f64(-1e5, 0.0), f64(1e5 + 20, 0.0), 1.0)
    bound = coverage.tilt_kl_bound(f64(1e5 + 20), 1.0)[0].item()
    assert kl(large, f64(-1e5, 0.0)).item() == pytest.approx(bound, rel=1e-3)


def test_pair_error_by_hand() -> None:
    """Fair coin, errors (1, 0): half of all pairs differ, by 1, so ½."""
    mu = f64(0.5, 0.5).log()
    assert coverage.pair_error(mu, f64(2.0, 0.0), f64(1.0, 0.0)).item() == pytest.approx(0.5)


@given(seeds, sizes, betas)
@many
def test_optimality_gap(seed: int, arms: int, beta: float) -> None:
    """The lemma for any comparator, exact up to β KL; then its bounds by coverage and error."""
    ref, other, mu = policies(seed, arms, 3)
    reward, estimate = normal(seed + 4, 2, arms).unbind(1)
    hat, star = tilted(ref, estimate, beta), tilted(ref, reward, beta)
    for comparator in (star, other):
        bound = coverage.optimality_gap_bound(comparator, hat, reward, estimate)
        ours, theirs = (coverage.regularised_value(x, ref, reward, beta) for x in (comparator, hat))
        assert (ours - theirs <= bound + 1e-9).all()
        slack = beta * kl(comparator, hat)
        torch.testing.assert_close(bound - slack, ours - theirs, rtol=1e-9, atol=1e-9)
    bound = coverage.optimality_gap_bound(star, hat, reward, estimate)
    error = coverage.pair_error(mu, reward, estimate)
    first, second = (coverage.chi2_concentrability(x, mu) for x in (star, hat))
    assert (bound <= (first * second * error).sqrt() + 1e-9).all()
    worst = torch.maximum(coverage.max_ratio(star, mu), coverage.max_ratio(hat, mu))
    assert (bound <= worst * error.sqrt() + 1e-9).all()


@given(seeds, st.integers(3, 9), st.integers(1, 4))
@many
def test_relative_condition_number(seed: int, arms: int, dim: int) -> None:
    """No direction exceeds it, nor it the squared max ratio; full-rank data differences that miss
    an arm leave it finite; one feature per arm reaches the variance ratio."""
    p, mu = policies(seed, arms, 2)
    features = normal(seed + 5, arms, dim)
    number = coverage.relative_condition_number(p, mu, features)
    well = torch.linalg.cond(coverage._covariance(mu, features)) < 1e6
    for k in range(8):
        w = normal(seed + 6 + k, dim)
        score = (features * w[:, None]).sum(-1)
        zero = torch.zeros_like(score)
        ratio = coverage.pair_error(p, score, zero) / coverage.pair_error(mu, score, zero)
        assert (ratio <= number * (1 + 1e-6))[well].all()
        if dim == 1:
            torch.testing.assert_close(ratio[well], number[well], rtol=1e-6, atol=0)
    assert (number <= coverage.max_ratio(p, mu) ** 2 * (1 + 1e-6))[well].all()


def test_features_cover_where_arms_are_missed() -> None:
    """φ = (½, ½), (0, 1), (1, 0), data on the first two alone (example 6.1): differences run along
    (1, −1), so the point between is covered. Uniform against (½, ½, 0): variances of the position
    (0, −½, ½) are 1/6 and 1/16, ratio 8/3. A feature that the data hold constant gives inf."""
    features = torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    uniform, data = f64(1.0, 1.0, 1.0).log_softmax(-1), f64(0.5, 0.5, 0.0).log()
    number = coverage.relative_condition_number(uniform, data, features)
    assert number.item() == pytest.approx(8 / 3)
    assert coverage.max_ratio(uniform, data).item() == math.inf
    blind = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    assert coverage.relative_condition_number(uniform, data, blind).item() == math.inf
