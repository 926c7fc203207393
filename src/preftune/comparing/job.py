"""One job of a comparison: a run, or a measurement, that any process may take from the folder."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preftune import durable
from preftune.runs import dumps

Kind = Literal["timing", "reference", "selection", "final"]
JOBS, RESULTS, RUNS, DATA = "jobs", "results", "runs", "data"
"""Folders of a comparison."""
OF_MACHINE = ("threads", "device")
"""Settings of whoever runs a job, not of the job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run; plain values, so that it is a JSON file."""

    key: str
    """Unlike any other of the comparison; the name of its files."""
    kind: Kind
    entry: str
    """The competitor's name."""
    order: int
    """Jobs are taken in this order."""
    settings: Mapping[str, Any]
    """As `preftune.Config` takes them; data and output are the folder's."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of the row's terms, by dotted path."""
    prompts: int
    """Held-out prompts that are answered at the end; 0: none."""
    samples: int = 1
    """Answers to each of them."""
    curve: int = 0
    """Prompts answered on the way; 0: no evaluation on the way."""
    keep_model: bool = False

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.settings.get("seed", 0))


def write(folder: Path, job: Job) -> None:
    """Put a job up to be taken. The same one twice is one."""
    place = folder / JOBS
    place.mkdir(parents=True, exist_ok=True)
    durable.write_text(place / f"{job.key}.json", dumps(dataclasses.asdict(job)) + "\n")


def read(folder: Path) -> list[Job]:
    """Every job that is up, in the order in which they are taken."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted((folder / JOBS).glob("*.json"))]
    return sorted((Job(**values) for values in found), key=lambda j: (j.order, j.key))


def result_path(folder: Path, key: str) -> Path:
    """Where a job's result stands once it is there."""
    return folder / RESULTS / f"{key}.json"


def result_of(folder: Path, key: str) -> dict[str, Any] | None:
    """What a job gave; None where it has not ended."""
    path = result_path(folder, key)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def write_result(folder: Path, key: str, result: Mapping[str, Any]) -> None:
    """Keep what a job gave; the file appears whole."""
    path = result_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, dumps(result) + "\n")
