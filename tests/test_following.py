"""Training on a file while rows are appended to it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import cli
from preftune.collecting import Context, Cursor
from preftune.config import load
from preftune.data import Rows
from preftune.errors import UserError
from preftune.events import Event
from preftune.following import TAKEN, Followed
from preftune.training import Run, train

pytestmark = pytest.mark.long


def row(number: int) -> dict[str, Any]:
    return {"prompt": f"Say {number}.", "chosen": f"{number}", "rejected": f"I say {number} now"}


def put(path: Path, *numbers: int, more: str = "") -> None:
    with path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row(n)) + "\n" for n in numbers)
        out.write(more)


class Person:
    """Says more each time that the run waits."""

    def __init__(self, *said: Callable[[], None]) -> None:
        self.said = list(said)
        self.heard: list[str] = []

    def __call__(self, event: Event) -> None:
        if event.kind != "note":
            return
        self.heard.append(event.message)
        if event.message.startswith("waiting for rows") and self.said:
            self.said.pop(0)()


@pytest.fixture
def go(here: Path, tiny_model: str) -> Callable[..., Run]:
    def begin(person: Person | None = None, **changes: Any) -> Run:
        settings = {
            "model": tiny_model, "data": "labels.jsonl", "follow": 0.05, "max_steps": 20,
            "batch_size": 4, "output": "out", "lr_schedule": "constant", "warmup_ratio": 0,
            "learning_rate": 1e-3,
        }  # fmt: skip
        return train(settings | changes, callbacks=[person] if person else ())

    return begin


def losses(run: Run) -> list[float]:
    return [r["loss"] for r in run.metrics if "loss" in r]


def taken(folder: Path) -> list[list[str]]:
    lines = (folder / TAKEN).read_text().splitlines()
    return [[json.loads(x)["chosen"] for x in json.loads(w)["lines"]] for w in lines]


def test_rows_are_taken_as_they_come_each_once(here: Path, go: Callable[..., Run]) -> None:
    labels = here / "labels.jsonl"
    put(labels, *range(8))
    person = Person(lambda: put(labels, 8, 9, 10, 11, 12), lambda: put(labels, 13))
    run = go(person)
    assert taken(here / "out") == [
        [str(n) for n in range(8)], [str(n) for n in range(8, 13)], ["13"],
    ]  # fmt: skip
    assert len(losses(run)) == 2 + 2 + 1, "an update a batch, the last of a wave is short"
    assert run.metrics[-1] == {"step": 5, "ended": "data"}
    assert (here / "out" / "model" / "model.safetensors").is_file()
    assert any("5 new rows of labels.jsonl, 13 in all" in x for x in person.heard)
    assert any("no new row of labels.jsonl came" in x for x in person.heard)


def test_the_first_rows_train_as_without_it(here: Path, go: Callable[..., Run]) -> None:
    put(here / "labels.jsonl", *range(8))
    followed = go()
    plain = go(follow=None, max_steps=2, output="plain", reference_cache=False)
    assert losses(followed) == losses(plain)


def test_going_on_takes_the_same_waves_and_then_what_is_new(
    here: Path, go: Callable[..., Run]
) -> None:
    labels = here / "labels.jsonl"
    put(labels, *range(8))
    whole = go(Person(lambda: put(labels, *range(8, 14))), output="whole")

    labels.unlink()
    put(labels, *range(8))
    go(Person(lambda: put(labels, *range(8, 14))), max_steps=3, save_every=1)  # in mid-wave
    text = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join(text[:3] + text[4:]))  # row 3 was taken back, and is trained on
    put(labels, *range(14, 18))
    again = go(resume=True, max_steps=20)
    assert losses(again)[:4] == losses(whole)
    assert taken(here / "out")[2] == [str(n) for n in range(14, 18)]
    assert again.metrics[-1]["step"] == 5

    put(labels, *range(18, 22))  # after it had ended
    more = go(resume=True, max_steps=20)
    assert losses(more)[:5] == losses(again) and len(losses(more)) == 6


@pytest.mark.parametrize("method", ["dpo", "kto"])  # kto reads the row after each, too
def test_a_wave_that_was_copied_and_not_trained_on_comes_again(
    here: Path, go: Callable[..., Run], method: str
) -> None:
    labels = here / "labels.jsonl"
    put(labels, *range(8))
    whole = go(Person(lambda: put(labels, *range(8, 13))), method=method, save_every=1)
    kept = sorted((here / "out" / "checkpoints").iterdir())
    assert len(_lines(here)) == 2 and len(kept) == 2
    # killed in the first wave, before any of the second was trained on
    for path in (*kept, here / "out" / "model"):
        shutil.rmtree(path)
    labels.write_text("")  # the run has its own copy
    put(labels, 20)
    again = go(Person(), method=method, resume=True, save_every=1)
    assert losses(again)[: len(losses(whole))] == losses(whole)
    assert taken(here / "out")[2] == ["20"] and again.metrics[-1]["ended"] == "data"
    assert sum("ended" in r for r in again.metrics) == 1


def test_what_does_not_go_with_the_first_rows_is_kept_apart(
    here: Path, go: Callable[..., Run]
) -> None:
    labels = here / "labels.jsonl"
    put(labels, *range(4))
    other = json.dumps({"prompt": "a", "completion": "b\u2028c", "label": True}) + "\n"
    go(Person(lambda: put(labels, more=other * 4)), method="pref_ft")
    refused = (here / "out.rejected.jsonl").read_text()
    assert refused.count("completions, where the file began with pairs") == 4
    put(labels, *range(4, 8))
    run = go(method="pref_ft", resume=True)
    assert len(_lines(here)) == 2 and len(losses(run)) == 2


def test_its_end_is_evaluated_in_full(here: Path, go: Callable[..., Run]) -> None:
    put(here / "labels.jsonl", *range(8))
    with (here / "held.jsonl").open("w") as out:
        out.writelines(json.dumps(row(n)) + "\n" for n in range(40, 44))
    run = go(eval_data="held.jsonl", eval_every=2, max_new_tokens=4)
    assert run.metrics[-1]["ended"] == "data" and "eval_forward_kl" in run.metrics[-1]
    shown = [json.loads(x) for x in (here / "out" / "samples.jsonl").read_text().splitlines()]
    counts = Counter(r["step"] for r in shown)
    assert counts[0] == counts[2], "the fuller evaluation stands for the other"
    again = go(eval_data="held.jsonl", eval_every=2, max_new_tokens=4, resume=True)
    assert again.metrics == run.metrics


def test_a_run_does_not_change_its_kind(here: Path, go: Callable[..., Run]) -> None:
    put(here / "labels.jsonl", *range(8))
    go(max_steps=1, save_every=1)
    with pytest.raises(UserError, match="follow"):
        train(_of(here) | {"output": "out", "resume": True, "max_steps": 3, "follow": None})
    assert go(resume=True, follow=0.1).metrics[-1]["ended"] == "data"


def _of(here: Path) -> dict[str, Any]:
    """The run's own settings but for `follow`."""
    found = load(here / "out" / "config.yaml").model_dump(exclude_none=True)
    return {k: v for k, v in found.items() if k not in ("follow", "resume", "max_steps")}


