"""Training on a file of rows while others append to it: `follow` in the settings.

The rows are taken in *waves*, each of them gone through `epochs` times: the first is what stands in
the file, every later one what has come since, an update's worth at least. A copy of each wave goes
into the run folder before it is trained on, so a resumed run takes the same rows in the same order,
whatever became of the file; a row that was taken back there (`u` on the page of `preftune label`)
stays in the waves that had it.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from preftune.config import Config
from preftune.data import Rejected, Rows, parse
from preftune.data.files import ending
from preftune.errors import NoRows, UserError
from preftune.loading import has_scores
from preftune.method import Method
from preftune.rounds import Group
from preftune.runs import RunFolder
from preftune.samples import Samples
from preftune.team import current

TAKEN = "followed.jsonl"
"""Of the run folder: a wave a line."""
LOOK = 1.0
"""Seconds between looks at the file."""


class Wave(list[Any]):
    """Rows of a wave; as a text, the file that they are of."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        super().__init__(map(parse, lines))
        self.path = path

    def __str__(self) -> str:
        return str(self.path)


Load = Callable[[Wave], tuple[Rows, list[Rejected]]]
"""A wave as token ids, and the rows that were refused.

It raises a UserError where none is left.
"""


def check(config: Config, method: Method) -> None:
    """Refuse what does not go with `follow`, before anything is loaded.

    Raises:
        UserError: which setting, and what to do.
    """
    if config.follow is None:
        return
    if not any(term.source.reads for term in method.terms):
        raise UserError(f"follow: the method '{method.name}' reads no data. Leave it out.")
    path = Path(config.data or "")
    if not path.is_file() or ending(path) != ".jsonl" or path.suffix in (".gz", ".xz"):
        raise UserError(
            f"follow: data is '{config.data}'. Give a .jsonl file that is there, as "
            "`preftune label` writes it."
        )
    wrong = {
        "max_steps": "needs it, for nobody knows how many rows will come"
        if config.max_steps is None
        else None,
        "eval_fraction": "cannot set rows aside that are not there yet; give eval_data"
        if config.eval_fraction
        else None,
        "max_rows": "takes the rows as they come; leave it out" if config.max_rows else None,
        "reference_cache": "has rows that it cannot hold yet; leave it out"
        if config.reference_cache
        else None,
    }
    for name, reason in wrong.items():
        if reason:
            raise UserError(f"{name}: follow {reason}.")
    if current().size > 1:
        raise UserError("follow: not with several processes. Launch one.")


@dataclass(kw_only=True)
class Followed:
    """The data of such a run (see `collecting.Data`); an epoch of them goes through one wave."""

    path: Path
    times: int
    """That each wave is gone through."""
    load: Load
    waves: list[list[str]]
    """Lines of the file, by wave."""
    rows: Rows
    """Of all waves so far; it grows."""
    ends: list[int]
    """Rows up to the end of each wave."""
    refuse: Callable[[list[Rejected]], None]
    """Keeps refused rows of the waves after the first."""
    folder: RunFolder | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        """See `Data.samples`."""
        return self.rows.samples(index, responses=responses)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """See `Data.prompts_only`."""
        return self.rows.prompts_only(index)

    def has(self, epoch: int) -> bool:
        """Whether the wave of this epoch was taken."""
        return epoch // self.times < len(self.ends)

    def span(self, epoch: int) -> tuple[int, int]:
        """First row of an epoch, and the row behind its last."""
        wave = epoch // self.times
        assert wave < len(self.ends), f"wave {wave} was not taken: `ready` was not asked"
        return (self.ends[wave - 1] if wave else 0), self.ends[wave]

    def keep_in(self, folder: RunFolder) -> None:
        """Keep the waves in the run's folder, these and those to come."""
        if not (folder.path / TAKEN).exists():
            folder.append(TAKEN, [{"lines": lines} for lines in self.waves])
        self.folder = folder

    def take(self, least: int) -> int:
        """Take what is new in the file as a wave, if that is `least` usable rows or more.

        Returns:
            Usable rows that are new, taken or not.
        """
        known = Counter(line for wave in self.waves for line in wave)
        lines = [x for x in lines_of(self.path) if not _counted(known, x)]
        if not lines:
            return 0
        try:
            rows, refused = self.load(Wave(self.path, lines))
        except NoRows:  # others may come
            return 0
        if len(rows) >= least:
            self._add(rows, refused)
            self.waves.append(lines)
            assert self.folder is not None, "a wave is kept before it is trained on"
            self.folder.append(TAKEN, [{"lines": lines}])
        return len(rows)

    def again(self, lines: list[str]) -> None:
        """Take a wave that an earlier process of this run took."""
        self._add(*self.load(Wave(self.path, lines)))
        self.waves.append(lines)

    def _add(self, rows: Rows, refused: list[Rejected]) -> None:
        if _kind(rows) != _kind(self.rows):
            raise UserError(
                f"data '{self.path}': began with {_kind(self.rows)}, and now holds {_kind(rows)}. "
                "Give a file of one kind."
            )
        self.rows.extend(rows)
        self.ends.append(len(self.rows))
        if refused:
            self.refuse(refused)


