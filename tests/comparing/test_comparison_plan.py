"""How a budget is divided: what fits, what is cut first, what is said."""

from dataclasses import replace

import pytest

from preftune.comparing import costs, plan
from preftune.comparing.costs import Cost
from preftune.comparing.plan import Asked, Plan
from preftune.errors import UserError

FAST = Cost(ready=2.0, update=1.0, answer=0.1, trained=16)
COSTS = {"quick": FAST, "slow": replace(FAST, update=2.0, trained=8)}


def asked(**changes: object) -> Asked:
    given: dict[str, object] = {"selection": 24, "final": 64, "workers": 1, **changes}
    return Asked(**given)  # pyright: ignore[reportArgumentType]


def divided(seconds: float, **changes: object) -> Plan:
    return plan.divide(asked(budget=seconds, **changes), COSTS)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert costs.parse_time(text) == seconds
    assert costs.in_words(seconds) in (text, "90m")


@pytest.mark.parametrize("text", ["10", "m", "-3m", "0s", "10 minutes", "1d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--budget-per-run"):
        costs.parse_time(text, "--budget-per-run")


def test_jobs_side_by_side() -> None:
    assert costs.makespan([3.0, 3.0, 2.0, 2.0, 2.0], 2) == 7.0
    assert costs.makespan([3.0, 1.0], 1) == 4.0 and costs.makespan([], 3) == 0.0


def test_a_run_costs_its_start_its_updates_and_its_answers() -> None:
    assert FAST.run(10, 20) == pytest.approx(2 + 10 + 2)
    assert FAST.run(10, 20, curve=8) == pytest.approx(2 + 10 + 2 + 3 * 8 * 0.1)


def test_every_run_has_the_same_training_time() -> None:
    found = divided(3600.0)
    assert found.updates["quick"] == pytest.approx(2 * found.updates["slow"], abs=1)
    assert found.grids == {"quick": 3, "slow": 3} and found.seeds == 3 and found.cuts == ()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_what_is_planned_fits_and_a_little_more_would_not(workers: int) -> None:
    seconds = 2000.0
    found = divided(seconds, workers=workers)
    allowed = seconds * plan.SAFE - plan.CLOSING
    assert plan.expected(found, COSTS, workers) <= allowed
    longer = replace(found, updates={m: n + 3 for m, n in found.updates.items()})
    assert plan.expected(longer, COSTS, workers) > allowed


def test_cuts_come_in_their_order() -> None:
    """The grid first, then seeds, never below two, then updates; each is said."""
    seen: list[tuple[int, int]] = []
    for seconds in (3000 * 0.97**i for i in range(200)):
        try:
            found = divided(seconds)
        except UserError:
            break
        shape = max(found.grids.values()), found.seeds
        if shape not in seen:
            seen.append(shape)
        if min(found.updates.values()) < plan.LEAST_UPDATES:
            assert shape == (1, 2) and any("very short" in cut for cut in found.cuts)
        assert ("No learning rate was chosen" in " ".join(found.cuts)) == (shape[0] == 1)
        assert ("2 training seeds in place of 3" in " ".join(found.cuts)) == (shape[1] == 2)
        assert any("grid has 2" in cut for cut in found.cuts) == (shape[0] == 2)
    else:
        pytest.fail("no budget was too small")
    assert seen == [(3, 3), (2, 3), (1, 3), (1, 2)]


def test_a_budget_for_nothing_names_the_time_that_it_would_take() -> None:
    with pytest.raises(UserError, match=r"too short .* take about (\d+)s") as caught:
        divided(20.0, spent=10.0)
    needed = float(str(caught.value).split("take about ")[1].split("s.")[0])
    assert divided(needed - 10.0).seeds == 2


def test_a_given_rate_is_no_grid() -> None:
    found = divided(3600.0, grids={"quick": 1, "slow": 3})
    assert found.grids == {"quick": 1, "slow": 3} and found.cuts == ()


def test_steps_samples_and_time_of_a_run() -> None:
    assert plan.divide(asked(steps=7), COSTS).updates == {"quick": 7, "slow": 7}
    assert plan.divide(asked(samples=160), COSTS).updates == {"quick": 10, "slow": 20}
    found = plan.divide(asked(per_run=60.0), COSTS)
    for name, cost in COSTS.items():
        assert cost.run(found.updates[name], found.final, found.curve) <= 60
        assert cost.run(found.updates[name] + 1, found.final, found.curve) > 60
    with pytest.raises(UserError, match="too few for 'quick'.*Give"):
        plan.divide(asked(per_run=5.0), COSTS)


def test_rates_lie_about_a_centre() -> None:
    small = Cost(ready=1.0, update=1.0, answer=1.0, parameters=135e6, default_rate=1e-6)
    assert costs.rates(small, 10, 3) == [1.7e-5, 5e-5, 1.5e-4]
    assert costs.rates(small, 10, 1) == [5e-5]
    low, high = costs.rates(small, 10, 2)
    assert low < 5e-5 < high and high / low == pytest.approx(3, rel=0.05)
    # in a long run the row's own rate is the larger one; a tiny model's is bounded
    assert costs.rates(replace(small, default_rate=2e-5), 1000, 1) == [2e-5]
    assert costs.rates(replace(small, parameters=1e3), 1, 3) == [costs.MOST_RATE]
    assert costs.spread(5, 3) == [0, 2, 4] and costs.spread(4, 1) == [2]
    assert costs.spread(2, 3) == [0, 1]


def test_a_slower_machine_shortens_the_final_runs_and_says_so() -> None:
    made = divided(3000.0)
    finals = plan.expected(made, COSTS, 1, chosen=True)
    assert plan.again(made, asked(budget=3000.0), COSTS, finals + 60) == made
    found = plan.again(made, asked(budget=3000.0), COSTS, 0.6 * finals)
    assert plan.expected(found, COSTS, 1, chosen=True) <= 0.6 * finals - plan.CLOSING
    assert found.seeds == 3 and found.updates["quick"] < made.updates["quick"]
    assert "slower" in found.cuts[-1]
    least = plan.again(made, asked(budget=3000.0), COSTS, 0.1 * finals)
    assert least.seeds == 2 and "2 training seeds in place of 3" in least.cuts[-1]
    assert plan.from_plain(plan.plain(least)) == least
