"""TRL's side: its own trainers, whose training loop is held between steps.

    python benchmarks/trl_side.py JOB

JOB is JSON: `method` (dpo or online_dpo), `model` (a folder), `data` (JSONL), `tuned`, `steps`,
`settings` (of the trainer, besides). A step is what lies between the callbacks `on_step_begin` and
`on_step_end`: forward and backward pass, clipping, the optimizer's and the schedule's step, zeroing
gradients. The collation of the batch comes before it and is not timed.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workers import Channel, digest

# Nothing is fetched or reported while it is timed.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

TUNED = {"bf16": True, "optim": "adamw_torch_fused", "gradient_checkpointing": False}
TUNED_DPO = {**TUNED, "precompute_ref_log_probs": True}
AROUND: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
"""What a benchmark needs, whatever is measured: no reports, no checkpoints, the rows in order."""


def arguments(job: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """Of the trainer's configuration."""
    settings = {**AROUND, "output_dir": tempfile.mkdtemp(), "max_steps": job["steps"]}
    return {**settings, **(tuned if job["tuned"] else {}), **job["settings"]}


def steps(trainer_class: Any, channel: Channel, ready: Any) -> tuple[type, Any]:
    """The trainer with its loss kept, and the callback that holds it between steps."""
    from transformers import TrainerCallback

    class Held(TrainerCallback):
        began = 0.0
        rest: dict[str, float] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                channel.say(ready())
            self.rest = channel.until_step()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - self.began
            channel.say({"seconds": seconds, **self.rest, **Kept.last()})

    class Kept(trainer_class):
        loss: Any = None
        lengths = 0

        def training_step(self, *given: Any, **named: Any) -> Any:
            Kept.loss = super().training_step(*given, **named)
            return Kept.loss

        @classmethod
        def last(cls) -> dict[str, float]:
            return {"loss": float(cls.loss), "drawn": cls.lengths}

    return Kept, Held()


def dpo(job: dict[str, Any], channel: Channel) -> Any:
    """DPOTrainer on pairs of text."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    made: dict[str, Any] = {}

    def ready() -> dict[str, Any]:
        data = made["trainer"].train_dataset
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {"digest": digest(list(zip(*(data[n] for n in names), strict=True)))}

    trainer_class, held = steps(DPOTrainer, channel, ready)
    made["trainer"] = trainer_class(
        model=job["model"],
        args=DPOConfig(**arguments(job, TUNED_DPO)),
        train_dataset=Dataset.from_list(rows),
        callbacks=[held],
    )
    return made["trainer"]


def online_dpo(job: dict[str, Any], channel: Channel) -> Any:
    """OnlineDPOTrainer on prompts of text; weights in float32 as those of the other side."""
    import torch
    from datasets import Dataset
    from ours import fewest_characters
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    trainer_class, held = steps(
        OnlineDPOTrainer, channel, lambda: {"digest": digest([[i] for i in ids])}
    )

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        ends = trainer.eos_token_ids
        trainer_class.lengths = sum(counted(ids, ends) for ids in completion_ids)
        return fewest_characters(prompts, completions)

    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=OnlineDPOConfig(**arguments(job, TUNED)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[held],
    )
    return trainer


def counted(ids: list[int], ends: list[int]) -> int:
    """Tokens up to and with the first end token."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def main() -> None:
    """Make the trainer and let it run until the parent has enough."""
    job = json.loads(sys.argv[1])
    channel = Channel()
    make = {"dpo": dpo, "online_dpo": online_dpo}[job["method"]]
    make(job, channel).train()


if __name__ == "__main__":
    main()
