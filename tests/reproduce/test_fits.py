"""Fits to labelled pairs: their claims, and the solvers by hand and by autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from small_claims import KNOWN, f64, measure
from torch import Tensor

from preftune import objectives as o
from preftune.numerics import stream_keys, uniform
from preftune.reproduce import fits, solvers
from preftune.theory import coverage
from preftune.theory.closed_form import kl, tilted


def test_global_coverage() -> None:
    """DPO is RLHF, falls in proportion to 1/N by the slope of the rows, and IPO does not."""
    found = measure("c3-global-suffices")
    lost: dict[str, Tensor] = {}
    for name in ("DPO", "RLHF", "IPO"):
        mine = [row["suboptimality"] for row in found.rows if row["method"] == name]
        lost[name] = f64(*mine).unflatten(0, (3, 3))
    torch.testing.assert_close(lost["DPO"], lost["RLHF"], rtol=1e-6, atol=1e-12)
    assert (lost["DPO"] > 0).all() and (lost["DPO"][:, 2] < lost["DPO"][:, 0] / 5).all()
    assert (lost["IPO"][:, 2] > 3 * lost["DPO"][:, 2]).all()
    # three sizes a factor 10 apart: the slope is that between the outer two
    slope = (lost["DPO"][:, 2] / lost["DPO"][:, 0]).log() / math.log(100)
    torch.testing.assert_close(found.values[""], slope, rtol=1e-9, atol=0)


def test_fits_to_the_population_are_the_optimum() -> None:
    """On as many pairs as there are, with β that is no power of two; IPO's optimum is another."""
    gen = torch.Generator().manual_seed(0)
    log_ref = torch.randn(2, 5, generator=gen, dtype=torch.float64).log_softmax(-1)
    reward = torch.rand(2, 5, generator=gen, dtype=torch.float64)
    law = solvers.pair_law(log_ref.exp(), reward)
    counts = (1e12 * law).round().long()[:, None]
    policies, gradient = fits._tabular_fits(log_ref[:, None], counts, 0.3)
    best = tilted(log_ref, reward, 0.3)[:, None]
    for name in ("DPO", "RLHF"):
        torch.testing.assert_close(policies[name], best, rtol=0, atol=1e-7)
    assert gradient < 1e-9
    assert (kl(policies["IPO"], best) > 1e-3).all()


def test_the_law_of_pairs_and_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums to one, labels by Bradley-Terry; draws follow it, by chunks as at once."""
    probs, reward = f64(0.5, 0.3, 0.2)[None], f64(0.0, 1.0, -0.5)[None]
    law = solvers.pair_law(probs, reward)
    assert law.sum().item() == pytest.approx(1)
    assert law[0, 1, 0].item() == pytest.approx(2 * 0.5 * 0.3 / (1 + math.exp(-1)))
    assert law[0, 0, 0].item() == pytest.approx(0.25)
    assert law.sum(2)[0, 0].item() + law.sum(1)[0, 0].item() == pytest.approx(1)
    keys, both = stream_keys([4, 5], "pairs"), law.expand(2, 3, 3)
    monkeypatch.setattr(solvers, "CHUNK", 700)
    counts = solvers.count_pairs(keys, both, [1500, 20000])
    drawn = solvers.draw_pairs(keys, both, 0, 20000)
    for i in range(2):
        for k, size in enumerate((1500, 20000)):
            expected = [int((drawn[i, :size] == cell).sum()) for cell in range(9)]
            assert counts[i, k].flatten().tolist() == expected
    assert not torch.equal(drawn[0], drawn[1])
    error = (counts[:, 1] / 20000 - law).abs()
    assert (error < 4 * (law / 20000).sqrt()).all()


def losses(beta: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"dpo": fits._dpo(beta), "ipo": fits._ipo(beta), "reward": fits._reward}


def test_newton_by_hand() -> None:
    """Three wins and one loss: β θ = log 3; IPO's mean target; five wins with a ridge."""
    design, weight = f64(1, -1)[:, None], f64(3, 1)
    kinds = losses(0.5)
    expected = {"dpo": 2 * math.log(3), "reward": math.log(3), "ipo": 0.5}
    for name, theta in expected.items():
        fit = solvers.newton(kinds[name], design, weight)
        assert fit.theta.item() == pytest.approx(theta, rel=1e-12)
        assert fit.gradient.item() < 1e-12
    alone = solvers.newton(kinds["reward"], design, f64(5, 0), ridge=1e-4).theta.item()
    assert 1e-4 * alone == pytest.approx(5 / (1 + math.exp(alone)), rel=1e-9)


@pytest.mark.parametrize("name", ["dpo", "ipo", "reward"])
def test_newton_ends_where_the_gradient_is_zero(name: str) -> None:
    """By autograd of the whole loss; a batch of an easy and a separable problem."""
    gen = torch.Generator().manual_seed(1)
    design = torch.randn(2, 30, 4, generator=gen, dtype=torch.float64)
    weight = torch.rand(2, 30, generator=gen, dtype=torch.float64)
    truth = torch.randn(4, generator=gen, dtype=torch.float64)
    design[1] = design[1] * (design[1] @ truth).sign()[:, None]
    loss = losses(0.3)[name]
    fit = solvers.newton(loss, design, weight, ridge=1e-3)
    theta = fit.theta.clone().requires_grad_()
    total = (weight * loss((design @ theta[..., None])[..., 0])).sum() + 5e-4 * (theta**2).sum()
    (gradient,) = torch.autograd.grad(total, theta)
    assert gradient.norm(dim=-1).max() < 1e-10
    for i in range(2):  # bitwise where the other of the batch stops when it does
        twice = solvers.newton(loss, design[[i, i]], weight[[i, i]], ridge=1e-3)
        assert torch.equal(twice.theta, fit.theta[[i, i]])