def test_a_wave_is_gone_through_as_often_as_epochs_say(here: Path, go: Callable[..., Run]) -> None:
    put(here / "labels.jsonl", *range(8))
    person = Person(lambda: put(here / "labels.jsonl", *range(8, 12)))
    assert len(losses(go(person, epochs=3))) == 3 * 2 + 3


def test_rows_half_written_wait_and_bad_ones_are_kept(here: Path, go: Callable[..., Run]) -> None:
    labels = here / "labels.jsonl"
    put(labels, *range(4))
    half = json.dumps(row(8))
    person = Person(
        lambda: put(labels, 4, 5, 6, more='{"prompt": "no more"}\n' + half[:20]),
        lambda: put(labels, more=half[20:] + "\n"),
    )
    run = go(person)
    assert [len(wave) for wave in _lines(here)] == [4, 4, 1]
    assert len(losses(run)) == 3
    refused = (here / "out.rejected.jsonl").read_text()
    assert "no more" in refused and "Say" not in refused


def _lines(here: Path) -> list[list[str]]:
    return [json.loads(x)["lines"] for x in (here / "out" / TAKEN).read_text().splitlines()]


def test_fresh_samples_answer_the_first_prompts(here: Path, go: Callable[..., Run]) -> None:
    put(here / "labels.jsonl", *range(4))
    person = Person(lambda: put(here / "labels.jsonl", *range(4, 8)))
    run = go(person, method="hypo", max_new_tokens=4)
    assert len(run.metrics) >= 2 and run.parts.prompts is not None
    assert len(run.parts.prompts) == 4 and run.parts.data is not None and len(run.parts.data) == 8


