"""Going on with a run: what ended it, what had changed, and what it must not lose."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune import automatic, checkpoint, durable, loop, run_output
from preftune.errors import Saved, UserError
from preftune.events import Event
from preftune.huggingface import load_model
from preftune.sampling import local
from preftune.training import Run, train

pytestmark = pytest.mark.long


@pytest.fixture
def go(here: Path, tiny_model: str, pairs_file: str) -> Callable[..., Run]:
    """Train in the folder `out`, of which the rate does not depend on the number of steps."""

    def begin(output: str = "out", objects: Any = None, callbacks: Any = (), **more: Any) -> Run:
        settings = {
            "model": tiny_model, "data": pairs_file, "output": output, "batch_size": 4,
            "max_steps": 4, "learning_rate": 1e-2, "max_new_tokens": 6, "threads": 1,
            "lr_schedule": "constant", "warmup_ratio": 0, **more,
        }  # fmt: skip
        given = {name: value for name, value in settings.items() if value is not ...}
        return train(given, callbacks=callbacks, **(objects or {}))

    return begin


def longer(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def saved(folder: str = "out") -> list[str]:
    return sorted(p.name for p in Path(folder, "checkpoints").glob("*"))


def check_same(a: Run, b: Run) -> None:
    x, y = (load_file(run.folder / "model" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x)
    logs = [[{k: v for k, v in m.items() if k != "seconds"} for m in r.metrics] for r in (a, b)]
    assert logs[0] == logs[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what ended it -------------------------------------------------------------------------------


def test_whatever_fails_in_an_update_what_was_reached_is_saved(go, monkeypatch) -> None:
    straight = go("whole", {"reward": longer}, method="rloo")
    calls, plain = [], local.generate

    def generate(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("a fault of ours")
        return plain(*args, **options)

    from preftune.policies import transformer

    monkeypatch.setattr(transformer, "generate", generate)
    with pytest.raises(RuntimeError, match="a fault of ours") as raised:
        go(objects={"reward": longer}, method="rloo")
    assert str(raised.value) == "a fault of ours" and "--resume" in raised.value.__notes__[0]
    assert saved() == ["step-000002"]
    check_same(straight, go(objects={"reward": longer}, method="rloo", resume=True))


def test_what_fails_after_a_step_was_logged_logs_it_once(go) -> None:
    def fail(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            raise ValueError("a callback's")

    straight = go("whole")
    with pytest.raises(ValueError, match="a callback's"):
        go(callbacks=[fail])
    assert saved() == ["step-000003"]
    check_same(straight, go(resume=True))
    times = Path("out/times.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in times] == [1, 2, 3, 4]


def test_half_an_update_is_not_saved(go, monkeypatch) -> None:
    """The optimizer's step is done, and what belongs to it is not."""

    def fail(run: loop.State) -> None:
        if run.step == 2:
            raise RuntimeError("lost the device")

    straight = go("whole", save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_follow", fail)
        with pytest.raises(RuntimeError, match="lost the device"):
            go(save_every=1)
    assert saved() == ["step-000001", "step-000002"]
    check_same(straight, go(save_every=1, resume=True))


def test_a_measure_that_fails_undoes_the_update(go, monkeypatch) -> None:
    straight, so_far, seen = go("whole"), loop._so_far, []

    def fail(run: loop.State) -> dict[str, Any]:
        seen.append(None)
        if len(seen) == 3:
            raise RuntimeError("no number")
        return so_far(run)

    monkeypatch.setattr(loop, "_so_far", fail)
    with pytest.raises(RuntimeError, match="no number"):
        go()
    check_same(straight, go(resume=True))


@pytest.mark.parametrize("best_by", [None, "-reward"])
def test_a_model_that_cannot_be_written_loses_no_step(best_by, go, monkeypatch) -> None:
    """With the best step's weights in the model's place, those of the last are kept before."""
    more = {"best_by": best_by, "eval_fraction": 0.25, "eval_every": 1} if best_by else {}
    objects = {"reward": longer}
    straight = go("whole", objects, **more)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(run_output, "_write_model", full)
        with pytest.raises(UserError, match=r"model: 'out/model' cannot be written.*Free space"):
            go(objects=objects, **more)
    assert "step-000004" in saved() and not Path("out/.tmp-model").exists()
    if best_by:
        state = json.loads(Path("out/checkpoints/step-000004/state.json").read_text())
        assert state["best"][0] < 4, "or nothing else would have been in its place"
        tensors = [load_file(p / "state.safetensors") for p in Path("out/checkpoints").iterdir()]
        weights = [t["policy/model.norm.weight"] for t in tensors]
        assert not torch.equal(weights[0], weights[-1])
    check_same(straight, go(objects=objects, resume=True, **more))


def test_a_signal_while_the_model_is_written_lets_it_be_written(go, monkeypatch) -> None:
    def reach(point: str) -> None:
        if point == "model":
            os.kill(os.getpid(), signal.SIGTERM)

    straight = go("whole")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "reach", reach)
        with pytest.raises(Saved, match="all of out but its page is written"):
            go()
    assert not Path("out/report.html").exists()
    check_same(straight, go(resume=True))
    assert Path("out/report.html").exists()


