"""The experiments without a training loop: their numbers by hand, and what they are made of."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune import objectives as o
from preftune.numerics import stream_keys, uniform
from preftune.reproduce import claims, exact, fits, solvers
from preftune.theory import bimodal, coverage, dynamics
from preftune.theory.closed_form import kl, tilted

KNOWN = claims.load()
SMALL: dict[str, dict[str, Any]] = {
    "m3-cases": {"instances": 200},
    "m3-bimodal": {},
    "m3-reuse-limit": {"steps": 300},
    "first-2": {"far": 50, "most": 400},
    "c1-prop41": {},
    "c2-kl-bound": {"instances": 200},
    "c3-global-suffices": {"sizes": [100, 1000, 10000]},
    "c10-fig2": {"steps": 150, "pairs": 1000},
    "d2-isomorphic": {},
    "d5-misspecified": {},
}


def measure(name: str, seeds: Sequence[int] = (0, 7, 3), **settings: Any) -> claims.Measured:
    claim = KNOWN[name]
    changed = {**claim.settings, **SMALL[name], **settings}
    claim = dataclasses.replace(claim, settings=changed)
    return claims.EXPERIMENTS[name].conclude(claim, seeds, {})


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_gives_numbers_rows_figure_and_notes(name: str) -> None:
    """One number a seed, or one where no seed enters; what stands beside it can be printed."""
    found = measure(name)
    assert set(found.values) == {part.name for part in KNOWN[name].parts}
    for values in found.values.values():
        assert values.dtype == torch.float64
        assert values.shape == ((1,) if KNOWN[name].seeds == 1 else (3,))
        assert torch.isfinite(values).all()
    assert all(note.endswith(".") and "nan" not in note for note in found.notes)
    assert len(found.notes) >= 2 and found.rows
    for row in found.rows:
        assert all(isinstance(x, str | int | float | list) for x in row.values()), row
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float)), row
    if name != "m3-cases":
        layout = found.figure.to_dict()["layout"]
        assert all(layout[key]["title"]["text"] for key in ("xaxis", "yaxis"))
        names = [line["name"] for line in found.figure.to_dict()["data"]]
        assert len(set(names)) == len(names) > 1


@pytest.mark.parametrize("name", [name for name in SMALL if KNOWN[name].seeds > 1])
def test_a_seed_alone_gives_what_it_gives_among_others(name: str) -> None:
    alone, batch = measure(name, [7]), measure(name, [0, 7, 3])
    torch.testing.assert_close(alone.values[""][0], batch.values[""][1], rtol=1e-10, atol=1e-12)
    if name not in ("m3-cases", "c2-kl-bound", "d2-isomorphic"):  # which are 0 for every seed
        assert len(set(batch.values[""].tolist())) == 3


@pytest.mark.parametrize("mean", ["logarithmic_mean", "identric_mean"])
def test_another_mean_breaks_the_cases(mean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure("m3-cases").values[""].tolist() == [0.0, 0.0, 0.0]
    monkeypatch.setattr(dynamics, mean, lambda a, b: (a + b) / 2)
    broken = measure("m3-cases")
    assert (broken.values[""] > 0.003).all()
    kinds = (0,) if mean == "logarithmic_mean" else (1, 2)
    assert [i for i, row in enumerate(broken.rows) if row["violations"]] == list(kinds)


def test_the_cases_are_of_the_structure_they_name() -> None:
    """All occur, sufficient conditions hold in fewer instances and never without the case."""
    for row in measure("m3-cases").rows:
        assert 0 < row["sufficient"] < row["seen"] < 1
        assert row["sufficient_but_not_seen"] == 0
        assert row["compared"] + row["left_out"] == 600


def test_two_modes_by_moments() -> None:
    """The forward fit has the target's sd, to the grid's coarseness; the reverse fit a mode's."""
    found = measure("m3-bimodal")
    target = bimodal.two_modes().exp()
    arm = torch.arange(100).double()
    mean = (target * arm).sum()
    sd = float((target * (arm - mean) ** 2).sum().sqrt())
    assert found.rows[0]["sd"] == pytest.approx(sd, abs=0.2)
    assert found.rows[1]["sd"] == pytest.approx(5, abs=0.01)
    assert found.values[""].item() == pytest.approx(sd - 5, abs=0.2)