def test_a_fit_that_is_not_at_rest_is_refused() -> None:
    """After one step, by hand: θ = (5 ½) / (5 ¼ + 1e-4), whose gradient is far from zero."""
    design, weight = f64(1, -1)[:, None], f64(5, 0)
    fit = solvers.newton(fits._reward, design, weight, ridge=1e-4, most=1)
    theta = 2.5 / (1.25 + 1e-4)
    assert fit.theta.item() == pytest.approx(theta)
    gradient = 5 / (1 + math.exp(theta)) - 1e-4 * theta
    assert fit.gradient.item() == pytest.approx(gradient / 5)
    with pytest.raises(AssertionError, match="stopped at a gradient"):
        fit.rest()


def test_descent_reaches_the_tilt() -> None:
    """Exact steps on the regularised value, features that hold the optimum."""
    gen = torch.Generator().manual_seed(2)
    features = torch.randn(2, 6, 3, generator=gen, dtype=torch.float64)
    reward = (features @ f64(0.5, -0.2, 0.3)[:, None])[..., 0]
    log_ref = torch.zeros_like(reward).log_softmax(-1)
    path = solvers.descend(
        lambda log_p, _: -coverage.regularised_value(log_p, log_ref, reward, 0.5),
        features, lambda log_p: log_p, 2.0, 800,
    )  # fmt: skip
    assert path.shape == (801, 2, 6)
    torch.testing.assert_close(path[0], log_ref)
    torch.testing.assert_close(path[-1], tilted(log_ref, reward, 0.5), rtol=0, atol=1e-6)


def test_extrapolation_starts_with_the_mean_difference_of_features() -> None:
    """DPO's first step by hand, from its own batch: θ = η β / 2 times the mean of φ_w − φ_l."""
    claim = KNOWN["c10-fig2"]
    found = measure("c10-fig2", seeds=[3], steps=1, pairs=200)
    features, reward = fits._spanned_problem(claim, [3])
    assert (features.abs().sum(-1) - 1).abs().max() < 1e-12
    assert features[0, -1].tolist() == [1.0] + [0.0] * 15 and reward.argmax().item() == 99
    law = solvers.pair_law(torch.full((1, 50), 0.02, dtype=torch.float64), reward[:, :50])
    pairs = solvers.draw_pairs(stream_keys([3], claim.id, "pairs"), law, 0, 200)[0]
    draw = uniform(stream_keys([3], claim.id, "batches"), 0, torch.arange(64))
    batch = pairs[(200 * draw).long()]
    difference = features[0, batch // 50] - features[0, batch % 50]
    log_p = (features[0] @ (5.0 * 0.1 / 2 * difference.mean(0))).log_softmax(-1)
    chosen = log_p[pairs // 50].mean().item()
    rows = {row["method"]: row for row in found.rows}
    assert rows["DPO"]["chosen"] == pytest.approx(chosen, abs=1e-12)
    assert rows["DPO"]["best"] == pytest.approx(log_p[99].item(), abs=1e-12)


def test_extrapolation_raises_the_best_unseen() -> None:
    found = measure("c10-fig2")
    rows = {(row["method"], row["seed"]): row for row in found.rows}
    for i, seed in enumerate((0, 7, 3)):
        rises = [rows[name, seed]["best_change"] for name in ("DPO", "RLHF")]
        assert found.values[""][i].item() == pytest.approx(min(rises))
        assert rows["RLHF optimum", seed]["best_change"] >= rises[1] > 1
        assert rows["RLHF optimum", seed]["chosen_change"] < -10


def test_isomorphic_classes_end_at_one_policy() -> None:
    """Also where β is no power of two, so that the two fits round differently; with fewer
    features they end apart."""
    for beta in (0.5, 0.3):
        found = measure("d2-isomorphic", beta=beta)
        assert found.values[""].max() < 1e-9
        assert all(row["narrow_apart"] > 0.01 for row in found.rows)
        assert all(row["dpo"] == pytest.approx(row["rlhf"]) for row in found.rows)


def test_the_restricted_optimum_is_stationary() -> None:
    gen = torch.Generator().manual_seed(3)
    features = torch.randn(2, 8, 3, generator=gen, dtype=torch.float64)
    log_ref = torch.randn(2, 8, generator=gen, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(2, 8, generator=gen, dtype=torch.float64)
    best, moved = solvers.restricted_optimum(log_ref, features, reward, 0.7)
    assert moved < 1e-10
    theta = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    log_p = (best + (features @ theta[..., None])[..., 0]).log_softmax(-1)
    value = coverage.regularised_value(log_p, log_ref, reward, 0.7)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert gradient.abs().max() < 1e-9
    top = coverage.regularised_value(tilted(log_ref, reward, 0.7), log_ref, reward, 0.7)
    start = coverage.regularised_value(log_ref, log_ref, reward, 0.7)
    assert (start < value).all() and (value < top).all()
    linear = (features @ f64(1, 2, -1)[:, None])[..., 0]
    exactly, _ = solvers.restricted_optimum(log_ref, features, linear, 0.7)
    torch.testing.assert_close(exactly, tilted(log_ref, linear, 0.7), rtol=0, atol=1e-9)


def test_dpo_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smoothed labels it ends elsewhere than RLHF."""
    dpo = o.dpo
    monkeypatch.setattr(o, "dpo", lambda *x, beta: dpo(*x, beta=beta, label_smoothing=0.1))
    assert measure("d2-isomorphic").values[""].min() > 0.01
