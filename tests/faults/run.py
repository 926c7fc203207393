"""Faults at full size: `make faults`. Prints a table of faults tried, survived, lost.

python tests/faults/run.py [--kills 200] [--seed 0]
"""

import argparse
import json
import logging
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import METHODS, POINTS, STEPS, Trial, Trials  # noqa: E402

from conftest import save_tiny_model  # noqa: E402


def trials(model: str, data: str, work: Path, kills: int, seed: int) -> Iterator[Trial]:
    """All of them, one after the other."""
    for method in METHODS:
        these = Trials(model, data, work, method, seed)
        for _ in range(kills // len(METHODS) // 2):
            yield these.at_random()
        for point in POINTS:
            for nth in (1, 2, 3) if point != "model" else (1,):
                yield these.at_point(point, nth)
        for point in ("begun", "tensors", "filled", "listed"):
            yield these.disk_full(point, 2)
        yield these.file_too_large()
        for _ in range(10):
            yield these.damaged()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            for _ in range(5):
                yield these.asked(number)


def main() -> int:
    """The table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, list[Trial]] = defaultdict(list)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = save_tiny_model(work / "tiny")
        pairs = [
            {"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"I would say {n} now"}
            for n in range(12)
        ]
        data = work / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
        for trial in trials(model, str(data), work, asked.kills, asked.seed):
            found[trial.kind].append(trial)
            if trial.fault:
                print(f"LOST {trial.kind} ({trial.where}): {trial.fault}", file=sys.stderr)
    print(f"runs of {STEPS} steps, rows {', '.join(METHODS)}, seed {asked.seed}, "
          f"{time.perf_counter() - began:.0f} s\n")  # fmt: skip
    print("| fault | tried | survived | lost |\n| --- | --- | --- | --- |")
    for kind, several in found.items():
        bad = sum(bool(t.fault) for t in several)
        print(f"| {kind} | {len(several)} | {len(several) - bad} | {bad} |")
    return int(any(t.fault for several in found.values() for t in several))


if __name__ == "__main__":
    sys.exit(main())
