"""Regrets by hand: tuning on other families, halving, stopping, intervals."""

from dataclasses import replace

import numpy as np
import pytest

from preftune.advising import regret
from preftune.advising.drawing import draw
from preftune.advising.problem import Problem
from preftune.advising.regret import Judged, Runs


def line(slope: float, points: int = 9, judged: float = 1.0) -> list[dict[str, float]]:
    """A run whose value grows by `slope` a thousand spent, and whose judge agrees."""
    return [
        {
            "step": float(i), "spent": 1000.0 * i, "value": slope * i, "proxy": slope * i,
            "win": 0.5, "reverse_kl": 0.0, "judged": judged * i,
        }
        for i in range(points)
    ]  # fmt: skip


def problem(number: int) -> Problem:
    one = draw(number)
    free = replace(one.prices, label=0.0, sample=0.0)
    labels = replace(one.labels, source="rm_other", reward=one.reward)
    return replace(one, budget=8000.0, prices=free, labels=labels)


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Two problems of two families; of row a the setting 0 is better on the first, 1 on the other.
    Row b is always between."""
    found = Runs(problems=[problem(0), problem(1)], rows=["a", "b"])
    slopes = {
        (0, "a", 0): 1.0, (0, "a", 1): 0.1, (1, "a", 0): 0.1, (1, "a", 1): 1.0,
        (0, "b", 0): 0.5, (1, "b", 0): 0.5,
    }  # fmt: skip
    for arm, slope in slopes.items():
        found.curves[arm] = {s: line(slope) for s in (0, 1)}
    return found


def test_settings_come_from_other_problems(runs: Runs) -> None:
    gains = runs.gains((0, 1))
    assert gains[0, "a", 0] == pytest.approx(8.0) and gains[0, "b", 0] == pytest.approx(4.0)
    assert regret.tune(runs, gains, [0]) == {"a": 0, "b": 0}
    assert regret.tune(runs, gains, [1]) == {"a": 1, "b": 0}


def test_what_was_spent_before_is_missing(runs: Runs) -> None:
    arm = (0, "a", 0)
    assert runs.value(arm, (0,))[0] == pytest.approx(8.0)
    assert runs.value(arm, (0,), less=500.0)[0] == pytest.approx(7.5)


def test_regret_by_hand() -> None:
    found = Judged(problem=0, best="a", gain=2.0, error=0.5, others={"a": 2.0, "b": 0.5, "c": -1})
    assert [found.regret(n) for n in "abc"] == [0.0, 0.75, 1.5]
    assert found.inside
    assert not replace(found, error=0.7).inside, "under three standard errors"


def test_halving_keeps_the_better_and_pays_for_all(runs: Runs) -> None:
    """Two rows, one round of 8000: each trains on 4000; the better is a, at 4."""
    row, value = regret.halving(runs, 0, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert (row, value) == ("a", pytest.approx(4.0))
    row, value = regret.halving(runs, 1, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert (row, value) == ("b", pytest.approx(2.0))


def test_halving_pays_for_labels(runs: Runs) -> None:
    dear = replace(runs.problems[0], prices=replace(runs.problems[0].prices, label=125.0))
    own = Runs(problems=[dear], rows=runs.rows, curves=runs.curves)
    _, value = regret.halving(own, 0, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert value == pytest.approx(0.0), "32 labels for each of two rows are all there is"


def test_a_row_stops_where_its_reward_no_longer_grows() -> None:
    points = [
        {"proxy": p, "reverse_kl": float(i), "spent": i, "step": i, "value": 0.0}
        for i, p in enumerate([0.0, 1.0, 2.0, 1.8, 1.6, 1.4, 1.2])
    ]
    assert len(regret.stopped(points, 0.0, 3)) == 6, "three after the best"
    assert regret.stopped(points, 0.3, 3) == points, "the reward itself still grows"


def test_an_interval_holds_its_mean_and_narrows() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(1.0, 1.0, 20), rng.normal(1.0, 1.0, 2000)
    low, high = regret.interval(few, ["f"] * 20)
    assert low < few.mean() < high
    narrow = regret.interval(many, ["f"] * 2000)
    assert narrow[1] - narrow[0] < 0.2 * (high - low)