def test_waiting_ends_at_a_signal(here: Path, tiny_model: str, monkeypatch: Any) -> None:
    import os
    import signal

    put(here / "labels.jsonl", *range(4))
    args = ["--model", tiny_model, "--data", "labels.jsonl", "--max-steps", "9", "--output", "out"]
    from preftune import following

    monkeypatch.setattr(following.time, "sleep", lambda s: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.run(["train", *args, "--batch-size", "4", "--follow", "600"]) == 75
    assert (here / "out" / "checkpoints" / "step-000001").is_dir()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-steps", "9", "--method", "rloo", "--reward", "length:min"], "reads no data"),
        ([], "max_steps: follow needs it"),
        (["--max-steps", "9", "--eval-fraction", "0.1"], "give eval_data"),
        (["--max-steps", "9", "--reference-cache", "true"], "reference_cache: follow"),
        (["--max-steps", "9", "--data", "none.jsonl"], "Give a .jsonl file that is there"),
        (["--max-steps", "9", "--data", "empty.jsonl"], "holds no row yet"),
        (["--max-steps", "9", "--data", "bad.jsonl"], "data 'bad.jsonl': "),
    ],
)
def test_what_does_not_go_with_it(
    here: Path, flags: list[str], said: str, refused: Callable[..., str], tiny_model: str
) -> None:
    put(here / "labels.jsonl", *range(4))
    (here / "empty.jsonl").write_text("\n")
    (here / "bad.jsonl").write_text('{"prompt": "no answer"}\n')
    given = ["--model", tiny_model, "--follow", "9", *flags]
    if "--data" not in flags:
        given += ["--data", "labels.jsonl"]
    assert said in refused("train", *given)


def test_an_epoch_is_a_wave_in_an_order_by_chance() -> None:
    rows = Rows(
        prompts=[[n] for n in range(30)], responses=[([n], [n + 1]) for n in range(30)],
        finished=[(True, True)] * 30, columns={}, texts=[""] * 30, where=[""] * 30, kind="pairs",
    )  # fmt: skip
    data = Followed(
        path=Path("x"), times=2, load=lambda wave: (rows, []), refuse=lambda more: None,
        scored=False, waves=[], rows=rows, ends=[20, 30],
    )  # fmt: skip
    ctx: Any = Context(
        data=data, policy=None, reference=None, version=0, seed=0, cursor=Cursor(), kept={},
    )  # type: ignore[arg-type] # fmt: skip
    passes = [ctx.next_rows(30, 7, wrap=False) for _ in range(4)]
    assert [sorted(p.tolist()) for p in passes] == [[*range(20)]] * 2 + [[*range(20, 30)]] * 2
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[2], passes[3])
    assert not data.has(4)
