"""What a benchmark gives: rows with a target, a reason why it was left out, or a failure."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One target: bigger is better."""

    name: str
    ratio: float
    target: float

    def line(self, hardware: str) -> str:
        """As it is printed."""
        row = {"name": self.name, "ratio": round(self.ratio, 3), "target": self.target}
        return json.dumps(row | {"hardware": hardware})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is run; fewer turns serve to try the benchmarks out."""

    turns: int = 7
    """Steps of each side, in turn."""
    dropped: int = 2
    """First steps that are not counted: fresh memory, first calls."""
    pairs: int = 64
    """Real pairs of `dpo_rows`, in whole batches."""
    model: str = "smollm2-135m"
    """A folder or a Hub id; targets are those of the default model."""


class Skipped(Exception):
    """Something that the benchmark needs is not here."""


class Failed(Exception):
    """The benchmark's two sides do not do the same work, or one of them ended."""


def hardware() -> str:
    """The processor, the threads used and the torch that ran."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{name}, {threads}, torch {torch.__version__}"
