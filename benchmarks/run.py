"""Speed and memory against targets: one JSON line a target, last, bigger is better.

    python benchmarks/run.py [NAME...] [--turns N] [--pairs N] [--model FOLDER]

Every ratio is of two things measured in this run, in turn. What each line is, and what each side is
given: README.md beside this file. Lines of a benchmark that was left out are not printed; why is
said on stderr, as is everything for the reader.
"""

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import bandit
import dpo
import fresh
import token_log_probs
from results import Failed, Plan, Row, Skipped, hardware

BENCHMARKS: dict[tuple[str, ...], Callable[[Plan], list[Row]]] = {
    ("token_log_probs_time", "token_log_probs_memory"): token_log_probs.rows,
    ("dpo_step", "dpo_memory", "dpo_ceiling"): dpo.step,
    ("dpo_step_default",): dpo.step_default,
    ("dpo_step_long_prompt",): dpo.step_long_prompt,
    ("dpo_rows",): dpo.real_rows,
    ("sampling",): fresh.sampling,
    ("sampling_vllm",): fresh.sampling_vllm,
    ("on_policy_step",): fresh.on_policy_step,
    ("hypo_step", "hypo_memory"): fresh.hypo,
    # last: they settle the threads and the allocator of this process
    ("bandit_step", "bandit_tabular", "bandit_mlp", "bandit_tokens", "bandit_ceiling"):
        bandit.rows_of,
}  # fmt: skip
"""By the names of their lines."""
GPU = "gpu_*"


def given(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [name for group in BENCHMARKS for name in group]
    parser = argparse.ArgumentParser(description="Speed and memory against targets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names)}, {GPU}")
    parser.add_argument("--turns", type=int, default=Plan.turns, help="steps of each side")
    parser.add_argument("--pairs", type=int, default=Plan.pairs, help="real pairs of dpo_rows")
    parser.add_argument("--model", default=Plan.model, help="another one, to try things out")
    found = parser.parse_args(arguments)
    unknown = [n for n in found.names if n not in names and not n.startswith("gpu")]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(names)}, {GPU}")
    return found


def gpu(lines: list[str]) -> None:
    """Add the lines of the benchmarks that need a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped("there is no CUDA device")
    script = Path(__file__).parent / "gpu.py"
    out = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    print(out.stdout, file=sys.stderr)  # its tables
    lines += [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode:
        raise Failed(f"{script.name} ended with {out.returncode}")


def main() -> int:
    """Measure, then print one line a target; 1 if a benchmark failed."""
    asked = given()
    plan = Plan(
        turns=asked.turns, dropped=min(Plan.dropped, asked.turns - 1), pairs=asked.pairs,
        model=asked.model,
    )  # fmt: skip
    lines: list[str] = []
    failed = False

    def attempt(name: str, work: Callable[[], None]) -> None:
        nonlocal failed
        try:
            work()
        except Skipped as reason:
            print(f"{name}: skipped: {reason}", file=sys.stderr, flush=True)
        except Failed as reason:
            failed = True
            print(f"{name}: FAILED: {reason}", file=sys.stderr, flush=True)
        except Exception:  # the others are still worth their time
            failed = True
            traceback.print_exc()
            print(f"{name}: FAILED", file=sys.stderr, flush=True)

    for names, work in BENCHMARKS.items():
        if asked.names and not set(names) & set(asked.names):
            continue
        attempt(
            ", ".join(names),
            lambda work=work: lines.extend(row.line(hardware()) for row in work(plan)),
        )
    if not asked.names or any(name.startswith("gpu") for name in asked.names):
        attempt(GPU, lambda: gpu(lines))
    for line in lines:
        print(line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
