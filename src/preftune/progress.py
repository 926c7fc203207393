"""Progress on the terminal, always on stderr: stdout is for results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from preftune import startup
from preftune.events import Event

_SHOWN = (
    ("loss", ".4f"),
    ("reward", ".2f"),
    ("kl", ".2f"),
    ("eval_reward", ".2f"),
    ("eval_kl", ".2f"),
)


def stderr() -> Any:
    """A rich console on stderr; of several processes the main one's alone shows anything."""
    from rich.console import Console

    return Console(stderr=True, quiet=startup.place()[0] > 0)


class Progress:
    """A bar with stage, step, loss, reward, KL and time left; plain lines without a terminal."""

    def __init__(self, console: Any, stage: str = "") -> None:
        from rich import progress as bars

        self.console, self.stage = console, stage
        self._seen: dict[str, float] = {}
        self._bars = bars.Progress(
            bars.TextColumn("[bold]{task.description:<12}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[figures]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int) -> None:
        """A new stage of `total` steps."""
        self._seen, self._stage = {}, stage
        self._task = self._bars.add_task(stage, total=total, figures="")

    def tick(self, stage: str) -> Callable[[int, int], None]:
        """A function (done, total) that shows a stage."""

        def tick(done: int, total: int) -> None:
            if self._stage != stage:
                self.begin(stage, total)
            self.advance(done)
            if not self.console.is_terminal:
                self.console.print(f"{stage} {done}/{total}", markup=False, highlight=False)

        return tick

    def advance(self, done: int, figures: str = "") -> None:
        """The stage has come to `done`."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, figures=figures)

    def __call__(self, event: Event) -> None:
        """Follow a training run."""
        if event.kind == "start":
            self.begin(self.stage or event.message, event.total)
            self.advance(event.step)
        elif event.kind == "stage":
            self.tick(event.message)(event.step, event.total)
        elif event.kind == "step":
            self._seen |= {
                n: float(v) for n, _ in _SHOWN if (v := event.metrics.get(n)) is not None
            }
            line = "  ".join(f"{n} {self._seen[n]:{f}}" for n, f in _SHOWN if n in self._seen)
            self.advance(event.step, line)
            if not self.console.is_terminal:
                self.console.print(
                    f"{self.stage} step {event.step}/{event.total}  {line}".strip(),
                    markup=False,
                    highlight=False,
                )
        elif event.kind in ("note", "interrupted", "save"):
            self.console.print(event.message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def working(console: Any, what: str) -> Iterator[None]:
    """A spinner for what takes more than a moment."""
    with console.status(what):
        yield