def test_one_round_has_the_moments_of_its_target() -> None:
    """The reward is two peaks, so that the target's sd can be had from the start alone."""
    found = measure("m3-reuse-limit", steps=1500)
    arm = torch.arange(100).double()
    for row, value in zip(found.rows, found.values[""], strict=True):
        peaks = [h * torch.exp(-(((arm - c) / 8) ** 2)) for c, h in ((25, 1.0), (75, 0.9))]
        weight = torch.exp(torch.maximum(*peaks) / 0.2 - (arm - row["start"]) ** 2 / 800)
        p = weight / weight.sum()
        sd = float(((p * arm**2).sum() - (p * arm).sum() ** 2).sqrt())
        assert 30 <= row["start"] <= 70
        assert row["sd_once"] == pytest.approx(sd, abs=1e-6)
        assert row["on_one_mode"] and abs(row["sd_fresh"] - 2) < 0.01
        assert value == pytest.approx(sd - 2, abs=0.01)


def test_a_fresh_step_is_the_gradient_of_the_log_of_the_mean_weight() -> None:
    """By differences of log E_p[w] in the two parameters."""
    mean, arm = f64(40.0, 62.0), torch.arange(100).double()
    log_weight = 3 * torch.exp(-(((arm - 25) / 8) ** 2))

    def value(mean: Tensor, log_sd: Tensor) -> Tensor:
        p = bimodal.discretised_gaussian(mean, log_sd.exp())
        return torch.logsumexp(p + log_weight, -1)

    (after, sd), widest, _ = fits._fresh_steps(mean, log_weight, 0.5, 1)
    at, h = torch.full_like(mean, math.log(20.0)), 1e-5
    by_mean = (value(mean + fits.UNIT * h, at) - value(mean - fits.UNIT * h, at)) / (2 * h)
    by_sd = (value(mean, at + h) - value(mean, at - h)) / (2 * h)
    torch.testing.assert_close((after - mean) / fits.UNIT, 0.5 * by_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sd.log() - at, 0.5 * by_sd, rtol=1e-6, atol=1e-9)
    assert (widest >= 20 - 1e-9).all()


def naive_steps(target: int, forward: bool) -> int:
    """`first-2` for one target, arm by arm."""

    def peak(centre: int) -> list[float]:
        mass = [math.exp(-(((a - centre) / 10) ** 2) / 2) for a in range(100)]
        return [m / sum(mass) for m in mass]

    q, p = peak(target), peak(20)
    z = [math.log(x) for x in p]
    near = range(target - 10, target + 11)
    steps = 0
    while sum(p[a] for a in near) < sum(q[a] for a in near) / 2:
        k = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        for a in range(100):
            down = p[a] - q[a] if forward else p[a] * (math.log(p[a] / q[a]) - k)
            z[a] -= 0.5 * down
        total = sum(math.exp(x) for x in z)
        p = [math.exp(x) / total for x in z]
        steps += 1
    return steps


def test_steps_to_half_of_the_peak() -> None:
    """Two targets against scalar loops, and the cap where reverse KL does not get there."""
    found = measure("first-2")
    rows = {row["target"]: row for row in found.rows}
    for target in (40, 50):
        assert rows[target]["forward"] == naive_steps(target, True)
        assert rows[target]["reverse"] == naive_steps(target, False)
    expected = math.log2(rows[50]["forward"] / rows[50]["reverse"])
    assert found.values[""].item() == pytest.approx(expected)
    assert rows[70]["reverse"] == 400 and "400 or more" in measure("first-2", far=70).notes[1]


def test_the_unseen_arm() -> None:
    """1 − 1/e less .632; errors are as asked for, and the mass rises with them."""
    found = measure("c1-prop41")
    assert found.values[""].item() == pytest.approx(1 - math.exp(-1) - 0.632, abs=1e-12)
    other = measure("c1-prop41", eps=0.04, beta=0.3)
    assert other.values[""].item() == pytest.approx(1 - math.exp(-2 / 3) - 0.632, abs=1e-12)
    for row in found.rows:
        assert row["mass"] == pytest.approx(1 - math.exp(-math.sqrt(row["eps"]) / row["beta"]))
        assert row["error"] == pytest.approx(row["eps"])
        # the reference: half of the rest on each arm seen, 1e-6 on the third
        tilt = f64(0.3 / row["beta"], 0).softmax(-1) * (1 - row["mass"])
        log_p = torch.cat([tilt, f64(row["mass"])]).log()
        log_ref = f64(0.5 - 5e-7, 0.5 - 5e-7, 1e-6).log()
        assert row["kl"] == pytest.approx(kl(log_p, log_ref).item())


