"""Paired statistics against hand-worked numbers, tables of Student's law, and known truth."""

import math

import numpy as np
import pytest

from preftune.comparing import statistics
from preftune.comparing.statistics import crossed, holm, student_cdf, student_quantile


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.95, 5, 2.0150),
     (0.975, 1000, 1.9623), (0.025, 2, -4.3027)],
)  # fmt: skip
def test_students_quantiles_are_those_of_the_table(p: float, freedom: float, value: float) -> None:
    assert student_quantile(p, freedom) == pytest.approx(value, abs=1e-4)
    assert student_cdf(student_quantile(p, freedom), freedom) == pytest.approx(p, abs=1e-9)


def test_two_seeds_and_two_prompts_by_hand() -> None:
    """Rows 1, 3 and 5, 9: means of seeds 2, 7, of prompts 3, 6; M_seed = 2 x 12.5 = 25, M_prompt =
    2 x 4.5 = 9, rest ±½ so M_rest = 1; variance (25 + 9 - 1) / 4, freedom 33^2 / (625 + 81 + 1)."""
    found = crossed(np.array([[1.0, 3.0], [5.0, 9.0]]))
    error, freedom = math.sqrt(33 / 4), 33**2 / 707
    half = error * student_quantile(0.975, freedom)
    assert found.value == 4.5
    assert (found.low, found.high) == pytest.approx((4.5 - half, 4.5 + half))
    assert found.p == pytest.approx(2 * (1 - student_cdf(4.5 / error, freedom)))
    assert (found.seeds, found.prompts) == (2, 2)


def test_one_seed_is_the_usual_interval_over_prompts() -> None:
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    half = student_quantile(0.975, 3) * math.sqrt((5 / 3) / 4)
    found = crossed(values)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_what_never_varies_has_no_width_and_what_is_single_no_interval() -> None:
    same = crossed(np.full((3, 4), 2.0))
    assert (same.low, same.high, same.p) == (2.0, 2.0, 0.0)
    assert crossed(np.zeros((2, 3))).p == 1.0
    single = crossed(np.array([[1.0]]))
    assert single.low is None and single.p is None


def test_pairing_takes_out_what_seeds_and_prompts_share() -> None:
    """Runs differ by 10 between prompts and seeds, methods by 1: only the difference tells."""
    draw = np.random.default_rng(0)
    shared = 10 * draw.normal(size=(3, 1)) + 10 * draw.normal(size=(1, 30))
    mine, other = (shared + own + 0.1 * draw.normal(size=(3, 30)) for own in (1.0, 0.0))
    difference = crossed(mine - other)
    assert difference.low is not None and difference.low > 0.9
    alone = crossed(mine)
    assert alone.low is not None and alone.high is not None and alone.high - alone.low > 5


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (3, 0.3), (3, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, spread: float) -> None:
    """Two-way data of a known mean. A bootstrap over three seeds of spread 1 holds it in three of
    four at most; the bounds leave room for 250 draws."""
    draw = np.random.default_rng(seeds)
    hits, draws = 0, 250
    for _ in range(draws):
        values = 1.0 + spread * draw.normal(size=(seeds, 1)) + draw.normal(size=(1, 30))
        found = crossed(values + draw.normal(size=(seeds, 30)))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / draws <= 0.99


def test_holm_by_hand() -> None:
    """p .01, .02, .04 of three: times 3, 2, 1, never falling; what is unknown is no test."""
    given = {("a", "b"): 0.02, ("a", "c"): 0.01, ("b", "c"): 0.04, ("c", "d"): None}
    found = holm(given)
    assert found == pytest.approx({("a", "c"): 0.03, ("a", "b"): 0.04, ("b", "c"): 0.04})
    assert holm({("a", "b"): 0.03, ("a", "c"): 0.03})["a", "c"] == pytest.approx(0.06)


def test_pairs_are_each_two_once() -> None:
    assert statistics.pairs_of(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
