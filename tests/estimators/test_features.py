"""Coverage of features, and the two-sample classifier."""

import math

import pytest
import torch
from enumerable import gen, holds, normal
from torch import Tensor

from preftune.estimators import features
from preftune.estimators.similarity import logistic_ridge, two_sample_auc

WIDTH = 6


def scaled(scale: Tensor, seed: int, count: int, width: int = WIDTH) -> tuple[Tensor, ...]:
    """Features of two policy samples, N(0, 1), and of a pair of the data, N(0, scale²)."""
    g = gen(seed)
    policy = normal(g, count, 2, width) + normal(g, count, 1, width)
    pair = normal(g, count, 2, width) * scale
    return policy, pair[:, 0], pair[:, 1]


def exact(scale: Tensor, ridge: float = 1e-2) -> float:
    """tr(Σ_π M) / tr(Σ_D M), M = (Σ_D + ridge · mean eigenvalue)⁻¹; Σ are diagonal, 2 and 2 scale²,
    on the estimator's scale: each feature over the root mean square of samples and pair."""
    policy, data = torch.ones_like(scale) * 2, 2 * scale**2
    unit = (2 * policy + data) / 3
    policy, data = policy / unit, data / unit
    inverse = 1 / (data + ridge * data.mean())
    return float((policy * inverse).sum() / (data * inverse).sum())


def test_matched_data_have_a_ratio_of_one() -> None:
    found = features.feature_ratio(*scaled(torch.ones(WIDTH), 0, 400))
    assert found.trusted and found.value == pytest.approx(1, abs=0.12), found
    holds(lambda g: features.feature_ratio(*scaled(torch.ones(WIDTH), g.initial_seed(), 60)), 1.0)


def test_other_scales_are_held() -> None:
    """Thin in half of the directions, broad in the others."""
    scale = torch.tensor([0.5, 0.5, 0.7, 1.0, 1.5, 1.5], dtype=torch.float64)
    true = exact(scale)
    assert true > 1.5
    holds(lambda g: features.feature_ratio(*scaled(scale, g.initial_seed(), 200)), true, least=0.8)


def test_a_direction_that_the_data_lack() -> None:
    scale = torch.ones(WIDTH, dtype=torch.float64)
    scale[0] = 0.05
    found = features.feature_ratio(*scaled(scale, 0, 200))
    assert found.low is not None and found.low > 2, found


def test_in_sample_is_biased_where_cross_fitting_is_not() -> None:
    """Twenty features, fifty pairs from the policy itself: the true ratio is 1."""
    out, inside = [], []
    for seed in range(15):
        policy, chosen, rejected = scaled(torch.ones(20), seed, 50, 20)
        out.append(features.feature_ratio(policy, chosen, rejected, width=12).value)
        pairs, own = chosen - rejected, policy[:, 0] - policy[:, 1]
        sigma = pairs.mT @ pairs / 50
        inverse = torch.linalg.inv(sigma + 0.01 * sigma.diagonal().mean() * torch.eye(20))
        inside.append(
            (features._norms(own, inverse).sum() / features._norms(pairs, inverse).sum()).item()
        )
    assert sum(out) / 15 == pytest.approx(1, abs=0.1)
    assert sum(inside) / 15 > 1.4


def test_all_pairs_of_many_samples() -> None:
    """Twice the variance of K samples is the mean over their pairs."""
    g = gen(0)
    policy, chosen, rejected = normal(g, 40, 4, 3), normal(g, 40, 3), normal(g, 40, 3)
    values = []
    for i in range(4):
        for j in range(i):
            values.append((policy[:, i] - policy[:, j]).square().sum(-1))
    deviation = (policy - policy.mean(1, keepdim=True)) * (2 * 4 / 3) ** 0.5
    assert torch.stack(values).mean(0).allclose(deviation.square().sum(-1).mean(-1))
    one = features.feature_ratio(policy, chosen, rejected, width=3)
    assert one.value is not None and 0.6 < one.value < 1.6


def test_gates() -> None:
    parts = scaled(torch.ones(WIDTH), 0, 60)
    few = features.feature_ratio(*(p[:10] for p in parts))
    assert few.value is None and "10 prompts" in few.note
    wide = scaled(torch.ones(40), 0, 60, 40)
    thin = features.feature_ratio(*wide, width=40)
    assert thin.value is None and "30 training pairs for 40 dimensions" in thin.note
    assert features.feature_ratio(*wide).trusted
    same = features.feature_ratio(parts[0], parts[1], parts[1])
    assert same.value is None and "same features" in same.note
    one = parts[1].clone()
    one[0] += 1  # a single pair that differs: the other folds know no scale for it
    assert features.feature_ratio(parts[0], one, parts[1]).value is None


