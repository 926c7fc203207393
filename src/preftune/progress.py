"""Progress on the terminal, always on stderr: stdout is for results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preftune.training import Event

_SHOWN = (
    ("loss", ".4f"),
    ("reward", ".2f"),
    ("kl", ".2f"),
    ("eval_reward", ".2f"),
    ("eval_kl", ".2f"),
)


def stderr() -> Any:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """A bar with stage, step, loss, reward, KL and time left; plain lines where there is no terminal."""

    def __init__(self, console: Any, stage: str = "") -> None:
        from rich.progress import (
            BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeElapsedColumn, TimeRemainingColumn,
        )  # fmt: skip

        self.console, self.stage = console, stage
        self._seen: dict[str, float] = {}
        self._bars = Bars(
            TextColumn("[bold]{task.description:<12}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=False,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int) -> None:
        """A new stage of `total` steps."""
        self._seen = {}
        self._task = self._bars.add_task(stage, total=total, figures="")

    def advance(self, done: int, figures: str = "") -> None:
        """The stage has come to `done`."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, figures=figures)

    def __call__(self, event: Event) -> None:
        """Follow a training run."""
        if event.kind == "start":
            self.begin(self.stage or event.message, event.total)
            self.advance(event.step)
        elif event.kind == "step":
            self._seen |= {
                n: float(v) for n, _ in _SHOWN if (v := event.metrics.get(n)) is not None
            }
            line = "  ".join(f"{n} {self._seen[n]:{f}}" for n, f in _SHOWN if n in self._seen)
            self.advance(event.step, line)
            if not self.console.is_terminal:
                self.console.print(
                    f"{self.stage} step {event.step}/{event.total}  {line}",
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