# --- what must not be lost -----------------------------------------------------------------------


def test_a_finished_run_without_checkpoints_is_not_begun_anew(go) -> None:
    first = go()
    before = contents(first.folder)
    with pytest.raises(UserError, match=r"ended at step 4 and kept no checkpoint.*--save-every"):
        go(resume=True, max_steps=6)
    assert contents(first.folder) == before
    notes: list[str] = []
    again = train({"output": "out", "resume": True}, callbacks=[lambda e: notes.append(e.message)])
    assert "out is finished" in notes and again.metrics == first.metrics


# --- what had changed ----------------------------------------------------------------------------


def rows(path: Path, count: int, **changes: Any) -> str:
    each = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"I say {n}"} | changes
            for n in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in each))
    return path.name


@pytest.mark.parametrize("what", ["data", "prompts", "eval_data"])
def test_rows_that_changed_are_refused(what, go, here) -> None:
    given = {name: rows(here / name, 12) for name in ("data.jsonl", "prompts.jsonl", "eval.jsonl")}
    files = dict(zip(("data", "prompts", "eval_data"), given, strict=True))
    more = {"method": "hypo", "save_every": 2, **files}
    go(**more, max_steps=2)
    before = contents(here / "out")
    rows(here / files[what], 14)
    with pytest.raises(UserError, match=f"the rows of {what} are not those that the run began"):
        go(**more, resume=True)
    assert {n for n, x in contents(here / "out").items() if before.get(n) != x} <= {
        str(here / "out" / "config.yaml")
    }
    rows(here / files[what], 12)
    assert go(**more, resume=True).metrics[-1]["step"] == 4


def test_labels_that_changed_are_refused(go, here) -> None:
    more = {"data": rows(here / "data.jsonl", 12, probability=0.9), "save_every": 2}
    go(**more, max_steps=2)
    rows(here / "data.jsonl", 12, probability=0.1)
    with pytest.raises(UserError, match="the rows of data are not those"):
        go(**more, resume=True)


def test_a_checkpoint_from_before_rows_were_hashed_is_taken(go, monkeypatch) -> None:
    collect = checkpoint._collect

    def earlier(run: loop.State) -> Any:
        tensors, plain = collect(run)
        plain["identity"] = {k: v for k, v in plain["identity"].items() if k in ("reference",)}
        return tensors, plain

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_collect", earlier)
        go(max_steps=2, save_every=2)
    assert go(save_every=2, resume=True).metrics[-1]["step"] == 4


def test_what_was_automatic_stays_as_it_was_found(go, monkeypatch) -> None:
    """In Python too, on a machine that has other memory free."""
    found: list[int] = []
    monkeypatch.setattr(automatic, "row_budget", lambda config, trunk: config.micro_batch_tokens
                        or found.append(1) or 5000 + len(found))  # fmt: skip
    go(max_steps=2, save_every=2)
    again = go(resume=True, save_every=2)
    assert again.parts.micro_batch_tokens == 5001 and again.metrics[-1]["step"] == 4


def test_an_object_in_place_of_a_model_brings_its_tokenizer_again(go, tiny_model) -> None:
    def begin(**more: Any) -> Run:
        model = load_model(tiny_model, torch.float32)
        return go(objects={"model": model}, model=..., save_every=2, **more)

    begin(max_steps=2)
    assert begin(resume=True).metrics[-1]["step"] == 4


def test_more_epochs_are_more_steps(go) -> None:
    """Twelve pairs, four an update."""
    first = go(max_steps=..., epochs=1, save_every=1)
    assert first.metrics[-1]["step"] == 3
    again = go(max_steps=..., epochs=2, save_every=1, resume=True)
    assert [m["step"] for m in again.metrics] == [1, 2, 3, 4, 5, 6]
    same = train({"output": "out", "resume": True})
    assert same.metrics == again.metrics


def test_steps_that_are_given_count_whatever_the_epochs(go) -> None:
    go(epochs=3, max_steps=2, save_every=1)
    notes: list[str] = []
    same = go(epochs=3, max_steps=..., save_every=1, resume=True,
              callbacks=[lambda e: notes.append(e.message)])  # fmt: skip
    assert "out is finished" in notes and same.metrics[-1]["step"] == 2
