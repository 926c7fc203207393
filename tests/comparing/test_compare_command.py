"""`preftune compare` in process, with a tiny model: from the flags to the page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune import cli
from preftune.comparing import running
from preftune.comparing.stages import once

pytestmark = pytest.mark.long

PAIRS = 33
"""Of as many prompts: eleven are held out."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "my.jsonl"
    rows = [
        {"prompt": f"Say {i} <b>now</b>.", "chosen": "yes" * (1 + i % 2), "rejected": "no" * 5}
        for i in range(PAIRS)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def args(here: Path, tiny_model: str, pairs: str) -> Callable[..., list[str]]:
    """Arguments of a small comparison, in this process alone."""

    def make(*more: str, output: str = "out", **changes: str) -> list[str]:
        given = {"methods": "dpo,on_policy_dpo", "model": tiny_model, "data": pairs}
        given |= {"reward": "length:min", "seeds": "2", "batch_size": "2", "max_new_tokens": "4"}
        given |= {"workers": "0", "threads": "1", "device": "cpu", "dtype": "float32"}
        given |= {"output": output, **changes}
        flags = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
        return ["compare", *flags, *more]

    return make


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in (folder / "results").glob("*.json")}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("seconds", "whole", "notes")
        return {k: without_times(v) for k, v in value.items() if k not in left_out}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, pairs: str
) -> tuple[Path, dict[str, Any]]:
    """A comparison with a failing run: what it printed, and its folder."""
    import contextlib
    import io

    import torch

    folder = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    out = io.StringIO()
    given = ["--methods", "pref_ft,on_policy_dpo", "--model", tiny_model, "--data", pairs,
             "--reward", "length:min", "--gold", "length:within=3", "--steps", "3", "--seeds", "2",
             "--rates", "1e-3,1e-2", "--batch-size", "2", "--max-new-tokens", "4", "--workers",
             "0", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--json",
             "--output", str(folder)]  # fmt: skip
    with contextlib.redirect_stdout(out):
        assert cli.run(["compare", *given]) == 0
    return folder, json.loads(out.getvalue())


