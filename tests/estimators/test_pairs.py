"""CHES of pairs, and reference against reward within prompts."""

import itertools
import math

import numpy as np
import pytest
import torch
from enumerable import gen, holds, normal, population, prompts, sample
from torch import Tensor

from preftune.estimators.displacement import ches
from preftune.estimators.estimate import Estimate
from preftune.estimators.misalignment import grade_covariances, misalignment, peak_depth

P = population()


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def ints(*x: int) -> Tensor:
    return torch.tensor(x)


def test_ches_by_hand() -> None:
    """H⁺ = (2, 4), H⁻ = (3, 3), 2 and 3 tokens: 18 - 20 = -2; 18/6 - 20/4 = -2. Equal: 0."""
    chosen, rejected = f64(2, 4, 1, 1).view(2, 2), f64(3, 3, 1, 1).view(2, 2)
    found = ches(chosen, rejected, ints(2, 5), ints(3, 5))
    assert found.ches.tolist() == [-2, 0] and found.ln_ches.tolist() == pytest.approx([-2, 0])


def test_ches_quantiles_need_pairs_beyond_them() -> None:
    g = gen(0)
    one = torch.ones(60, dtype=torch.long)
    found = ches(normal(g, 60, 3), normal(g, 60, 3), one, one)
    assert found.quantiles[0.5].trusted and found.quantiles[0.25].trusted
    assert found.quantiles[0.95].value is None and "100 are needed" in found.quantiles[0.95].note


def test_ches_quantile_is_held() -> None:
    """H⁺ = 1 and H⁻ = x uniform in (0, 1): ln-CHES is x - 1, its upper quartile -.25."""

    def estimate(g: torch.Generator) -> Estimate:
        x = torch.rand(60, 1, generator=g, dtype=torch.float64)
        one = torch.ones(60, dtype=torch.long)
        return ches(torch.ones_like(x), x, one, one, (0.75,)).quantiles[0.75]

    holds(estimate, -0.25)


def plain_spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of average ranks, as everyone computes it."""

    def ranks(x: Tensor) -> np.ndarray:
        return ((x[None] < x[:, None]).sum(1) + ((x[None] == x[:, None]).sum(1) + 1) / 2).numpy()

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def kendall(a: Tensor, b: Tensor) -> float:
    pairs = itertools.combinations(range(len(a)), 2)
    return float(np.mean([float(torch.sign((a[i] - a[j]) * (b[i] - b[j]))) for i, j in pairs]))


def test_grade_covariances_are_spearmans_without_its_pull() -> None:
    """Without ties c_aa = 1/3, and (m + 1) ρ_plain = (m - 2) ρ + 3 τ."""
    g = gen(0)
    a, b = normal(g, 2, 9)
    c = grade_covariances(torch.stack([a, b]))
    assert c.diagonal().tolist() == pytest.approx([1 / 3, 1 / 3])
    rho = float(3 * c[0, 1])
    assert 10 * plain_spearman(a, b) == pytest.approx(7 * rho + 3 * kendall(a, b))


def test_grade_covariances_by_all_triples() -> None:
    a, b = f64(1, 2, 2, 5, 3), f64(2, 2, 1, 4, 0)
    triples = itertools.permutations(range(5), 3)
    terms = [float(torch.sign(a[i] - a[j]) * torch.sign(b[i] - b[k])) for i, j, k in triples]
    found = grade_covariances(torch.stack([a, b]))[0, 1].item()
    assert found == pytest.approx(sum(terms) / len(terms))


def exact_correlations() -> tuple[float, float]:
    """Spearman's ρ of (s, r) and the partial one, by sums over all responses of all prompts."""
    p = P.log_ref.exp()
    grades = []
    for x in (P.log_ref, P.reward, P.length.double()):
        grades.append((torch.sign(x[:, :, None] - x[:, None, :]) * p[:, None, :]).sum(-1))
    c = torch.stack([torch.stack([(p * a * b).sum(-1).mean() for b in grades]) for a in grades])
    sd = c.diagonal().sqrt()
    rho = (c / sd[:, None] / sd[None]).tolist()
    sr, sl, rl = rho[0][1], rho[0][2], rho[1][2]
    return sr, (sr - sl * rl) / math.sqrt((1 - sl**2) * (1 - rl**2))


@pytest.mark.parametrize("which", ["spearman", "partial"])
def test_correlations_are_held(which: str) -> None:
    exact = exact_correlations()[which == "partial"]
    assert 0.1 < abs(exact) < 0.9

    def estimate(g: torch.Generator) -> Estimate:
        i = prompts(g, len(P.reward), 60)
        y = sample(g, P.log_ref[i], 8)
        parts = (x[i].gather(1, y) for x in (P.log_ref, P.reward, P.length))
        return getattr(misalignment(*parts), which)

    holds(estimate, exact)


def test_length_explains_what_it_explains() -> None:
    """s and r both fall with length, and have nothing else in common."""
    g = gen(0)
    length = torch.randint(1, 50, (80, 16), generator=g)
    s = -1.0 * length + 2 * normal(g, 80, 16)
    r = -1.0 * length + 8 * normal(g, 80, 16)
    found = misalignment(s, r, length)
    assert found.spearman.low is not None and found.spearman.low > 0.7
    assert found.partial.value == pytest.approx(0, abs=0.1)


def test_prompts_are_not_pooled() -> None:
    """Over all prompts s and r rise together; within each they fall."""
    g = gen(0)
    prompt = 20 * normal(g, 60, 1)
    x = normal(g, 60, 8)
    length = torch.randint(1, 50, (60, 8), generator=g)
    assert misalignment(prompt + x, prompt - x, length).spearman.value == pytest.approx(-1)


def test_peak_depth_by_hand() -> None:
    """s = (-1, -2, -3, -6): mean -3, sd 2.1602. Best is the last: 1.3887; two best, the second and
    the last: (-3 + 4) / sd; all the same: none."""
    s = f64(-1, -2, -3, -6).expand(2, 4)
    r = f64(0, 1, 2, 3, 0, 3, 1, 3).view(2, 4)
    assert peak_depth(s, r).tolist() == pytest.approx([1.3887, 0.4629], abs=1e-4)
    assert peak_depth(torch.ones(1, 4), torch.rand(1, 4)).isnan().all()


def test_too_little_to_rank() -> None:
    g = gen(0)
    length = torch.randint(1, 50, (40, 8), generator=g)
    s, r = normal(g, 40, 8), normal(g, 40, 8)
    assert misalignment(s, r, length).spearman.trusted
    for found in (
        misalignment(s[:, :2], r[:, :2], length[:, :2]),
        misalignment(s, torch.ones_like(r), length),
        misalignment(s[:8], r[:8], length[:8]),
        misalignment(torch.full((40, 8), 0.1), r, length),  # whose float32 mean is not 0.1
    ):
        assert found.spearman.value is None and "cannot tell" in found.spearman.note
