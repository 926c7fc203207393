"""Losses of DPO by TRL and by this library, update by update: same weights, rows, order, float32.

    python benchmarks/trl_parity.py [--model M] [--data F] [--steps N] [--batch-size N] [--beta B]

TRL's trainer runs as it comes; this library runs what `preftune import-trl` makes of the same
settings. Dropout is off on both sides (TRL's default), and TRL is given the rows in the order in
which this library draws them, since two libraries shuffle differently. Prints a JSON line an
update and one with the largest difference, last; exit code 1 where it is above 1e-4.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

# Nothing is fetched or reported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

LARGEST = 1e-4
"""Difference of losses, nats a pair."""
Rows = Sequence[Mapping[str, str]]


def settings(model: str, steps: int, **more: Any) -> dict[str, Any]:
    """A run by TRL's names; what is not here is TRL's default."""
    return {
        "model_name_or_path": model, "max_steps": steps, "bf16": False, "use_cpu": True,
        "train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, **more,
    }  # fmt: skip


def ours(values: Mapping[str, Any], rows: Rows, folder: Path) -> tuple[list[float], list[int]]:
    """Losses by this library of what import-trl makes of the settings, and its order of rows."""
    from preftune import config as configs
    from preftune import from_trl, train
    from preftune.collecting import Context, Cursor
    from preftune.parts import make_world
    from preftune.preparing import prepare

    found = from_trl.convert(from_trl.table(), from_trl.Given(trainer="dpo", values=values))
    config = {**found.config, "template": "none", "log_every": 1, "output": str(folder / "ours")}
    data = [dict(row) for row in rows]
    parts = prepare(configs.load(config), data=data)
    world = make_world(parts)
    ctx = Context(
        data=world.data, policy=world.policy, reference=None, version=0, seed=world.seed,
        cursor=Cursor(), kept={},
    )  # fmt: skip
    source = parts.method.terms[0].source
    drawn = [source.collect(ctx, world.batch_size).row for _ in range(values["max_steps"])]
    run = train(config, data=data)
    losses = [row["loss"] for row in run.metrics if row["step"] > 0]
    return losses, [row for batch in drawn for row in batch.tolist()]


def theirs(values: Mapping[str, Any], rows: Rows, folder: Path) -> list[float]:
    """Losses by TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Kept(DPOTrainer):
        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            losses.append(float(loss))
            return loss

    given = dict(values)
    name = given.pop("model_name_or_path")
    trainer = Kept(
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(name),
        args=DPOConfig(output_dir=str(folder / "trl"), **given),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
    )
    trainer.train()
    return losses


def compare(values: Mapping[str, Any], rows: Rows) -> list[dict[str, float]]:
    """Both losses of every update, and how far they lie apart."""
    with tempfile.TemporaryDirectory() as work:
        mine, order = ours(values, rows, Path(work))
        other = theirs(values, [rows[i] for i in order], Path(work))
    return [
        {"step": i + 1, "preftune": a, "trl": b, "difference": abs(a - b)}
        for i, (a, b) in enumerate(zip(mine, other, strict=True))
    ]


def short_rows(tokenizer: Any, path: str | None, count: int, longest: int = 600) -> Rows:
    """Pairs of at most so many characters, prompts through the chat template, as text: libraries
    differ in what they count to a response behind its end token."""
    from preftune.data import load_examples

    found = []
    default = str(resources.files("preftune.data") / "default" / "pairs.jsonl")
    for example in load_examples(path or default, want="pairs").examples:
        turns = example.prompt
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        chosen, rejected = example.responses
        if len(prompt) + max(len(chosen), len(rejected)) <= longest:
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found[:count]


def main() -> int:
    """Compare, and say so."""
    from preftune import huggingface

    reader = argparse.ArgumentParser(description="Losses of DPO by TRL and by preftune")
    reader.add_argument("--model", default=huggingface.DEFAULT_MODEL)
    reader.add_argument("--data", default=None)
    reader.add_argument("--steps", type=int, default=20)
    reader.add_argument("--batch-size", type=int, default=4)
    reader.add_argument("--learning-rate", type=float, default=1e-5)
    reader.add_argument("--beta", type=float, default=0.1)
    given = reader.parse_args()
    model = str(huggingface.resolve_model(given.model))
    rows = short_rows(huggingface.load_tokenizer(model), given.data, given.steps * given.batch_size)
    values = settings(
        model, given.steps, per_device_train_batch_size=given.batch_size, beta=given.beta,
        learning_rate=given.learning_rate,
    )  # fmt: skip
    found = compare(values, rows)
    for row in found:
        print(json.dumps(row))
    largest = max(row["difference"] for row in found)
    print(json.dumps({"rows": len(rows), "largest": largest, "allowed": LARGEST}))
    return int(largest > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
