"""What a run is made of, loaded and checked before anything is written but refused rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftune import (
    automatic,
    building,
    engines,
    huggingface,
    judges,
    judging,
    likelihoods,
    loading,
    loop,
    reference_cache,
    rewards,
    spec,
)
from preftune.config import Config
from preftune.data import Rejected, Renderer, Report, Rows, write_rejected
from preftune.errors import BadRows, UserError
from preftune.methods import SETTINGS, Method
from preftune.policies.transformer import Transformer
from preftune.reward_model import RewardModel
from preftune.rounds import World, updates_per_epoch
from preftune.runs import unnamed
from preftune.team import current

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.05, 200, 64


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

    def judge(
        self, reward: rewards.Reward | None, rows: Rows | None, *, in_parts: bool = False
    ) -> Any:
        """A reward of samples that answer `rows`, or None; with its parts, as the loop takes it."""
        if reward is None or rows is None or self.renderer is None:
            return None
        make = judges.judge_in_parts if in_parts else judges.judge_of
        return make(reward, rows, self.renderer)


def prepare(
    config: Config,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    reward: Any = None,
    overrides: Mapping[str, Any] | None = None,
    trains: bool = True,
) -> Parts:
    """Load everything that the settings name; objects given replace the settings of that name.

    Args:
        overrides: dotted paths below `terms`, from `--set`.
        trains: False for a bare gradient: no held-out rows, and samples may stand in for data.
    Raises:
        UserError: the first thing that is wrong, with its cure.
    """
    method = building.method_of(config, overrides)
    building.check_adapter(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    made_reward = judges.make_reward(reward or config.reward, config.reward_weights)
    gold = judges.make_reward(config.gold, None)
    data = config.data if data is None else data
    if trains:
        _check_needs(config, method, made_reward, data)
        _check_measures(config)
        engines.check(config, method)
    team = current()
    output = team.agreed(Path(config.output) if config.output else unnamed(method.name))
    if tokenizer is None and (data is not None or config.prompts or model is None):
        tokenizer = huggingface.load_tokenizer(_tokenizer_name(config, model))
    trained = building.make_model(config, model, tokenizer, method)
    renderer = None
    if tokenizer is not None:
        _check_vocabulary(tokenizer, trained.model)
        renderer = building.make_renderer(config, tokenizer, trained)
    parts = Parts(
        config=config, method=method, output=output, model=trained, reference=None,
        tokenizer=tokenizer, renderer=renderer, data=None, prompts=None,
        held_out=None, reward=made_reward, gold=gold,
    )  # fmt: skip
    _load_data(parts, data, trains)
    rows = parts.data or parts.prompts
    if rows is not None:  # before the reference is made, which is laid out as the policy is
        parts.notes += automatic.choose_layout(config, trained.trunk, parts.method, rows)
    _load_reference(parts)
    reason = reference_cache.obstacle(parts.method, parts.reference)
    if trains and config.reference_cache and reason is not None:
        raise UserError(f"reference_cache: {reason}. Leave it out.")
    if trains and team.main:  # asked once
        _try_servers(parts)
    # what is free now differs from process to process
    budgets = team.gather(automatic.row_budget(config, trained.trunk))
    parts.micro_batch_tokens = min((b for b in budgets if b is not None), default=None)
    if trained.autocast is not None and config.dtype == "auto":
        parts.notes.append(
            f"compute in {trained.autocast} over float32 weights: faster on this machine"
        )
    return parts


def _try_servers(parts: Parts) -> None:
    """Judges give numbers, and an engine is of the run's model."""
    if parts.renderer is not None:
        for judge in (parts.reward, parts.gold):
            judges.try_reward(judge, parts.prompts, parts.renderer)
    if parts.prompts is not None:
        room = max(map(len, parts.prompts.prompts)) + parts.config.max_new_tokens
        engines.check_model(parts.config, parts.method, parts.model, parts.tokenizer, room)


def _tokenizer_name(config: Config, model: Any) -> str:
    """Where the tokenizer is: with the model that is named, or with the object's own folder."""
    own = getattr(model, "name_or_path", "")
    return own if own and "model" not in config.model_fields_set else config.model


