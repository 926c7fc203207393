"""A run's parts, loaded and checked before anything is written but refused rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preftune import (
    automatic,
    building,
    engines,
    following,
    huggingface,
    judges,
    judging,
    likelihoods,
    loading,
    reference_cache,
    rewards,
    run_data,
)
from preftune.config import Config
from preftune.errors import UserError
from preftune.method import Method
from preftune.parts import Parts
from preftune.runs import unnamed
from preftune.team import current


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
    device = building.pick_device(config.device)
    made_reward = judges.make_reward(reward or config.reward, config.reward_weights, device)
    gold = judges.make_reward(config.gold, None, device)
    given, data = data is not None, config.data if data is None else data
    if trains:
        _check_needs(config, method, made_reward, data)
        _check_measures(config)
        engines.check(config, method)
        following.check(config, method, given)
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
    run_data.load_data(parts, data, trains)
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
    if team.note:
        parts.notes.append(team.note)
    if trained.autocast is not None and config.dtype == "auto":
        parts.notes.append(
            f"compute in {trained.autocast} over float32 weights: faster on this machine"
        )
    return parts


def _try_servers(parts: Parts) -> None:
    """Judges read the prompts and give numbers, and an engine is of the run's model."""
    room = parts.config.max_new_tokens
    if parts.renderer is not None:
        judges.check_models(parts.reward, parts.prompts, room if parts.method.draws else 0)
        for judge in (parts.reward, parts.gold):
            judges.check_models(judge, parts.held_out, room)
            judges.try_reward(judge, parts.prompts, parts.renderer)
    if parts.prompts is not None:
        context = max(map(len, parts.prompts.prompts)) + room
        engines.check_model(parts.config, parts.method, parts.model, parts.tokenizer, context)


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
        raise run_data.no_reward(method)
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
    if parts.scores:
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
