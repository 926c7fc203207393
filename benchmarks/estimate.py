"""How near `preftune estimate` comes: it, and the run itself, one JSON line a config.

    python benchmarks/estimate.py [--only NAME ...] [--again] [--wall]

Each is a process of its own with one thread. Seconds are those of the processor unless `--wall` is
given: on a machine that others use as well, one thread's processor time is the work, and the rest
is waiting. Ratios are estimated over measured; peaks are of resident memory (`ru_maxrss`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAIRS = Path(__file__).parents[1] / "src/preftune/data/default/pairs.jsonl"
REWARD = {"reward": "length:within=20"}
COMMON = {"data": str(PAIRS), "batch_size": 4, "threads": 1, "reference_cache": "false"}
CONFIGS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "max_steps": 4},
    "dpo_lora": {"method": "dpo", "adapter": "lora", "max_steps": 4},
    "dpo_small": {"method": "dpo", "max_steps": 4, "batch_size": 8, "micro_batch_tokens": 128},
    "pref_ft": {"method": "pref_ft", "max_steps": 4},
    "hypo": {"method": "hypo", "max_steps": 4, "max_new_tokens": 32},
    "on_policy_dpo": {"method": "on_policy_dpo", "max_steps": 4, "max_new_tokens": 32, **REWARD},
    "ppo": {"method": "ppo", "max_steps": 4, "max_new_tokens": 32, "eval_fraction": 0, **REWARD},
    "reward": {"method": "reward", "max_steps": 4, "eval_fraction": 0},
    "dpo_saves": {"method": "dpo", "max_steps": 4, "save_every": 2},
}
OF_UPDATES = ("prefill", "decode", "score", "reward", "train", "other")
CHILD = """
import json, resource, sys, time
if sys.argv[1] == "cpu":
    time.perf_counter = time.process_time
began = time.process_time() if sys.argv[1] == "cpu" else time.time()
from preftune import cli
code = cli.run(sys.argv[2:])
used = time.perf_counter() if sys.argv[1] == "cpu" else time.time() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"code": code, "seconds": used, "peak": peak}), file=sys.stderr)
"""


def child(clock: str, *args: str) -> tuple[str, dict[str, Any]]:
    """stdout of a command, and what its process took."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    import os

    from preftune.startup import settings

    environment = {**os.environ, **settings(), "OMP_NUM_THREADS": "1", "PREFTUNE_STARTED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, clock, *args], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    try:
        found = json.loads(last)
    except ValueError:
        raise SystemExit(done.stderr) from None
    if found["code"]:
        raise SystemExit(done.stderr)
    return done.stdout, found


def flags(config: dict[str, Any]) -> list[str]:
    """A config as flags."""
    out: list[str] = []
    for name, value in config.items():
        if value in ("true", "false"):
            out += ["--set", f"{name}={value}"]
        else:
            out += [f"--{name.replace('_', '-')}", str(value)]
    return out


def measured(folder: Path, took: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run by kind of work, and its peak."""
    times = [json.loads(x) for x in (folder / "times.jsonl").read_text().splitlines()]
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {n for t in times for n in t if n.startswith("seconds_")}
    found = {n.removeprefix("seconds_"): sum(t.get(n, 0.0) for t in times) for n in names}
    found["other"] = found.pop("idle", 0.0)
    updates = max(r.get("seconds", 0.0) for r in rows)
    return found | {"updates": updates, "in_all": took["seconds"], "peak": took["peak"]}


def estimated(text: str) -> dict[str, float]:
    """The same of an estimate."""
    found = json.loads(text)
    seconds = {n: s["seconds"] for n, s in found["time"]["stages"].items()}
    updates = sum(seconds.get(n, 0.0) for n in OF_UPDATES)
    return seconds | {
        "updates": updates, "in_all": found["time"]["seconds"], "peak": found["memory"]["peak"],
    }  # fmt: skip


def compare(name: str, clock: str, again: bool) -> dict[str, Any]:
    """One config: estimated, measured, and their ratios before and after."""
    config = COMMON | CONFIGS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        before, probed = child(clock, "estimate", *flags(config), "--json")
        _, took = child(clock, "train", *flags(config), "--output", str(folder))
        run = measured(folder, took)
        texts = [before]
        if again:
            texts.append(child(clock, "estimate", *flags(config), "--json")[0])
    found = [estimated(text) for text in texts]
    first = found[0]
    ratios = {
        n: [round(x[n] / run[n], 3) for x in found]
        for n in run if n in first and run[n] > 0.2
    }  # fmt: skip
    return {
        "config": name, "clock": clock, "ratio": ratios,
        "estimated": {n: round(x, 3) for n, x in first.items()},
        "measured": {n: round(x, 3) for n, x in run.items()},
        "estimate_took": {n: round(x, 1) for n, x in probed.items()},
        "memory": json.loads(before)["memory"],
    }  # fmt: skip


def main() -> None:
    """Compare each config."""
    parser = argparse.ArgumentParser(description="Estimates against runs.")
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--wall", action="store_true", help="seconds of a clock on the wall")
    parser.add_argument("--again", action="store_true", help="estimate once more, after the run")
    asked = parser.parse_args()
    for name in asked.only:
        print(json.dumps(compare(name, "wall" if asked.wall else "cpu", asked.again)), flush=True)


if __name__ == "__main__":
    main()