def _check_vocabulary(tokenizer: Any, model: Any) -> None:
    """A tokenizer of another model would index past the embedding, or train nonsense."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens and the model {rows}. "
            "Give the model's own tokenizer."
        )


def _check_needs(config: Config, method: Method, reward: rewards.Reward | None, data: Any) -> None:
    """The reward and the data that the row needs."""
    drawing = [t for t in method.terms if "reward" in t.needs and t.source.draws]
    if reward is None and drawing:
        raise _no_reward(method)
    want = loading.want_of(method)
    if data is None and (want != "prompts" or config.prompts is None):
        raise UserError(
            f"data: the method '{method.name}' needs {want}. Give --data a file or a Hub id."
        )


def _check_measures(config: Config) -> None:
    """What evaluation needs besides prompts: a judge that answers, a text to be read."""
    if config.judge is not None:
        judging.check(judging.connect(config.judge))
    if config.retention is not None:
        likelihoods.plain_text(config.retention)


def _no_reward(method: Method) -> UserError:
    return UserError(
        f"reward: the method '{method.name}' judges responses and needs one, "
        "e.g. --reward length:within=20."
    )


def _load_data(parts: Parts, data: Any, trains: bool) -> None:
    """Data, prompts and held-out rows; refused rows go beside the output."""
    config = parts.config
    if parts.renderer is None:
        return
    draws = any(t.source.draws or t.source.on_policy for t in parts.method.terms)
    reserve = config.max_new_tokens if draws else 0
    # room for the control behind a prompt
    controls = building.controls_of(parts.method, parts.renderer.tokenizer) or ([],)
    reserve += max(map(len, controls))
    rejected: list[Rejected] = []
    try:
        if data is not None:
            want = loading.want_of(parts.method)
            parts.data, report = _load_rows(parts, data, want, reserve, rejected)
            parts.notes.append(loading.describe(parts.data, report, len(rejected)))
            parts.notes += loading.unused(parts.method, parts.data)
            scored = parts.reward is None and loading.has_scores(parts.data)
            parts.method = loading.fitted(parts.method, parts.data, scored=scored)
            if trains and "reward" in parts.method.needs and not (parts.reward or scored):
                raise _no_reward(parts.method)
        if config.prompts is not None:
            parts.prompts, _ = _load_rows(parts, config.prompts, "prompts", reserve, rejected)
        if trains and config.eval_data is not None:
            # pairs among them are measured too
            room, want = (0, "pairs") if _scores(parts) else (config.max_new_tokens, "any")
            parts.held_out, _ = _load_rows(parts, config.eval_data, want, room, rejected)
    except BadRows as error:
        rejected.extend(error.rejected)
        raise
    finally:
        if trains:
            _keep_rejected(parts, rejected)
    if trains and config.eval_data is None:
        _hold_out(parts)
    parts.prompts = parts.prompts or parts.data


def _load_rows(
    parts: Parts, source: Any, want: str, reserve: int, rejected: list[Rejected]
) -> tuple[Rows, Report]:
    """Rows of one source; what it refuses is added to `rejected`."""
    assert parts.renderer is not None, "a tokenizer is loaded where there is data"
    context = building.context_of(parts.model.model)
    rows, report, refused = loading.load_rows(
        source, parts.config, parts.renderer, want=want, context=context, reserve=reserve
    )
    rejected.extend(refused)
    return rows, report


def _keep_rejected(parts: Parts, rejected: Sequence[Rejected]) -> None:
    """Refused rows stand beside the output, whether or not the run begins."""
    if rejected and current().main:
        path = Path(f"{parts.output}.rejected.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rejected(rejected, path)
        parts.notes.append(f"refused rows were kept in {path}")


def _scores(parts: Parts) -> bool:
    """The model is one of the reward: it is evaluated on pairs, and nothing is sampled."""
    return isinstance(parts.model, RewardModel)


def _hold_out(parts: Parts) -> None:
    """Set rows of the data aside for evaluation."""
    rows, config = parts.data, parts.config
    if rows is None:
        return
    if config.eval_fraction is not None:
        count = round(config.eval_fraction * len(rows))
    elif (parts.reward or _scores(parts)) and len(rows) >= HELD_OUT_LEAST:
        count = min(int(HELD_OUT_SHARE * len(rows)), HELD_OUT_MOST)
    else:
        count = 0
    if count == 0:
        parts.notes.append(
            "no held-out prompts: give eval_data or eval_fraction to see reward and KL"
        )
        return
    if count == len(rows):
        raise UserError(
            f"eval_fraction: {config.eval_fraction} of {len(rows)} rows leaves none to train on."
        )
    kept, held = loading.split_off(rows, count, config.seed)
    if not held:
        parts.notes.append("no held-out prompts: every row has the same prompt; give eval_data")
        return
    parts.data, parts.held_out = rows.select(kept), rows.select(held)
    parts.notes.append(f"{len(held)} rows held out for evaluation")


def _load_reference(parts: Parts) -> None:
    """The reference, where something asks for it; and the target of a bare `length:mode`."""
    _make_reference(parts)
    open_mode = rewards.is_open(parts.reward) or rewards.is_open(parts.gold)
    if open_mode and parts.prompts is not None and parts.reference is not None:
        target = judges.measured_mode(parts.reference, parts.prompts)
        parts.reward = parts.reward and rewards.aimed(parts.reward, target)
        parts.gold = parts.gold and rewards.aimed(parts.gold, target)
        parts.notes.append(f"length:mode aims at the reference's most common length: {target}")
    if parts.model.trunk.has_adapter:  # the base model stays as it is
        parts.model.trunk.narrow()


def _make_reference(parts: Parts) -> None:
    """The reference, where something asks for it.

    Raises:
        UserError: it would have to move, and shares its weights with the policy.
    """
    needs = parts.method.needs
    draws_from_it = any(loading.draws_from_reference(t.source) for t in parts.method.terms)
    open_mode = rewards.is_open(parts.reward) or rewards.is_open(parts.gold)
    if _scores(parts):
        return
    if "ref_logp" in needs or draws_from_it or parts.held_out is not None or open_mode:
        parts.reference = building.make_reference(parts.config, parts.policy)
        if parts.method.reference_update != "fixed" and parts.reference.trunk.adapter_off:
            raise UserError(
                f"reference_update: {parts.method.reference_update} moves a reference with weights "
                "of its own; beside an adapter it is the model with the adapter off. Set it to "
                "fixed, or leave the adapter out."
            )
        if parts.method.reference_update == "fixed" and not parts.reference.trunk.adapter_off:
            parts.reference.trunk.narrow()


def make_world(parts: Parts) -> World:
    """What the loop's rounds are made from."""
    reference = parts.reference
    if reference is not None and parts.method.reference_update != "fixed":
        reference = reference.frozen_copy()  # evaluation keeps the one that stays
    return World(
        policy=parts.model, reference=reference, data=parts.data, prompts=parts.prompts,
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
    return possible and parts.config.reference_cache is not False


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
    return {
        "method": parts.method.name,
        "terms": spec.to_data(parts.method),
        "reference_update": parts.method.reference_update,
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
