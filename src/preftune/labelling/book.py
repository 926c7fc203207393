"""What annotators said, on disk: a journal of all of it, and the pairs that training reads.

`labels.jsonl` has a row a preference, as `train` takes it, and may be read at any time.
`labels.jsonl.journal` beside it has every pair that was shown and every judgement, ties, skips and
what was undone among them; it is what a later session goes on from, and what `labels.jsonl` is made
from. A line is one write, on the disk before the page hears of it.
"""

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from preftune import durable
from preftune.errors import UserError

Choice = Literal["first", "second", "tie", "skip"]
"""Of a pair's responses; `skip` says nothing of them."""
CHOICES: tuple[Choice, ...] = ("first", "second", "tie", "skip")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to a prompt."""

    id: int
    row: int
    """Of the prompts' file."""
    prompt: Any
    """Text, or a list of messages."""
    responses: tuple[str, str]
    finished: tuple[bool, bool]
    writers: tuple[str, str]
    """Which model said it."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one annotator said of a pair."""

    pair: int
    annotator: str
    choice: Choice
    left: int
    """The response that stood on the left, 0 or 1."""
    seconds: float
    """It was looked at."""


class Book:
    """The two files. Its methods may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Open a new book, or go on with one.

        Raises:
            UserError: the file is not a book's, its journal is damaged, or someone else has it.
        """
        self.path, self.journal = path, path.with_name(f"{path.name}.journal")
        self.pairs: dict[int, Pair] = {}
        self.judged: dict[tuple[int, str], Judgement] = {}
        """By pair and annotator, in the order in which it was said."""
        self._mutex = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self.journal.exists():
            raise UserError(
                f"output '{path}': there is such a file, which `preftune label` did not write. "
                "Give another one."
            )
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"output '{path}': another `preftune label` is writing there. "
                "Let several annotators share one page: each types a name."
            ) from None
        self._replay()
        if not path.exists() or path.read_text("utf-8") != self._text():
            durable.write_text(path, self._text())  # the last line of a crash, or none yet

    def close(self) -> None:
        """Let go of the files."""
        self._lock.release()

    def add(self, pair: Pair) -> None:
        """A pair that is ready to be shown."""
        with self._mutex:
            self._write(self.journal, {"kind": "pair", **asdict(pair)})
            self.pairs[pair.id] = pair

    def judge(self, said: Judgement) -> None:
        """What an annotator said; once a pair and annotator (`undo` comes before another)."""
        with self._mutex:
            assert said.pair in self.pairs, f"pair {said.pair} was never drawn"
            assert (said.pair, said.annotator) not in self.judged, "judged twice"
            self._write(self.journal, {"kind": "judgement", **asdict(said)})
            self.judged[said.pair, said.annotator] = said
            row = self._row(said)
            if row is not None:
                self._write(self.path, row)

    def undo(self, annotator: str) -> Pair | None:
        """Take back the last that an annotator said; None if there is nothing."""
        with self._mutex:
            own = [key for key in self.judged if key[1] == annotator]
            if not own:
                return None
            self._write(self.journal, {"kind": "undo", "pair": own[-1][0], "annotator": annotator})
            del self.judged[own[-1]]
            durable.write_text(self.path, self._text())
            return self.pairs[own[-1][0]]

    def snapshot(self) -> tuple[dict[int, Pair], list[Judgement]]:
        """Everything so far."""
        with self._mutex:
            return dict(self.pairs), list(self.judged.values())

    def _row(self, said: Judgement) -> dict[str, Any] | None:
        if said.choice not in ("first", "second"):
            return None
        pair, better = self.pairs[said.pair], int(said.choice == "second")
        row: dict[str, Any] = {"prompt": pair.prompt}
        for side, k in (("chosen", better), ("rejected", 1 - better)):
            row[side] = pair.responses[k]
            if not pair.finished[k]:
                row[f"{side}_finished"] = False
            row[f"{side}_model"] = pair.writers[k]
        return row | {"annotator": said.annotator, "pair": said.pair}

    def _text(self) -> str:
        rows = (self._row(said) for said in self.judged.values())
        return "".join(json.dumps(row) + "\n" for row in rows if row is not None)

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            done = os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if done != len(line):
            raise OSError(28, os.strerror(28), str(path))

    def _replay(self) -> None:
        """Take the journal's lines; one that a crash cut off at the end is taken away."""
        self.journal.touch()
        text = self.journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            durable.write_bytes(self.journal, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(dict(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"'{self.journal}', line {number}: {error!r}. It is damaged; move both files "
                    "away, and start anew."
                ) from None

    def _take(self, row: dict[str, Any]) -> None:
        kind = row.pop("kind")
        if kind == "pair":
            twos: Any = {k: tuple(row.pop(k)) for k in ("responses", "finished", "writers")}
            pair = Pair(**row, **twos)
            self.pairs[pair.id] = pair
        elif kind == "judgement":
            said = Judgement(**row)
            if said.choice not in CHOICES or said.pair not in self.pairs:
                raise ValueError("no such choice or pair")
            self.judged[said.pair, said.annotator] = said
        elif kind == "undo":
            del self.judged[row["pair"], row["annotator"]]
        else:
            raise ValueError(f"kind {kind!r}")