def test_everything_is_there_and_stdout_is_one_document(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    assert found == json.loads((folder / "compare.json").read_text())
    assert [m["name"] for m in found["methods"]] == ["pref_ft", "on_policy_dpo"]
    assert found["judged_by"] == "gold" and found["facts"]["label_source"] == "true"
    for method in found["methods"]:
        assert method["runs"] == [0, 1] and method["updates"] == [3, 3]
        assert {"reward", "gold", "kl", "length", "entropy"} <= method["figures"].keys()
        assert len(method["curves"]) == 2
        steps = [p["step"] for p in method["curves"][0]["points"]]
        assert steps == [0, 1, 2, 3]
        assert method["curves"][0]["points"][0]["kl"] == 0.0
    (pair,) = found["pairs"]
    assert pair["seeds"] == 2 and pair["prompts"] == found["prompts"]["final"]
    assert found["verdict"] and found["failed"] == []
    left = {p.name for p in folder.glob("runs/*/*")}
    assert "model" not in left and "checkpoints" not in left and "metrics.jsonl" in left


def test_held_out_prompts_are_apart(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    parts = {
        name: [json.loads(line)["prompt"] for line in (folder / f"data/{name}.jsonl").open()]
        for name in ("train", "selection", "final")
    }
    whole = [prompt for own in parts.values() for prompt in own]
    assert len(whole) == len(set(whole)) == PAIRS
    assert {n: len(own) for n, own in parts.items()} == {"train": 22, "selection": 3, "final": 8}
    assert found["prompts"] | {"given": False} == found["prompts"]


def test_rates_are_chosen_by_runs_of_their_own(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    kept = results(folder)
    for method in found["methods"]:
        grid = method["choice"]["grid"]
        assert [row["rate"] for row in grid] == [1e-3, 1e-2]
        best = max(grid, key=lambda row: (row["reward"], -row["rate"]))
        assert method["rate"] == best["rate"]
        for rate in ("0.001", "0.01"):
            run = kept[f"rate-{method['name']}-{rate}"]
            assert run["seed"] == 1000 and "gold" not in run["answers"]
        assert kept[f"final-{method['name']}-s0"]["rate"] == method["rate"]


def test_responses_are_counted(done: tuple[Path, dict[str, Any]]) -> None:
    """Three updates of two items: pref_ft trains on a response each, pairs of fresh samples on two
    each, drawn for two of three updates and trained on twice."""
    _, found = done
    imitates, contrasts = (m["spent"] for m in found["methods"])
    assert (imitates["trained"], imitates["drawn"], imitates["judged"]) == (6, 0, 0)
    assert (contrasts["trained"], contrasts["drawn"], contrasts["judged"]) == (12, 8, 8)


def test_the_page_escapes_what_comes_from_data(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;now&lt;/b&gt;" in page and "<b>now</b>" not in page
    assert found["verdict"][0].split(":")[0] in page
    for key in ("step", "trained", "seconds", "kl"):
        assert f"data-axis={key} " in page
    assert "Gold reward against KL" in page and "best of 2" in page


def test_a_killed_comparison_goes_on_to_the_same_results(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without two of its runs, one of them half-way, and without what was made of them."""
    folder, found = done
    shutil.copytree(folder, tmp_path / "cut")
    cut = tmp_path / "cut"
    for key in ("final-pref_ft-s1", "rate-on_policy_dpo-0.01"):
        (cut / "results" / f"{key}.json").unlink()
    metrics = cut / "runs/final-pref_ft-s1/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    for name in ("compare.json", "report.html", "final.json", "chosen/on_policy_dpo.json"):
        (cut / name).unlink()
    before = {p.name: p.stat().st_mtime_ns for p in (cut / "results").iterdir()}
    capsys.readouterr()
    assert cli.run(["compare", "--output", str(cut), "--resume", "--workers", "0", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert without_times(results(cut)) == without_times(results(folder))
    assert without_times(again) == without_times(found)
    kept = {p.name: p.stat().st_mtime_ns for p in (cut / "results").iterdir()}
    assert before.items() <= kept.items(), "finished runs are not run again"


def test_a_failed_run_is_shown_and_the_others_count(
    args: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from preftune.errors import GuardStop

    trained = running._trained

    def breaks(job: Any, *rest: Any) -> dict[str, Any]:
        if job.key in ("final-dpo-s1", "rate-dpo-0.01"):
            raise GuardStop("step 2: the loss is <nan>")
        return trained(job, *rest)

    monkeypatch.setattr(running, "_trained", breaks)
    assert cli.run(args("--json", steps="2", rates="1e-3,1e-2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["method"], f["what"]) for f in found["failed"]] == [
        ("dpo", "learning rate 0.01"), ("dpo", "seed 1 (stopped by a guard)"),
    ]  # fmt: skip
    methods = {m["name"]: m for m in found["methods"]}
    assert methods["dpo"]["runs"] == [0] and methods["dpo"]["rate"] == 1e-3
    assert methods["on_policy_dpo"]["runs"] == [0, 1]
    (pair,) = found["pairs"]
    assert pair["seeds"] == 1 and pair["better"] is None, "one seed tells nothing"
    page = Path("out/report.html").read_text()
    assert "the loss is &lt;nan&gt;" in page and "1 of 2" in page
    # nothing of a method is left: nothing is compared
    monkeypatch.setattr(running, "_trained", lambda job, *rest: (
        breaks(job, *rest) if job.entry != "dpo" or job.kind == "timing"
        else breaks(type(job)(**{**vars(job), "key": "final-dpo-s1"}), *rest)))  # fmt: skip
    assert cli.run(args(steps="2", rates="1e-3", output="out2")) == 3


def test_settings_of_one_method_and_names_of_its_own(
    args: Callable[..., list[str]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump({
        "methods": {"strict": {"method": "dpo", "beta": 0.5}, "loose": {"method": "dpo"}},
        "label_smoothing": 0.1,
    }))  # fmt: skip
    more = ["--config", "c.yaml", "--set", "loose.terms.0.beta=0.01", "--set",
            "strict.learning_rate=0.001", "--keep-models", "--json"]  # fmt: skip
    given = args(*more, steps="1", methods="strict,loose", rates="1e-4,1e-3")
    assert cli.run(given) == 0
    found = json.loads(capsys.readouterr().out)
    strict, loose = found["methods"]
    assert not strict["choice"]["chosen"] and strict["rate"] == 1e-3
    assert loose["choice"]["chosen"]
    for name, beta in (("strict", 0.5), ("loose", 0.01)):
        run = here / f"out/runs/final-{name}-s1"
        term = yaml.safe_load((run / "config.yaml").read_text())["terms"][0]
        assert term["settings"] == {"beta": beta, "label_smoothing": 0.1}
        assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "dpo"}, "two or more"),
        ({"methods": "dpo,dpp"}, "Did you mean 'dpo"),
        ({"methods": "dpo,dpo"}, "given twice"),
        ({"methods": "dpo,reward"}, "no policy"),
        ({"seeds": "1"}, "Give 2 or more"),
        ({"budget": "soon"}, "--budget 'soon'"),
        ({"budget": "1m", "steps": "3"}, "give one of them"),
        ({"steps": "0"}, "Give 1 or more"),
        ({"rates": "fast"}, "--rates 'fast'"),
        ({"set": "hypo.terms.1.weight=1"}, "there is no 'hypo.terms.1.weight'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_rows": "20"}, "too few"),
        ({"workers": "-1"}, "Give 0 or more"),
        ({"set": "dpo.reward=length:min"}, "dpo: 'reward' of one method"),
        ({"set": "on_policy_dpo.max_new_tokens=9"}, "as --max-new-tokens"),
        ({"set": "dpo.max_steps=9"}, "'max_steps' is what compare decides"),
    ],
)
def test_mistakes(
    args: Callable[..., list[str]], refused: Callable[..., str], changes: dict[str, str], words: str
) -> None:
    """Each leaves the folder free."""
    assert words in refused(*args(**changes))


def test_a_reward_is_needed(refused: Callable[..., str], pairs: str) -> None:
    assert "Give --reward" in refused("compare", "--methods", "dpo,ipo", "--data", pairs)


def test_another_folder_is_left_alone(
    args: Callable[..., list[str]], refused: Callable[..., str], here: Path
) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "x.txt").write_text("keep me")
    assert "not empty" in refused(*args(output="mine"))
    (here / "mine" / "config.yaml").write_text("method: dpo\n")
    assert "holds no comparison" in refused(*args("--resume", output="mine"))
    assert (here / "mine" / "x.txt").exists()


def test_a_decision_is_made_once(tmp_path: Path) -> None:
    assert once(tmp_path / "plan.json", {"seeds": 3}) == {"seeds": 3}
    assert once(tmp_path / "plan.json", {"seeds": 2}) == {"seeds": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_going_on_with_other_settings_is_refused(
    done: tuple[Path, dict[str, Any]], refused: Callable[..., str]
) -> None:
    """Those of a machine may differ."""
    folder = str(done[0])
    given = ("compare", "--output", folder, "--resume", "--workers", "0")
    assert "batch_size differs" in refused(*given, "--batch-size", "16")
    more = ("--methods", "pref_ft,dpo", "--reward", "length:min", "--data", "x.jsonl")
    assert "data, methods differ from" in refused(*given, *more)
    assert cli.run([*given, "--threads", "1"]) == 0


@pytest.mark.slow
def test_two_workers_whose_parent_is_killed(
    args: Callable[..., list[str]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes of their own: they end with their parent, and another one finishes the rest."""
    import os
    import signal
    import subprocess
    import sys
    import time

    given = args("--json", steps="4", rates="1e-3", workers="2")
    with subprocess.Popen(
        [sys.executable, "-m", "preftune", *given], stdout=subprocess.PIPE
    ) as one:
        for _ in range(600):
            if len(list(here.glob("out/results/*.json"))) > 3:
                break
            time.sleep(0.2)
        os.kill(one.pid, signal.SIGKILL)
    before = set(here.glob("out/results/*.json"))
    assert len(before) > 3
    capsys.readouterr()
    assert cli.run(["compare", "--output", "out", "--resume", "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(m["runs"] == [0, 1] for m in found["methods"]) and not found["failed"]
    first = results(here / "out")
    shutil.rmtree(here / "out")
    assert cli.run(args("--json", steps="4", rates="1e-3")) == 0
    alone = results(here / "out")
    assert without_times(first) == without_times(alone), "whoever runs a job, it gives the same"
