"""What a run is made of, and what follows from it: the loop's world and settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftune import (
    automatic,
    following,
    judges,
    loop,
    reference_cache,
    rewards,
    spec,
)
from preftune.config import Config
from preftune.data import Renderer, Rows
from preftune.methods import SETTINGS, Method
from preftune.policies.transformer import Transformer
from preftune.reward_model import RewardModel
from preftune.rounds import World, updates_per_epoch
from preftune.team import current


@dataclass(kw_only=True)
class Parts:
    """The row, the models, the data and the rewards of a run."""

    config: Config
    method: Method
    output: Path
    model: Transformer | RewardModel
    """What is trained."""
    reference: Transformer | None
    tokenizer: Any
    renderer: Renderer | None
    data: Rows | None
    prompts: Rows | None
    """What sources that draw answer: the `prompts` setting, or the prompts of the data."""
    held_out: Rows | None
    followed: following.Followed | None = None
    """`data`, where more rows are to come."""
    reward: rewards.Reward | None
    gold: rewards.Reward | None
    micro_batch_tokens: int | None = None
    blocks: dict[str, bool] | None = None
    """See `blocks_are`, which settles it."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before the run."""

    @property
    def policy(self) -> Transformer:
        """The model, where it is a policy."""
        assert isinstance(self.model, Transformer), "a reward model is no policy"
        return self.model

    @property
    def scores(self) -> bool:
        """The model is one of the reward: it is evaluated on pairs, and nothing is sampled."""
        return isinstance(self.model, RewardModel)

    def judge(
        self, reward: rewards.Reward | None, rows: Rows | None, *, in_parts: bool = False
    ) -> Any:
        """A reward of samples that answer `rows`, or None; with its parts, as the loop takes it."""
        if reward is None or rows is None or self.renderer is None:
            return None
        make = judges.judge_in_parts if in_parts else judges.judge_of
        return make(reward, rows, self.renderer)


def make_world(parts: Parts) -> World:
    """What the loop's rounds are made from."""
    reference = parts.reference
    if reference is not None and parts.method.reference_update != "fixed":
        reference = reference.frozen_copy()  # evaluation keeps the one that stays
    return World(
        policy=parts.model, reference=reference, data=parts.followed or parts.data,
        prompts=parts.prompts,
        reward=parts.judge(parts.reward, parts.prompts, in_parts=True), seed=parts.config.seed,
        data_reward=parts.judge(parts.reward, parts.data, in_parts=True),
        batch_size=parts.config.batch_size, micro_batch_tokens=parts.micro_batch_tokens,
    )  # fmt: skip


def make_settings(parts: Parts) -> loop.Settings:
    """The loop's settings; what is not given comes from the row."""
    config = parts.config
    source = parts.prompts if parts.method.terms[0].source.draws else parts.data
    assert source is not None, "checked by prepare"
    per_epoch = updates_per_epoch(parts.method, len(source), config.batch_size)
    steps = config.max_steps or max(1, round(config.epochs * per_epoch))
    return loop.Settings(
        max_steps=steps,
        learning_rate=config.learning_rate or _rate(parts),
        lr_schedule=config.lr_schedule,
        warmup_ratio=config.warmup_ratio,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        log_every=config.log_every,
        eval_every=config.eval_every or steps,
        save_every=config.save_every,
        max_skipped=config.max_skipped,
        best_by=config.best_by,
    )


def _rate(parts: Parts) -> float:
    """The row's learning rate; ten times that for an adapter, as is usual: its updates have fewer
    directions, and start from nothing."""
    rate = parts.method.defaults.get("learning_rate", 1e-6)
    return 10 * rate if parts.model.trunk.has_adapter else rate


def keeps_reference(parts: Parts) -> bool:
    """Whether the reference's log-probs of the data are computed once, before the first update."""
    possible = reference_cache.obstacle(parts.method, parts.reference) is None
    kept = parts.config.reference_cache is not False and parts.followed is None
    return possible and kept


def blocks_are(parts: Parts, settings: loop.Settings) -> dict[str, bool]:
    """Whether the model's blocks are compiled, and whether their activations are recomputed:
    settled once, since it takes forward passes and looks at the free memory."""
    if parts.blocks is None:
        parts.blocks = current().agreed(_settle_blocks(parts, settings))
    return parts.blocks


def _settle_blocks(parts: Parts, settings: loop.Settings) -> dict[str, bool]:
    rows, trunk = parts.data or parts.prompts, parts.model.trunk
    if rows is None:
        return {"compile": False, "activation_checkpointing": False}
    prompt, response, count = automatic.tokens_of(parts.method, rows, parts.config.max_new_tokens)
    of_a_group = prompt + count * response
    tokens = parts.config.batch_size * of_a_group
    return {
        "compile": automatic.compiles(parts.config, trunk, tokens, settings.max_steps),
        "activation_checkpointing": automatic.recomputes(parts.config, trunk, of_a_group),
    }


def resolved_config(parts: Parts, settings: loop.Settings) -> dict[str, Any]:
    """config.yaml: every setting as it is used, what was automatic included."""
    hidden = {*SETTINGS, "resume", "output", "method", "terms", "reward", "label_source"}
    flat = parts.config.model_dump(exclude=hidden, exclude_none=True)
    reward = parts.reward.name if isinstance(parts.reward, rewards.Length) else parts.config.reward
    told = judges.label_source(parts.reward, parts.config.data)
    judged_by = parts.config.label_source or told
    averages = parts.method.reference_update == "ema"
    return {
        "method": parts.method.name,
        "terms": spec.to_data(parts.method),
        "reference_update": parts.method.reference_update,
        **({"ema_decay": parts.method.ema_decay} if averages else {}),
        **({"target_kl": parts.method.target_kl} if parts.method.target_kl else {}),
        **({"patience": parts.method.patience} if parts.method.patience else {}),
        **flat,
        **({"reward": reward} if reward else {}),
        **({"label_source": judged_by} if judged_by else {}),
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "eval_every": settings.eval_every,
        **({"micro_batch_tokens": parts.micro_batch_tokens} if parts.micro_batch_tokens else {}),
        "dtype": "bfloat16"
        if parts.model.autocast
        else str(parts.model.model.dtype).removeprefix("torch."),
        "device": parts.model.device.type,
        **blocks_are(parts, settings),
        "packing": parts.model.packing,
        "share_prefix": parts.model.share_prefix,
        **({"reference_cache": True} if keeps_reference(parts) else {}),
        "threads": torch.get_num_threads(),
    }
