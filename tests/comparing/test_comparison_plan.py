"""How a budget is divided: what fits, what is cut first, what is said. And what is compared."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune import cli_compare
from preftune import config as configs
from preftune.comparing import costs, entries, plan, prompts, running, wording
from preftune.comparing.costs import Cost
from preftune.comparing.job import Job
from preftune.comparing.plan import Asked, Plan
from preftune.errors import UserError
from preftune.runs import RunFolder

ROOT = Path(__file__).parents[2]

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


def test_the_evaluations_of_a_run_are_those_that_it_costs() -> None:
    assert running.POINTS == costs.CURVE_POINTS + 1, "the last one is counted by itself"
    on_the_way = [step for step in range(1, 100) if step % -(-100 // running.POINTS) == 0]
    assert len(on_the_way) == costs.CURVE_POINTS


@pytest.mark.long
def test_a_run_that_ends_early_is_not_evaluated_twice_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which step is the last is the loop's word: one with patience ends before them all."""
    asked: list[int] = []
    monkeypatch.setattr(running.held_out, "held_out_answers", lambda *a: asked.append(1))
    monkeypatch.setattr(running, "per_prompt", lambda *a: {"row": [0], "reward": [[1.0]]})
    job = Job(key="k", kind="final", entry="m", order=0, settings={}, prompts=1, curve=8)
    parts: Any = SimpleNamespace(policy=None)
    watch = running._Watch(job, parts, RunFolder(tmp_path), 100, lambda step, total: None)
    assert watch.evaluate(0, False) == {} and watch.evaluate(50, True) == {} and asked == []
    assert watch.evaluate(50, False) == {"eval_reward": 1.0} and asked == [1]


@pytest.mark.parametrize(("count", "enough"), [(26, True), (25, False)])
def test_how_many_prompts_are_enough(tmp_path: Path, count: int, enough: bool) -> None:
    path = tmp_path / "my.jsonl"
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.load({"data": str(path)})
    if enough:
        found = prompts.cut(config).split
        assert (found.selection, found.final, found.train) == (3, 6, 17)
    else:
        with pytest.raises(UserError, match="25 prompts are too few.*at least 26"):
            prompts.cut(config)
    said = (ROOT / "docs" / "compare.md").read_text()
    assert "fewer than 26 prompts are refused" in said


def test_the_file_in_the_docs_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "compare.md").read_text()
    path = tmp_path / "compare.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    common, own = cli_compare._file(str(path))
    found = entries.make([], {**common, "reward": "length:min"}, own, {})
    assert [entry.name for entry in found] == ["dpo", "strict", "mine"]


def test_what_methods_are_compared_by_is_the_same_for_all() -> None:
    """Whatever a method's own file says; --set without a method's name is for all."""
    for key, value in (("gold", "length:min"), ("model", "x"), ("data", "x.jsonl"), ("seed", 1)):
        with pytest.raises(UserError, match=f"dpo: '{key}' of one method.*as --{key}"):
            entries.make(["dpo", "ipo"], {}, {"dpo": {key: value}, "ipo": {}}, {})
    given = {"set": ("seed=3", "beta=0.2", "dpo.seed=4"), "config": None}
    common, _, overrides = cli_compare._given({"batch_size": "2"}, given)
    assert common == {"batch_size": "2", "seed": 3}
    assert overrides == {"beta": 0.2, "dpo.seed": 4}


def test_the_best_is_the_best_of_those_that_have_a_result() -> None:
    def method(name: str, value: float | None) -> dict[str, Any]:
        figure = {"value": value, "low": value, "high": value}
        return {"name": name, "figures": {} if value is None else {"reward": figure}, "gains": {}}

    pair = {"a": "x", "b": "y", "value": 1.0, "low": 0.5, "high": 1.5, "better": "x"}
    found = {
        "methods": [method("x", 2.0), method("y", 1.0), method("z", None)], "pairs": [pair],
        "judged_by": "reward", "unit": "", "reference": {"best_of_n": {}},
    }  # fmt: skip
    assert wording.verdict(found)[0].endswith("the best of 2.")