def _kind(rows: Rows) -> str:
    return rows.kind + (" with scores" if has_scores(rows) else "")


def followed(
    path: Path, config: Config, waves: list[list[str]], first: Rows, load: Load,
    refuse: Callable[[list[Rejected]], None],
) -> Followed:  # fmt: skip
    """The data of a run that has taken these waves.

    Args:
        first: the rows of the first wave.
    """
    data = Followed(
        path=path, times=max(1, math.ceil(config.epochs)), load=load, refuse=refuse,
        waves=waves[:1], rows=first, ends=[len(first)],
    )  # fmt: skip
    for lines in waves[1:]:
        data.again(lines)
    return data


def begun(output: Path, config: Config) -> list[list[str]]:
    """The waves that a run begins with: those of its folder on resume, else the file as it is."""
    assert config.data is not None, "see `check`"
    if config.resume:
        kept = [row["lines"] for row in RunFolder(output).read(TAKEN)]
        if kept:
            return kept
    lines = lines_of(Path(config.data))
    if not lines:
        raise UserError(
            f"follow: data '{config.data}' holds no row yet, and the first ones tell what the run "
            "needs. Start it once there are some (`preftune label` writes them)."
        )
    return [lines]


def lines_of(path: Path) -> list[str]:
    """The lines of the file; the last is left out until its end is there.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data '{path}': cannot be read: {error}.") from error
    return [line for line in whole.split("\n") if line.strip()]


def _counted(known: Counter[str], line: str) -> bool:
    known[line] -= 1
    return known[line] >= 0


def wait(
    data: Followed,
    groups: Sequence[Group],
    batch_size: int,
    seconds: float,
    asked: Callable[[], bool],
    note: Callable[[str], None],
) -> bool:
    """Wait until the next update has its rows.

    Args:
        groups: of the run.
        seconds: without a new row, after which what is there is taken, however few.
        asked: whether somebody wants the run to end.

    Returns:
        False where there is none, or somebody wants it to end.
    """
    short = [g for g in groups if _wants(g, data)]
    if not short:
        return True
    of_one = (
        g.prompts_per_update(batch_size, g.source.num_responses) // g.source.prompts_per_row
        for g in short
    )
    least, count, since = max(1, *of_one), -1, time.monotonic()
    while not asked():
        late = time.monotonic() - since > seconds
        found = data.take(1 if late else least)
        if all(data.has(g.cursor.epoch) for g in short):
            note(f"{found} new rows of {data.path}, {len(data)} in all")
            return True
        if late:
            return False
        if count < 0:
            note(f"waiting for rows in {data.path}: {len(data)} so far, {least} for an update")
        if found > max(count, 0):
            since = time.monotonic()
        count = found
        time.sleep(min(LOOK, seconds))
    return False


def _wants(group: Group, data: Followed) -> bool:
    """Whether its next update needs a wave that was not taken."""
    if group.source.draws or (group.round is not None and not group.round.spent):
        return False
    return group.cursor.position == 0 and not data.has(group.cursor.epoch)
