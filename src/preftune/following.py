"""Training on a file of rows while others append to it: `follow` in the settings.

The rows are taken in *waves*, each of them gone through `epochs` times: the first is what stands in
the file, every later one what has come since, an update's worth at least. A copy of each wave goes
into the run folder before it is trained on, so a resumed run takes the same rows in the same order,
however the file was changed; a row that was taken back there (`u` on the page of `preftune label`)
stays in the waves that had it.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from preftune import durable
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
    """Rows of a wave, and the file that they are of."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        super().__init__(map(parse, lines))
        self.path = path


Load = Callable[[Wave], tuple[Rows, list[Rejected]]]
"""A wave as token ids, and the rows that were refused.

It raises `NoRows` where none is left.
"""


def check(config: Config, method: Method, given: bool) -> None:
    """Refuse what does not go with `follow`, before anything is loaded.

    Args:
        given: the data are an object, not the file.

    Raises:
        UserError: which setting, and what to do.
    """
    if config.follow is None:
        return
    if not any(term.source.reads and not term.source.draws for term in method.terms):
        raise UserError(f"follow: the method '{method.name}' reads no data. Leave it out.")
    path = Path(config.data or "")
    if given or not path.is_file() or ending(path) != ".jsonl" or path.suffix in (".gz", ".xz"):
        raise UserError(
            f"follow: data is '{'an object' if given else config.data}'. Give a .jsonl file that "
            "is there, as `preftune label` writes it."
        )
    wrong = {
        "max_steps": config.max_steps is None
        and "needs it, for nobody knows how many rows will come",
        "eval_fraction": config.eval_fraction
        and "cannot set rows aside that are not there yet; give eval_data",
        "max_rows": config.max_rows and "takes the rows as they come; leave it out",
        "reference_cache": config.reference_cache
        and "has rows that it cannot hold yet; leave it out",
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
    refuse: Callable[[list[Rejected]], None]
    """Keeps refused rows of the waves after the first."""
    scored: bool
    """The rows' own scores are the rewards."""
    waves: list[list[str]]
    """Lines of the file, by wave; the first `len(ends)` of them are loaded, as a run that was not
    interrupted had no others."""
    rows: Rows
    """Of the loaded waves; it grows."""
    ends: list[int]
    """Rows up to the end of each loaded wave."""
    folder: RunFolder | None = None
    passed_over: list[str] = field(default_factory=list)
    """Lines of waves that were refused as a whole."""

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
        self.folder = folder
        durable.write_rows(folder.path / TAKEN, ({"lines": lines} for lines in self.waves))

    def take(self, least: int) -> int:
        """Take the next wave: one that was taken before this process, or what is new in the file,
        if that is `least` usable rows or more.

        Returns:
            Usable rows that are new, taken or not.
        """
        if len(self.ends) < len(self.waves):
            rows, refused = self.load(Wave(self.path, self.waves[len(self.ends)]))
            self._add(rows, refused)
            return len(rows)
        lines = self._new()
        if not lines:
            return 0
        try:
            rows, refused = self.load(Wave(self.path, lines))
        except NoRows:  # others may come
            return 0
        odd = self._odd(rows)
        if odd:
            self.passed_over += lines
            self.refuse([Rejected(where=str(self.path), reason=odd, row=x) for x in lines])
            return 0
        if len(rows) >= least:
            assert self.folder is not None, "a wave is kept before it is trained on"
            self.waves.append(lines)
            self.keep_in(self.folder)
            self._add(rows, refused)
        return len(rows)

    def reach(self, groups: Sequence[Group]) -> None:
        """Load the waves that these have begun or gone through: those of a run that goes on."""
        for group in groups:
            cursor = group.cursor
            last = cursor.epoch if cursor.position else cursor.epoch - 1
            while not group.source.draws and not self.has(last):
                assert len(self.ends) < len(self.waves), f"{TAKEN} lacks wave {last // self.times}"
                self.take(1)

    def _new(self) -> list[str]:
        """Lines that were not taken."""
        known = Counter(x for wave in (*self.waves, self.passed_over) for x in wave)
        return [x for x in lines_of(self.path) if not _counted(known, x)]

    def _odd(self, rows: Rows) -> str | None:
        """Why these rows do not go with the first ones."""
        if rows.kind != self.rows.kind:
            return f"{rows.kind}, where the file began with {self.rows.kind}"
        if self.scored and not has_scores(rows):
            return "rows without scores, where the file began with scores"
        return None

    def _add(self, rows: Rows, refused: list[Rejected]) -> None:
        self.rows.extend(rows)
        self.ends.append(len(self.rows))
        if refused:
            self.refuse(refused)


def begun(output: Path, config: Config) -> list[list[str]]:
    """The waves that a run begins with: those of its folder on resume, else the file as it is.

    Raises:
        UserError: the file has no row yet, or the folder lacks its copy.
    """
    assert config.data is not None, "see `check`"
    if config.resume and (output / TAKEN).is_file():
        return [row["lines"] for row in RunFolder(output).read(TAKEN)]
    if config.resume and (output / "checkpoints").is_dir():
        raise UserError(f"resume '{output}': {TAKEN} is missing. Restore it, or start a new run.")
    lines = lines_of(Path(config.data))
    if not lines:
        raise UserError(
            f"follow: data '{config.data}' holds no row yet, and the first ones tell what the run "
            "needs. Start it once there are some (`preftune label` writes them)."
        )
    return [lines]


def times_of(config: Config) -> int:
    """How often each wave is gone through."""
    return max(1, math.ceil(config.epochs))


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
    data.reach(groups)
    short = [g for g in groups if _wants(g, data)]
    if not short:
        return True
    least, count, since = max(_rows_of_update(g, batch_size) for g in short), -1, time.monotonic()
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


def _rows_of_update(group: Group, batch_size: int) -> int:
    """Rows of the data that its next round takes."""
    source = group.source
    prompts = source.prompts_per_round or group.prompts_per_update(batch_size, source.num_responses)
    return max(1, prompts // source.prompts_per_row)


def _wants(group: Group, data: Followed) -> bool:
    """Whether its next update needs a wave that was not taken."""
    if group.source.draws or (group.round is not None and not group.round.spent):
        return False
    return group.cursor.position == 0 and not data.has(group.cursor.epoch)
