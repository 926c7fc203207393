"""Regrets by hand: tuning on other families, halving, stopping, intervals."""

from dataclasses import replace

import numpy as np
import pytest

from preftune.advising import regret, running, trying
from preftune.advising.drawing import draw
from preftune.advising.problem import Problem
from preftune.advising.regret import Judged, Runs


def line(slope: float, points: int = 9, judged: float = 1.0) -> list[dict[str, float]]:
    """A run whose value grows by `slope` a thousand spent, and whose judge agrees."""
    return [
        {
            "step": float(i), "spent": 1000.0 * i, "value": slope * i, "proxy": slope * i,
            "win": 0.5, "reverse_kl": 0.0, "judged": judged * i, "proxy_spread": 0.0,
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
    gains = runs.gains()
    assert gains[0, "a", 0] == pytest.approx(8.0) and gains[0, "b", 0] == pytest.approx(4.0)
    assert regret.tune(runs, gains, [0]) == {"enumerable": {"a": 0, "b": 0}}
    assert regret.tune(runs, gains, [1]) == {"enumerable": {"a": 1, "b": 0}}


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
    """Two rows, two rounds of 4000: each trains on 2000, the better goes on to 6000."""
    row, value = trying.halving(runs, 0, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert (row, value) == ("a", pytest.approx(6.0))
    row, value = trying.halving(runs, 1, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert (row, value) == ("b", pytest.approx(3.0))


def priced(runs: Runs, label: float, source: str = "rm_other") -> Runs:
    one = runs.problems[0]
    labels = replace(one.labels, source=source)
    dear = replace(one, prices=replace(one.prices, label=label), labels=labels)
    return Runs(problems=[dear], rows=runs.rows, curves=runs.curves)


def test_looking_takes_a_fifth_at_most(runs: Runs) -> None:
    """At 100 a label, of 2000 four samples are judged: 400; at 500 none, and nothing is known."""
    _, value = trying.halving(priced(runs, 100.0), 0, {"a": 0, "b": 0}, 0, np.random.default_rng(0))
    assert value == pytest.approx(5.6)
    dear = priced(runs, 500.0)
    rows = [
        trying.halving(dear, 0, {"a": 0, "b": 0}, 0, np.random.default_rng(s)) for s in range(9)
    ]
    assert {r for r, _ in rows} == {"a", "b"}
    assert all(v == pytest.approx(6.0 if r == "a" else 3.0) for r, v in rows)


def test_a_race_goes_on_with_the_better(runs: Runs) -> None:
    """Of 8000 less 400 a tenth for each of two; the better loses the other's 760."""
    arms = [(0, "a", 0), (0, "b", 0)]
    row, value = trying.race(runs, arms, 0, 0.1, 400.0, np.random.default_rng(0))
    assert (row, value) == ("a", pytest.approx(6.84))
    own = priced(runs, 0.0, "rm_same")  # its model is paid once; `spent` of a curve has it too
    pairs = len(own.problems[0].pairs)
    _, value = trying.race(own, arms, 0, 0.1, 400.0, np.random.default_rng(0))
    assert value == pytest.approx(((7600 - 2 * pairs) * 0.9 + 2 * pairs) / 1000)


def test_a_human_sees_shares_of_wins() -> None:
    one = draw(0)
    human = replace(one, labels=replace(one.labels, source="human"), beta=0.5, budget=8000.0)
    own = Runs(problems=[human], rows=["a"])
    points = [{**p, "win": 1.0, "reverse_kl": 0.6, "proxy": -9.0} for p in line(1.0)]
    own.curves[0, "a", 0] = {0: points}
    rng = np.random.default_rng(0)
    assert trying.seen(own, (0, "a", 0), 0, 1000.0, 8, rng) == pytest.approx(4 * 0.5 - 0.3)


def test_a_row_stops_where_its_reward_no_longer_grows() -> None:
    """Windows of 25 updates: the second is the best, three more pass."""
    curve = [
        {"proxy": p, "reverse_kl": float(i), "spent": 10.0 * i, "step": 25.0 * i, "value": 0.0,
         "proxy_spread": 0.0, "drawn": 100.0 * i}
        for i, p in enumerate([0.0, 1.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0])
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    cut = running.stopped(curve, 0.0, 3, rng)
    assert cut[-1]["step"] == 150 and cut[-1]["spent"] == pytest.approx(60.0)
    assert running.stopped(curve, 0.3, 3, rng) == curve, "the reward itself still grows"
    loud = [{**p, "proxy_spread": 50.0} for p in curve]
    ends = {running.stopped(loud, 0.0, 3, np.random.default_rng(s))[-1]["step"] for s in range(9)}
    assert len(ends) > 1, "it sees noise as well"


def test_an_interval_holds_its_mean_and_narrows() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(1.0, 1.0, 20), rng.normal(1.0, 1.0, 2000)
    low, high = regret.interval(few, ["f"] * 20)
    assert low < few.mean() < high
    narrow = regret.interval(many, ["f"] * 2000)
    assert narrow[1] - narrow[0] < 0.2 * (high - low)
