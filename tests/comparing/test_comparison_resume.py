"""From flags to page with runs that are made up: what is decided, what fails, what goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune import cli, cli_compare
from preftune.comparing import locks, running
from preftune.comparing.job import Job, read
from preftune.counting import COUNTS

pytestmark = pytest.mark.long

FACTS = {
    "parameters": 1000, "default_rate": 1e-3, "label_source": "true", "reward": "length:min",
    "gold": None, "held_out": 11,
}  # fmt: skip


class Runs:
    """In place of running jobs: a higher rate has a higher reward; some fail."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        """By key, or how it begins: why."""
        self.done: list[Job] = []

    def __call__(self, job: Job, folder: Path, tell: running.Tell) -> dict[str, Any]:
        self.done.append(job)
        found: dict[str, Any] = {
            "key": job.key, "kind": job.kind, "entry": job.entry, "seed": job.seed,
        }  # fmt: skip
        for key, why in self.faults.items():
            if job.key.startswith(key):
                return found | {"failed": "it broke", "why": why}
        rate = float(job.settings.get("learning_rate", 1e-3))
        steps = range(job.settings["max_steps"] + 1) if job.kind == "final" else range(5)
        zero = dict.fromkeys(COUNTS, 1.0)
        value = [[1000 * rate + job.seed + i] for i in range(job.prompts)]
        answers = {"row": list(range(job.prompts)), "reward": value, "length": value}
        return found | {
            "rate": rate, "updates": job.settings["max_steps"], "facts": FACTS, "texts": [],
            "curve": [{"step": step, "seconds": 0.5 * step, **zero} for step in steps],
            "answers": answers, "best_of_n": {}, "notes": [],
            "seconds": {"ready": 0.1, "cache": 0.0, "answers": 0.1, "whole": 1.0},
        }  # fmt: skip

    def keys(self) -> list[str]:
        """Of the jobs that were run since it was last asked."""
        keys = [job.key for job in self.done]
        self.done.clear()
        return keys


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(running, "run", made)
    return made


@pytest.fixture
def compare(
    here: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """Begin a comparison of two methods, or go on with it: exit code, and what it printed."""
    rows = [{"prompt": f"Say {i}.", "chosen": "a", "rejected": "bb"} for i in range(33)]
    (here / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = {"methods": "dpo,ipo", "model": tiny_model, "data": "my.jsonl", "reward": "length:min",
             "rates": "1e-5,3e-5", "seeds": "2"}  # fmt: skip

    def run(*more: str, begins: bool = True, **changes: str) -> tuple[int, Any]:
        given = {**(begin if begins else {}), "workers": "0", "output": "out", **changes}
        flags = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
        capsys.readouterr()
        code = cli.run(["compare", *flags, *([] if begins else ["--resume"]), "--json", *more])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else err

    return run


def result(key: str) -> Path:
    return Path("out/results") / f"{key}.json"


def test_a_method_that_failed_in_the_timing_has_no_part(
    compare: Callable[..., Any], runs: Runs
) -> None:
    """The budget is divided without it, so it cannot come back."""
    runs.faults["timing-ipo"] = running.FAULT
    names = "dpo,ipo,pref_ft"
    code, found = compare(steps="2", methods=names)
    (failed,) = found["failed"]
    assert code == 0 and failed["method"] == "ipo" and failed["message"] == "it broke"
    runs.faults.clear()
    runs.keys()
    code, found = compare(begins=False)
    assert code == 0 and found["failed"] == [failed] and runs.keys() == []
    # a folder of an earlier version, where it was tried again
    result("timing-ipo").unlink()
    locks.forget(Path("out"), "timing-ipo")
    code, found = compare(begins=False)
    (failed,) = found["failed"]
    assert code == 0 and "when the budget was divided" in failed["message"]
    assert runs.keys() == ["timing-ipo"]


def test_the_rate_of_judged_runs_stays_what_it_was(compare: Callable[..., Any], runs: Runs) -> None:
    runs.faults |= dict.fromkeys(("rate-dpo-3e-05", "final-dpo-s1"), running.FAULT)
    _, found = compare(steps="2")
    assert [m["rate"] for m in found["methods"]] == [1e-5, 3e-5]
    assert found["methods"][0]["runs"] == [0]
    runs.faults.clear()
    runs.keys()
    code, found = compare(begins=False)
    assert code == 0 and runs.keys() == ["final-dpo-s1"]
    assert [m["rate"] for m in found["methods"]] == [1e-5, 3e-5]
    assert found["methods"][0]["runs"] == [0, 1]
    made = [json.loads(result(f"final-dpo-s{seed}").read_text())["rate"] for seed in (0, 1)]
    assert made == [1e-5, 1e-5]
    # were it not so, it would be seen
    result("final-dpo-s1").write_text(result("final-dpo-s1").read_text().replace("1e-05", "0.5"))
    code, said = compare(begins=False)
    assert code == 1 and "judged runs have the chosen rate" in said


@pytest.mark.parametrize("budget", [{"steps": "2"}, {"budget": "1h"}])
def test_nothing_but_failures_is_a_page_too(
    compare: Callable[..., Any], runs: Runs, budget: dict[str, str]
) -> None:
    runs.faults["rate-"] = running.STOPPED
    code, found = compare(**budget)
    assert code == 3 and "it broke" in Path("out/report.html").read_text()
    assert [f["what"] for f in found["failed"]] == ["all of its runs"] * 2
    # what may pass is tried again, rates among it: no judged run was made with one
    runs.faults["rate-"] = running.FAULT
    code, found = compare(output="other", **budget)
    assert code == 1 and found["pairs"] == []
    runs.faults.clear()
    code, found = compare(begins=False, output="other")
    assert code == 0 and [m["rate"] for m in found["methods"]] == [3e-5, 3e-5]


def test_a_mistake_leaves_the_folder_free(compare: Callable[..., Any], runs: Runs) -> None:
    """One that is found by the timing, too."""
    Path("out").mkdir()
    code, said = compare(budget="1s")
    assert code == 2 and "too short" in said and not Path("out").exists()
    runs.faults["timing-dpo"] = running.REFUSED
    code, said = compare(steps="2")
    assert code == 2 and "dpo: it broke" in said and not Path("out").exists()
    runs.faults.clear()
    assert compare(steps="2")[0] == 0
    # of one that is there, nothing is removed
    runs.faults["final-"] = running.REFUSED
    Path("out/plan.json").unlink()
    result("timing-dpo").unlink()
    runs.faults["timing-dpo"] = running.REFUSED
    assert compare(begins=False)[0] == 2 and result("final-ipo-s1").is_file()


def test_what_may_pass_is_gone_on_with(compare: Callable[..., Any], runs: Runs) -> None:
    runs.faults["timing-"] = running.FAULT
    code, said = compare(steps="2")
    assert code == 2 and "fewer than two" in said and "--output out --resume" in said
    runs.faults.clear()
    code, found = compare(begins=False)
    assert code == 0 and found["failed"] == []


def test_flags_beside_resume_must_be_what_they_were(
    compare: Callable[..., Any], runs: Runs
) -> None:
    assert compare(steps="2", set="dpo.beta=0.2")[0] == 0
    kept = Path("out/config.yaml").read_bytes()
    Path("c.yaml").write_text(yaml.safe_dump({"batch_size": 9, "methods": {
        "ipo": {"weight_decay": 0.5}, "dpo": {"beta": 0.2}}}))  # fmt: skip
    for flags, words in (
        ({"seeds": "5"}, "seeds"), ({"budget": "1h"}, "budget, steps"), ({"steps": "3"}, "steps"),
        ({"budget_per_run": "2m"}, "budget_per_run, steps"), ({"samples": "9"}, "steps, samples"),
        ({"rates": "1e-4"}, "rates"), ({"set": "dpo.beta=0.5"}, "settings of dpo"),
        ({"set": "ipo.terms.0.tau=0.5"}, "settings of ipo"), ({"set": "seed=4"}, "seed"),
        ({"methods": "dpo,rloo"}, "methods"), ({"batch_size": "9"}, "batch_size"),
        ({"config": "c.yaml"}, "batch_size, settings of ipo"), ({"gold": "length:min"}, "gold"),
    ):  # fmt: skip
        code, said = compare(begins=False, **flags)
        assert code == 2 and f"resume 'out': {words} differ" in said, said
    code, said = compare("--keep-models", begins=False)
    assert code == 2 and "keep_models differs" in said
    assert kept == Path("out/config.yaml").read_bytes()


def test_a_gold_reward_alone_is_the_same_beside_resume() -> None:
    given = cli_compare._asked(
        {"gold": "length:min", "data": "my.jsonl"},
        {"methods": "dpo,ipo", "set": (), "config": None, "seeds": None, "rates": None,
         "keep_models": False, "budget": None, "budget_per_run": None, "samples": None, "steps": 2},
    )  # fmt: skip
    assert cli_compare._other_settings(given, {"gold": "length:min"}) == []
    assert cli_compare._other_settings(given, {"gold": "length:mode"}) == ["reward"]


def test_the_same_flags_beside_resume_are_taken(compare: Callable[..., Any], runs: Runs) -> None:
    """And those of this machine, whatever the other's are."""
    Path("c.yaml").write_text(yaml.safe_dump({"batch_size": 4, "methods": {
        "ipo": {"weight_decay": 0.5}, "dpo": {}}}))  # fmt: skip
    begun = {"steps": "2", "set": "dpo.terms.0.beta=0.2", "config": "c.yaml"}
    begun |= {"device": "cuda", "threads": "7"}
    assert compare("--keep-models", **begun)[0] == 0
    assert all(not {"threads", "device"} & job.settings.keys() for job in read(Path("out")))
    result("final-dpo-s1").unlink()
    runs.keys()
    here = {"device": "cpu", "threads": "2"}
    code, _ = compare("--keep-models", "--resume", **{**begun, **here})
    (job,) = runs.done
    assert code == 0 and job.settings["device"] == "cpu" and job.settings["threads"] == 2
    assert compare(begins=False)[0] == 0, "none is needed"