def test_the_bound_is_kept_and_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No instance is beyond it, some come near; a slightly smaller one is broken."""
    found = measure("c2-kl-bound")
    assert found.values[""].tolist() == [0.0, 0.0, 0.0]
    assert all(0.95 < row["closest"] <= 1 for row in found.rows)
    assert all(row["dpo_kl"] > row["dpo_bound"] for row in found.rows)
    bound = coverage.tilt_kl_bound
    monkeypatch.setattr(coverage, "tilt_kl_bound", lambda size, beta: 0.9 * bound(size, beta))
    assert (measure("c2-kl-bound").values[""] > 0).all()


def test_the_bounded_problems_are_what_they_say() -> None:
    """Uniform, peaked and thin references in turn, no constant reward, ranges and betas."""
    log_ref, reward, beta = exact._bounded_problems([1, 2], "x", 60, 30)
    least = log_ref.log_softmax(-1).amin(-1)
    assert torch.allclose(least[:, ::3], torch.tensor(-math.log(30)).double())
    assert (least[:, 1::3] < -6).all() and (least[:, 2::3] < -25).all()
    spread = reward.amax(-1) - reward.amin(-1)
    assert (spread > 0.05).all() and (spread <= 5).all()
    assert (beta >= 0.05).all() and (beta <= 5).all() and beta.max() > 20 * beta.min()
    distinct = torch.tensor([[len(r.unique()) for r in rewards] for rewards in reward])
    two = torch.arange(60) // 3 % 2 == 1
    assert (distinct[:, two] == 2).all() and (distinct[:, ~two] == 30).all()


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


def test_the_forward_fit_is_stationary_or_at_its_bound() -> None:
    """KL(target ‖ p) has no slope in either parameter; a flat target takes the widest member."""
    skew = torch.linspace(0, 3, 100, dtype=torch.float64)
    targets = torch.stack([bimodal.two_modes(), (skew.sin() * 4).log_softmax(-1), 0 * skew])
    targets = targets.log_softmax(-1)
    mean, sd = solvers.forward_fit(targets, 2.0, 40.0)
    at = torch.stack([mean, sd.log()]).requires_grad_()
    divergence = kl(targets, bimodal.discretised_gaussian(at[0], at[1].exp()))
    (slope,) = torch.autograd.grad(divergence.sum(), at)
    assert slope[:, :2].abs().max() < 1e-8
    assert sd[:2].max() < 39 and sd[2].item() == pytest.approx(40)
    assert mean[2].item() == pytest.approx(49.5) and slope[1, 2] < -1e-3


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


def test_misspecified_by_hand() -> None:
    """Comparisons of arms 1 and 3 alone, β = 1: θ = 1, E[r] = (e + 2/e)/(e + 1/e + 1)."""
    e = math.e
    alone = measure("d5-misspecified", weights=[0, 1, 0])
    assert alone.values[""].item() == pytest.approx((e + 2 / e) / (e + 1 / e + 1) - 1, abs=1e-9)
    found = measure("d5-misspecified")
    assert found.values[""].item() == pytest.approx(0.8956 - 1, abs=1e-4)
    for row in found.rows:
        assert (row["gain"] < 0) == (row["weights"][1] > 3.648), row


def test_intervals_of_a_line_are_those_of_figures() -> None:
    values = torch.stack([f64(1, 2, 3, 6), f64(5, 5, 5, 5)], -1)
    line = solvers.with_intervals("x", [10, 20], values, "#000000")
    low = claims.interval(values[:, :1])["low"]
    assert low is not None and line["y"] == [3.0, 5.0]
    assert line["error_y"]["arrayminus"] == [3.0 - low, 0.0]
    assert measure("c3-global-suffices", [1]).values[""].shape == (1,)  # no interval to draw


def test_dpo_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smoothed labels it ends elsewhere than RLHF."""
    dpo = o.dpo
    monkeypatch.setattr(o, "dpo", lambda *x, beta: dpo(*x, beta=beta, label_smoothing=0.1))
    assert measure("d2-isomorphic").values[""].min() > 0.01
