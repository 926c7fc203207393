"""Is the first method of the advice better than the last one, when both are trained?

    python benchmarks/advice_check.py DIAGNOSIS.json --data PAIRS --reward R --output DIR

Takes a `diagnosis.json`, trains the first and the last method of its whole ranking on the same
data with the settings that it gives and equal costs (responses trained on, drawn at the measured
price, labelled), and prints reward, KL and U = reward - beta KL on held-out prompts, with 95 %
intervals over prompts. One seed each: an interval is over prompts, another seed may differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from preftune import train
from preftune.advising.advise import settings_for
from preftune.config import load

TRAINING = {
    "model": "smollm2-135m", "batch_size": 4, "max_new_tokens": 48, "learning_rate": 4e-5,
    "seed": 0, "eval_fraction": 0.15, "max_length": 512, "max_rows": 400,
}  # fmt: skip
"""Small, and the same for both."""


def steps_of(row: str, price: float, label: float, trained: int) -> int:
    """Updates that the cost of `trained` responses buys: 8 responses an update for pairs."""
    from preftune import methods

    fresh = [t for t in methods.get(row).terms if t.source.on_policy]
    per_update = 8.0
    for term in {t.source: t for t in fresh}.values():
        drawn = 8 * term.share * term.source.num_responses / 2 / term.source.passes
        per_update += drawn * price + (drawn * label if term.labeller.labelled else 8 * term.share)
    return max(1, round(trained / per_update))


def main() -> None:
    """Train two, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("diagnosis", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=192, help="budget, in responses")
    own = parser.parse_args()
    found = json.loads(own.diagnosis.read_text())
    given, order = found["circumstances"], list(found["worth"])
    for row in (order[0], order[-1]):
        steps = steps_of(row, given["sample_price"], given["label_price"], own.responses)
        settings: dict[str, Any] = settings_for(row, given["beta"])
        settings = {k: v for k, v in settings.items() if k not in ("learning_rate",
                                                                   "on_policy_share")}  # fmt: skip
        config = load({
            **TRAINING, **settings, "method": row, "data": own.data, "reward": own.reward,
            "max_steps": steps, "eval_every": steps, "output": str(own.output / row),
        })  # fmt: skip
        run = train(config)
        last = run.metrics[-1]
        value = last["eval_reward"] - given["beta"] * last["eval_kl"]
        shown = {k: v for k, v in last.items() if k.startswith("eval_")}
        print(json.dumps({"method": row, "steps": steps, "value": value, **shown}), flush=True)


if __name__ == "__main__":
    main()
