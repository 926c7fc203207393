"""Rules of what is cut, logged, kept, evaluated and rewarded (see `rules`)."""

from typing import Any

from preftune.errors import UserError
from preftune.from_trl.rules import Notes, Ours, Settings, Theirs

KEEP = {"keep_start": "right", "keep_end": "left"}
"""What TRL keeps of a row that is too long, and the side that preftune cuts."""
USUAL = 1024
"""Both libraries' limit where none is given; preftune's is the model's context, if that is less."""


def length_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """A limit on prompt and response, and what is done to longer rows."""
    limit = theirs.values["max_length"]
    if limit is None:
        return {}, {"max_length": "the model's context, at most 1024; TRL has no limit then"}
    mode = str(theirs.values.get("truncation_mode", "keep_start"))
    if mode not in KEEP:
        raise UserError(f"truncation_mode: '{mode}' is neither {' nor '.join(KEEP)}.")
    notes = {}
    if not theirs.trainer.truncation:  # a reward model's rows are left out, fresh samples are not
        side = "left" if "max_new_tokens" in theirs.values else "drop"
    else:
        side = KEEP[mode]
    if side == "left":
        name = "truncation_mode" if theirs.trainer.truncation else "max_length"
        notes = {name: "the prompt is cut, never the response, and BOS stays"}
    found: Settings = {"truncation": side}
    if limit != USUAL or "max_length" in theirs.given:  # else a short context lowers it by itself
        found["max_length"] = theirs.whole("max_length", least=2)
    return found, notes


def length_back(ours: Ours) -> dict[str, Any]:
    """TRL cuts responses at the end, or prompts at the beginning."""
    config = ours.config
    out: dict[str, Any] = {}
    if config.max_length is not None:
        out["max_length"] = config.max_length
    side = {cut: kept for kept, cut in KEEP.items()}.get(config.truncation)
    if ours.trainer.truncation and side and "truncation_mode" in ours.fields:
        out["truncation_mode"] = side
    return out


def _steps(theirs: Theirs, name: str) -> tuple[int | None, str]:
    """A count of steps; of a share, the steps where `max_steps` is given. With a note."""
    value = theirs.number(name, least=0)
    if value >= 1:
        return int(value), ""
    total = theirs.whole("max_steps", least=-1)
    if total < 1 or not value:
        return None, "a share of the steps is not known before the data are read"
    return max(1, int(value * total)), ""


def logging_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Every so many steps."""
    every, note = _steps(theirs, "logging_steps")
    found: Settings = {} if every is None else {"log_every": every}
    return found, ({"logging_steps": f"1: {note}"} if note else {})


def logging_back(ours: Ours) -> dict[str, Any]:
    """The same."""
    return {"logging_steps": ours.config.log_every}


def saving_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Every so many steps, or where TRL saves by epochs or never, when a run is interrupted."""
    how = str(theirs.values["save_strategy"])
    if how != "steps":
        why = "a checkpoint is written when the run is interrupted"
        return {}, ({} if how in ("no", "False") else {"save_strategy": why})
    every, note = _steps(theirs, "save_steps")
    found: Settings = {} if every is None else {"save_every": every}
    return found, ({"save_steps": f"when interrupted: {note}"} if note else {})


def saving_back(ours: Ours) -> dict[str, Any]:
    """Without `save_every`, TRL saves nothing on its way."""
    every = ours.config.save_every
    if every is None:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": every}


def evaluation_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Rows held out where TRL evaluates on a share of them; its test split cannot be named."""
    how = str(theirs.values["eval_strategy"])
    if how in ("no", "False"):  # YAML reads a bare no as false
        return {"eval_fraction": 0.0}, {}
    found: Settings = {}
    notes: Notes = {}
    share = theirs.values["test_split_size"]
    if share is None:
        notes["eval_strategy"] = "on rows of eval_data, a file, or held out by eval_fraction"
    elif theirs.number("test_split_size", least=0) < 1:
        found["eval_fraction"] = float(share)
    else:
        notes["test_split_size"] = "a share (eval_fraction), not a count of rows"
    if how != "steps":
        notes["eval_strategy"] = "before the first update and after the last"
        return found, notes
    name = "logging_steps" if theirs.values["eval_steps"] is None else "eval_steps"
    every, note = _steps(theirs, name)
    if note:
        notes[name] = f"before the first update and after the last: {note}"
    return found | ({} if every is None else {"eval_every": every}), notes


def evaluation_back(ours: Ours) -> dict[str, Any]:
    """A share of the rows; TRL has no file of its own for evaluation."""
    config = ours.config
    if not config.eval_fraction:
        return {"eval_strategy": "no"}
    out = {"test_split_size": config.eval_fraction}
    if config.eval_every is None:
        return {**out, "eval_strategy": "epoch"}
    return {**out, "eval_strategy": "steps", "eval_steps": config.eval_every}


BUILT_IN = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""TRL's own rewards, by the names that its command line has for them."""


