"""Claims of the two divergences: their cases, modes and speed, against loops and differences."""

import math

import pytest
import torch
from small_claims import f64, measure
from torch import Tensor

from preftune.reproduce import modes, solvers
from preftune.theory import bimodal, dynamics
from preftune.theory.closed_form import kl


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

    (after, sd), widest, _ = modes._fresh_steps(mean, log_weight, 0.5, 1)
    at, h = torch.full_like(mean, math.log(20.0)), 1e-5
    by_mean = (value(mean + modes.UNIT * h, at) - value(mean - modes.UNIT * h, at)) / (2 * h)
    by_sd = (value(mean, at + h) - value(mean, at - h)) / (2 * h)
    torch.testing.assert_close((after - mean) / modes.UNIT, 0.5 * by_mean, rtol=1e-6, atol=1e-9)
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