def test_projection_keeps_the_ratio() -> None:
    """Three hundred features, of which the policy moves all and the data half as far."""
    found = features.feature_ratio(*scaled(torch.full((300,), 0.5), 0, 200, 300))
    assert found.value == pytest.approx(4, rel=0.15)


def test_shift_of_a_policy() -> None:
    """Twice the differences are four times the squares, whatever the pairs are."""
    before, chosen, rejected = scaled(torch.ones(WIDTH), 0, 60)
    found = features.feature_shift(before, 2 * before, chosen, rejected)
    assert (found.value, found.low, found.high) == pytest.approx((4, 4, 4))
    few = features.feature_shift(*(p[:10] for p in (before, before, chosen, rejected)))
    assert few.value is None and "10 prompts" in few.note
    still = features.feature_shift(torch.ones_like(before), before, chosen, rejected)
    assert still.value is None and "same features" in still.note


def test_shift_is_the_ratio_of_two_ratios() -> None:
    """Known better than either: what the pairs add to both drops out."""
    scale = torch.linspace(0.5, 2, WIDTH).double()
    before, chosen, rejected = scaled(scale, 0, 200)
    after = before + 0.3 * scaled(scale, 1, 200)[0]
    shift = features.feature_shift(before, after, chosen, rejected, width=WIDTH)
    first, second = (
        features.feature_ratio(x, chosen, rejected, width=WIDTH) for x in (before, after)
    )
    assert first.value and second.value and shift.value
    assert shift.value == pytest.approx(second.value / first.value, rel=0.02)
    assert shift.value == pytest.approx(1.09, abs=0.05)
    assert shift.low and shift.high and second.low and second.high
    assert shift.high - shift.low < 0.5 * (second.high - second.low)


def shifted(g: torch.Generator, shift: float, count: int = 80) -> tuple[Tensor, Tensor]:
    prompt = 5 * normal(g, count, 1, WIDTH)
    policy, data = normal(g, count, 3, WIDTH), normal(g, count, 2, WIDTH)
    policy[..., 0] += shift
    return policy + prompt, data + prompt


def test_auc_of_equal_distributions_is_half() -> None:
    holds(lambda g: two_sample_auc(*shifted(g, 0.0)), 0.5)


def test_auc_of_a_shift_is_nearly_the_best() -> None:
    """Of N(δ, 1) against N(0, 1), Φ(δ / √2): .8556 at δ = 1.5; the fit loses a little of it. What
    prompts have in common is many times larger and does not help or harm."""
    best = 0.5 * (1 + math.erf(1.5 / 2))
    found = two_sample_auc(*shifted(gen(0), 1.5, 300))
    assert found.value == pytest.approx(best, abs=0.03) and best == pytest.approx(0.8556, abs=1e-4)
    assert found.high is not None and found.low is not None and found.high - found.low < 0.08
    assert two_sample_auc(*shifted(gen(1), 30.0)).value == 1.0
    few = two_sample_auc(*shifted(gen(0), 1.5, 10))
    assert few.value is None and "10 prompts" in few.note


def test_auc_does_not_lose_what_varies_more_between_prompts() -> None:
    """The one telling feature varies a hundred times more between prompts than within them."""
    policy, data = shifted(gen(2), 1.5, 200)
    far = 100 * normal(gen(3), 200, 1, WIDTH) * (torch.arange(WIDTH) == 0)
    found = two_sample_auc(policy + far, data + far).value
    assert found == pytest.approx(two_sample_auc(policy, data).value, abs=0.01)
    assert found is not None and found > 0.8


def test_in_sample_auc_would_be_too_high() -> None:
    """Sixty features and equal distributions: fitted on what it scores, the classifier 'works'."""
    x = normal(gen(0), 200, 60)
    label = (torch.arange(200) < 100).double()
    score = x @ logistic_ridge(x, label, 1e-2)
    inside = (score[:100, None] > score[None, 100:]).double().mean()
    out = two_sample_auc(x[:100, None], x[100:, None])
    assert inside > 0.8
    assert out.low is not None and out.high is not None and out.low < 0.5 < out.high


def test_logistic_by_hand() -> None:
    """One feature ±1, 3 of 4 right in either class: w = log 3 without ridge, and its gradient is 0
    with one."""
    x = torch.tensor([1.0, 1, 1, -1, -1, -1, -1, 1], dtype=torch.float64)[:, None]
    label = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    assert logistic_ridge(x, label, 1e-12).item() == pytest.approx(math.log(3))
    w = logistic_ridge(x, label, 0.1).item()
    assert 0.75 - 1 / (1 + math.exp(-w)) == pytest.approx(0.1 * w)
