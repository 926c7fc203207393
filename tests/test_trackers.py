"""What a run tells trackers, read back from what they wrote: the real ones, each by itself."""

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from preftune import trackers, train
from preftune.events import Event
from preftune.runs import RunFolder

SETTINGS = {
    "method": "dpo", "max_steps": 3, "batch_size": 2, "max_length": 64, "trackers": ["tensorboard"],
}  # fmt: skip


def needs(name: str) -> None:
    if util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each curve that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {n: [(e.step, e.value) for e in read.Scalars(n)] for n in read.Tags()["scalars"]}


def of_file(run: Any, name: str) -> list[tuple[int, float]]:
    rows = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in rows]


def test_tensorboard_has_what_metrics_jsonl_has(
    here: Path, tiny_model: str, pairs_file: str
) -> None:
    needs("tensorboard")
    run = train({**SETTINGS, "model": tiny_model, "data": pairs_file, "output": "run"})
    found = scalars(run.folder)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert found[name] == of_file(run, name)
        assert len(found[name]) == 3
    written = [p.read_text() for p in (run.folder / "tensorboard").rglob("hparams.yml")]
    assert len(written) == 1 and "terms.0.objective: dpo" in written[0]


def test_a_run_that_goes_on_draws_one_line(here: Path, tiny_model: str, pairs_file: str) -> None:
    needs("tensorboard")
    given = {**SETTINGS, "model": tiny_model, "data": pairs_file, "output": "run", "save_every": 2}

    def killed(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(given, callbacks=[killed])
    run = train({**given, "max_steps": 4, "resume": True})
    steps = [step for step, _ in scalars(run.folder)["loss"]]
    assert steps == [1, 2, 3, 4], "step 3 was done twice, and stands once"


def test_a_failing_tracker_stops_no_run(
    here: Path, tiny_model: str, pairs_file: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    needs("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def full(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    with caplog.at_level(logging.WARNING, "preftune"):
        run = train({**SETTINGS, "model": tiny_model, "data": pairs_file, "output": "run"})
    assert len(run.metrics) == 3 and (run.folder / "model" / "config.json").is_file()
    (said,) = [r.getMessage() for r in caplog.records if "tensorboard" in r.getMessage()]
    assert "No space left on device" in said and "metrics.jsonl" in said


def test_what_cannot_be_told(refused: Any, tiny_model: str, pairs_file: str, monkeypatch) -> None:
    rest = ["train", "--model", tiny_model, "--data", pairs_file, "--output", "run"]
    assert "'tensorboard', 'wandb'" in refused(*rest, "--trackers", "tensorbord")
    assert "Did you mean '--trackers'?" in refused(*rest, "--report-to", "wandb")
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    said = refused(*rest, "--trackers", "wandb", "mlflow")
    assert "pip install wandb mlflow" in said
    assert not Path("run").exists()


def test_settings_and_metrics_as_plain_values() -> None:
    nested = {"a": {"b": 1, "c": None}, "terms": [{"w": 0.5}, {"w": True}], "names": ["x", "y"]}
    assert trackers._flat(nested) == {
        "a.b": 1, "terms.0.w": 0.5, "terms.1.w": True, "names": "['x', 'y']",
    }  # fmt: skip
    metrics = {"step": 3, "loss": None, "kl": 0.5, "ended": "plateau", "modes": {"a": 2}}
    assert trackers._numbers(metrics) == {"kl": 0.5, "modes.a": 2.0}


def in_process(name: str, here: Path, *arguments: str) -> None:
    """Train in a process of its own: these clients keep threads and settings of the process."""
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "train", *arguments, "--trackers", name],
        cwd=here, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_other_trackers_have_it_too(
    here: Path, tiny_model: str, pairs_file: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name)
    own = {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(here / "trackio"),
        # the small package has no data base
        "MLFLOW_TRACKING_URI": (here / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    for key, value in own.items():
        monkeypatch.setenv(key, value)
    given = ["--model", tiny_model, "--data", pairs_file, "--output", "run", "--batch-size", "2"]
    in_process(name, here, *given, "--max-steps", "2", "--save-every", "2")
    first = RunFolder(here / "run").read_json("trackers.json")
    in_process(name, here, *given, "--max-steps", "3", "--resume")
    assert RunFolder(here / "run").read_json("trackers.json") == first, "the same run there"
    losses = [row["loss"] for row in RunFolder(here / "run").read("metrics.jsonl")]
    assert READ[name](here) == pytest.approx(losses, rel=1e-6)


def records(path: Path) -> Iterator[bytes]:
    """Of a file in LevelDB's log format behind 7 bytes of W&B's: blocks of 32 KiB, in them pieces
    of a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def of_wandb(here: Path) -> list[float]:
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((here / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in records(path):
            items = wandb_internal_pb2.Record.FromString(data).history.item
            found += [json.loads(i.value_json) for i in items if "loss" in (i.key, *i.nested_key)]
    return found


def of_trackio(here: Path) -> list[float]:
    import sqlite3

    (path,) = (here / "trackio").glob("preftune*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    return [found["loss"] for (text,) in rows if "loss" in (found := json.loads(text))]


def of_mlflow(here: Path) -> list[float]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((here / "mlruns").as_uri())
    run = RunFolder(here / "run").read_json("trackers.json")["mlflow"]
    return [m.value for m in client.get_metric_history(run, "loss")]


READ = {"wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}