def rewards_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """A reward model and functions by dotted paths, in TRL's order."""
    names: list[str] = []
    notes: Notes = {}
    for field in ("reward_model_name_or_path", "reward_model_path"):
        if theirs.values.get(field) is not None:
            names.append(str(theirs.values[field]))
    given = theirs.values.get("reward_funcs")
    for name in [] if given is None else given if isinstance(given, list) else [given]:
        module, _, function = str(name).rpartition(".")
        if name in BUILT_IN:
            names.append(f"trl.rewards:{name}")
            notes["reward_funcs"] = f"{name} is TRL's own: trl must be installed"
        elif module:
            names.append(f"{module}:{function}")
        else:
            raise UserError(
                f"reward_funcs: '{name}' is no dotted path. Write a function that calls it and "
                "give pkg.module.function."
            )
    if not names:
        return {}, {"reward_funcs": "none is given: give --reward to preftune train"}
    return {"reward": names[0] if len(names) == 1 else names}, notes


def rewards_back(ours: Ours) -> dict[str, Any]:
    """Functions by dotted paths; a model, where there is one, comes first."""
    given = ours.config.reward
    names = [given] if isinstance(given, str) else given or []
    functions = [n for n in names if ":" in n]
    models = [n for n in names if ":" not in n]
    odd = [n for n in functions if n.startswith(("length:", "judge:", "ensemble:")) or ".py:" in n]
    if odd:
        raise UserError(
            f"reward '{odd[0]}': TRL takes functions in modules. Give pkg.module:function, "
            "or leave the reward out."
        )
    if len(models) > 1 or (models and names[0] != models[0]):
        raise UserError("reward: TRL takes one reward model, before all functions.")
    field = "reward_model_name_or_path" if "reward_funcs" in ours.fields else "reward_model_path"
    if functions and "reward_funcs" not in ours.fields:
        raise UserError(
            f"reward '{functions[0]}': this trainer takes functions in Python alone "
            "(reward_funcs=[...]). Leave the reward out."
        )
    out: dict[str, Any] = {field: models[0]} if models else {}
    return out | ({"reward_funcs": [n.replace(":", ".") for n in functions]} if functions else {})


def template_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """A template's file."""
    path = theirs.values["chat_template_path"]
    if path is None:
        return {}, {}
    if str(path).endswith(".jinja"):
        return {"template": str(path)}, {}
    return {}, {"chat_template_path": "the model's own template; give a .jinja file"}


def template_back(ours: Ours) -> dict[str, Any]:
    """A template's file."""
    path = ours.config.template
    return {"chat_template_path": path} if path.endswith(".jinja") else {}


def device_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The processor, where it is asked for."""
    return ({"device": "cpu"} if theirs.values["use_cpu"] else {}), {}


def device_back(ours: Ours) -> dict[str, Any]:
    """The processor, where it is asked for."""
    return {"use_cpu": True} if ours.config.device == "cpu" else {}


def recompute_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Any way of it is the one that preftune has."""
    value = theirs.values["activation_checkpointing"]
    return ({} if value is None else {"activation_checkpointing": bool(value)}), {}


def cache_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Asked for, it is done; not asked for, it is preftune's choice."""
    return ({"reference_cache": True} if theirs.values["precompute_ref_log_probs"] else {}), {}


def cache_back(ours: Ours) -> dict[str, Any]:
    """Where it is asked for."""
    return {"precompute_ref_log_probs": True} if ours.config.reference_cache else {}
