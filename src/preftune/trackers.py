"""A run's metrics sent to trackers, through Accelerate's, beside metrics.jsonl, which has them all.

A tracker that fails while the run goes on is left behind with a warning: no run is lost to it.
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import util
from typing import Any

from preftune.errors import UserError
from preftune.events import Event
from preftune.runs import RunFolder

log = logging.getLogger("preftune")
PROJECT = "preftune"
"""Where runs stand in trackers that know projects; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME win."""
_IDS = "trackers.json"
"""Of the run folder: a run that goes on, goes on in its trackers too."""


def check(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UserError: the command that installs them.
    """
    lacking = [n for n in names if util.find_spec(n) is None]
    if lacking:
        raise UserError(
            f"trackers: {', '.join(lacking)} is not installed. Run: pip install {' '.join(lacking)}"
        )


@contextmanager
def following(
    names: Sequence[str], folder: RunFolder, settings: Mapping[str, Any]
) -> Iterator[Callable[[Event], None]]:
    """A callback that sends what a run tells; what it opened is closed at the end.

    Args:
        settings: the run's, as config.yaml has them.
    """
    opened: dict[str, Any] = {}

    def follow(event: Event) -> None:
        if event.kind == "start":
            for name in names:
                opened[name] = _opened(name, folder, event.step, _flat(settings))
        elif event.kind == "step":
            values = _numbers(event.metrics)
            for name in list(opened):
                _guarded(opened, name, lambda t: t.log(values, step=event.step))

    try:
        yield follow
    finally:
        for name in list(opened):
            _guarded(opened, name, lambda t: t.finish())


def _guarded(opened: dict[str, Any], name: str, do: Callable[[Any], None]) -> None:
    try:
        do(opened[name])
    except Exception as error:  # whatever a service and its client come up with
        del opened[name]
        log.warning("%s failed, and is told no more: %s. metrics.jsonl has all.", name, error)


def _opened(name: str, folder: RunFolder, step: int, settings: Mapping[str, Any]) -> Any:
    """A tracker of Accelerate's, begun with the settings, or gone on with: MLflow takes them once.

    Raises:
        UserError: it does not begin: nobody is logged in, say.
    """
    from accelerate import PartialState, tracking

    PartialState()  # its trackers ask it who they are
    own = folder.path.resolve()
    ids = folder.read_json(_IDS) or {}
    known = ids.get(name, secrets.token_hex(8))
    makers: dict[str, Callable[[], Any]] = {
        # what a killed run wrote after its checkpoint is done again
        "tensorboard": lambda: tracking.TensorBoardTracker(
            "tensorboard", own, purge_step=step + 1 if step else None
        ),
        "wandb": lambda: tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=own.name, id=known, resume="allow", dir=str(own),
        ),
        "trackio": lambda: tracking.TrackioTracker(PROJECT, name=own.name, resume="allow"),
        "mlflow": lambda: tracking.MLflowTracker(
            PROJECT, run_id=ids.get("mlflow"), run_name=own.name
        ),
    }  # fmt: skip
    try:
        tracker = makers[name]()
        tracker.start()
        if name not in ids:
            tracker.store_init_configuration(settings)
    except Exception as error:
        raise UserError(f"trackers: {name} does not begin: {error}") from error
    ids[name] = tracker.tracker.info.run_id if name == "mlflow" else known
    folder.write_json(_IDS, ids)
    return tracker


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn; parts of a figure under its name."""
    found = {k: v for k, v in _flat(metrics).items() if not isinstance(v, str)}
    return {k: float(v) for k, v in found.items() if k != "step"}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Plain values by dotted path; None is left out, a list of plain values is one text."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
        parts = enumerate(value)
    elif value is None:
        return {}
    else:
        return {name: value if isinstance(value, (bool, int, float, str)) else str(value)}
    return {
        k: v
        for key, part in parts
        for k, v in _flat(part, f"{name}.{key}" if name else str(key)).items()
    }
