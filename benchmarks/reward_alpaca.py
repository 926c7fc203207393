"""A reward model on AlpacaEval judgements, beside rules that read nothing, and a run that uses it.

Rows are {"prompt", "chosen", "rejected", "chosen_model", "rejected_model"}; whole prompts are held
out. Settings were fixed before the run; one seed.

    python benchmarks/reward_alpaca.py DATA OUTPUT [--pairs 960] [--held 400] [--probe-steps 6]
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

from preftune import train
from preftune.data.files import read_file

SEED, HELD_SHARE = 0, 0.25
LONGEST = 700
"""Characters of a prompt with both answers: short pairs, so that a CPU sees many."""
SETTINGS = {
    "method": "reward", "model": "smollm2-135m", "batch_size": 8, "learning_rate": 2e-5,
    "epochs": 1.0, "lr_schedule": "linear", "warmup_ratio": 0.1, "max_length": 320, "seed": SEED,
}  # fmt: skip


def split(path: Path, pairs: int, held: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on and to hold out, of different prompts, in random order."""
    rows = [
        row
        for _, row in read_file(path)
        if isinstance(row, dict)
        and row["chosen"] != row["rejected"]
        and sum(len(row[k]) for k in ("prompt", "chosen", "rejected")) <= LONGEST
    ]
    prompts = sorted({r["prompt"] for r in rows})
    draw = random.Random(SEED)
    draw.shuffle(rows)
    out = set(draw.sample(prompts, round(HELD_SHARE * len(prompts))))
    kept = [r for r in rows if r["prompt"] not in out][:pairs]
    return kept, [r for r in rows if r["prompt"] in out][:held]


def main() -> int:
    """Train, evaluate, and probe an on-policy run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=960)
    parser.add_argument("--held", type=int, default=400)
    parser.add_argument("--probe-steps", type=int, default=6)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    paths = [given.output / name for name in ("train.jsonl", "held.jsonl")]
    for path, rows in zip(paths, split(given.data, given.pairs, given.held), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{path}: {len(rows)} pairs, {len({r['prompt'] for r in rows})} prompts", flush=True)
    began = time.time()
    run = train(
        {**SETTINGS, "data": str(paths[0]), "eval_data": str(paths[1]),
         "output": str(given.output / "rm")},
        # the file's `margin` is the judge's certainty, not a lead in log-odds
        overrides={"terms.0.labeller.margin": "none"},
        callbacks=[lambda e: print(e.step, e.message, e.metrics.get("loss", ""), flush=True)],
    )  # fmt: skip
    print(f"seconds {time.time() - began:.0f}")
    print(json.dumps(json.loads((run.folder / "evaluation.json").read_text()), indent=1))
    began = time.time()
    probe = train(
        {
            "method": "rloo", "model": "smollm2-135m", "prompts": str(paths[1]), "kl": 0.05,
            "reward": str(run.folder), "max_steps": given.probe_steps, "batch_size": 4,
            "learning_rate": 1e-5, "max_new_tokens": 48, "output": str(given.output / "rloo"),
        }
    )  # fmt: skip
    print(f"rloo with it: {time.time() - began:.0f} s")
    for row in probe.metrics:
        shown = ("step", "reward", "kl", "length", "reward_queries")
        print(json.dumps({k: row[k] for k in shown if k in row}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
