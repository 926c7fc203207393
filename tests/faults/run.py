"""Faults at full size: `make faults`. Prints a table of faults tried, survived, lost.

python tests/faults/run.py [--kills 200] [--cases 10000] [--seed 0]
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(_TESTS / "faults"), str(_TESTS / "fuzz"), str(_TESTS)]

from harness import METHODS, POINTS, STEPS, Trial, Trials  # noqa: E402
from judges import KINDS, JudgeTrials  # noqa: E402
from targets import SLOW, TARGETS  # noqa: E402

from byte_model import save_tiny_model  # noqa: E402

TEST = "test_no_input_breaks_it"


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
    yield from judge_trials(JudgeTrials(model, data, work, seed))


def judge_trials(judged: JudgeTrials) -> Iterator[Trial]:
    """A judge's faults, those that pass and those that do not."""
    for kind in KINDS:
        for _ in range(4):
            yield judged.sometimes(kind)
    for _ in range(20):
        yield judged.goes_away()
        yield judged.run_killed()
    judged.stop()


def hostile(cases: int) -> Iterator[tuple[str, int, int]]:
    """Inputs that must not break what reads them: target, tried, broken."""
    for name in TARGETS:
        tried = cases // SLOW.get(name, 1)
        yield name, tried, _broken(name, tried)


def _broken(name: str, cases: int) -> int:
    """1 if some input of so many breaks the target; the first one ends it."""
    test = Path(__file__).parent.parent / "fuzz" / "test_fuzz.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"{test}::{TEST}[{name}]"],
        env={**os.environ, "FUZZ_CASES": str(cases * SLOW.get(name, 1))},
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        print(f"LOST {name}: {done.stdout[-3000:]}", file=sys.stderr)
    return int(done.returncode != 0)


def main() -> int:
    """The table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000, help="of hostile input, each target")
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
    print("\n| hostile input | tried | broken |\n| --- | --- | --- |")
    lost = any(t.fault for several in found.values() for t in several)
    for name, tried, broken in hostile(asked.cases):
        print(f"| {name} | {tried} | {broken} |", flush=True)
        lost = lost or bool(broken)
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
