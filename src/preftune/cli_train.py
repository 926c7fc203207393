"""The commands that train: settings from a file, flags and --set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.errors import UserError

JSON = ("json", bool, False, "print one JSON document and nothing else on stdout")
_UNUSED = (
    "method", "reward", "gold", "reward_weights", "judge", "retention", "prompts",
    "prompts_per_round", "samples_per_prompt", "passes", "max_new_tokens", "temperature", "top_p",
    "top_k", "min_new_tokens", "stop", "beta", "tau", "clip", "kl", "target_kl", "patience",
    "max_weight",
    "baseline", "reference", "reference_update", "ema_decay", "reference_cache", "weight", "unit",
)  # fmt: skip
"""Flags that the training of a reward model has no use for: it samples nothing."""


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    from preftune.runs import dumps

    print(dumps(value))


def settings(
    given: dict[str, Any], config_file: str | None, pairs: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """The configuration from a file, flags and --set, and the overrides below `terms`."""
    from preftune import config as configs

    values = configs.read_yaml(Path(config_file)) if config_file else {}
    values.update(given)
    overrides: dict[str, Any] = {}
    for pair in pairs:
        path, value = assigned(pair)
        if path.startswith("terms."):
            overrides[path] = value
        elif path in configs.Config.model_fields:
            values[path] = value
        elif path in (of_adapter := [f"adapter.{n}" for n in configs.Adapter.model_fields]):
            values["adapter"] = {**_mapping(values), path.removeprefix("adapter."): value}
        else:
            known = [*configs.Config.model_fields, "terms.0.weight", *of_adapter]
            raise UserError(f"--set {path}: there is no '{path}'.{configs.suggest(path, known)}")
    return values, overrides


def assigned(pair: str) -> tuple[str, Any]:
    """Path and value of a --set.

    Raises:
        UserError: it is not PATH=VALUE.
    """
    import yaml

    path, equals, text = pair.partition("=")
    if not equals:
        raise UserError(f"--set {pair}: must be PATH=VALUE, as terms.1.weight=0.3.")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {pair}: the value is no plain YAML.") from error


def _mapping(values: dict[str, Any]) -> dict[str, Any]:
    """The adapter given so far, of which `adapter: lora` is one spelling."""
    given = values.get("adapter") or {}
    return dict(given) if isinstance(given, dict) else {"kind": given}


def train(args: list[str]) -> int:
    """preftune train."""
    from preftune import flags

    text = "Tune a model on preferences with a row of the table (preftune methods)."
    folder, last, as_json = _run("train", text, flags.TRAIN, args, {})
    if as_json:
        print_json({"folder": str(folder), "metrics": last})
    else:
        print(f"model: {folder / 'model'}\nreport: {folder / 'report.html'}")
    return 0


def reward(args: list[str]) -> int:
    """preftune reward: the row of that name, and what became of it on held-out pairs."""
    from preftune import flags, inspecting
    from preftune.runs import RunFolder

    text = "Train a Bradley-Terry reward model on preference pairs, for --reward DIR/model."
    names = [n for n in flags.TRAIN if n not in _UNUSED]
    folder, last, as_json = _run("reward", text, names, args, {"method": "reward"})
    found = RunFolder(folder).read_json("evaluation.json") or {}
    if as_json:
        print_json({"folder": str(folder), "metrics": last, "evaluation": found})
        return 0
    if found:
        title = "Held-out pairs, 95 % intervals over prompts; this run only (one training seed)"
        inspecting.figures(title, found)
        gain = found["accuracy_gain"]
        if gain["low"] is None or gain["low"] <= 0:
            print("It does not beat the best rule that reads nothing beyond this run's noise.")
    print(f"use it: --reward {folder / 'model'}\nreport: {folder / 'report.html'}")
    return 0


def merge(args: list[str]) -> int:
    """preftune merge: the full model of a run with an adapter, or of a PEFT folder."""
    import tyro

    from preftune import flags
    from preftune.progress import stderr, working

    _, own = flags.parse(
        "merge",
        "Write the full model of a run with an adapter, or of a PEFT folder.",
        (),
        args,
        [
            ("folder", tyro.conf.Positional[tuple[str, ...]], (), "of a run, or a PEFT folder"),
            ("output", str | None, None, "the model's folder; it must not be there yet"),
            ("base", str | None, None, "the base model; default: the one that the adapter names"),
            ("dtype", str, "float32", "float32 or bfloat16, which rounds small changes away"),
            JSON,
        ],
    )
    if len(own["folder"]) != 1 or own["output"] is None:
        raise UserError("merge: give one run's folder or PEFT folder, and --output DIR.")
    if own["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"flag '--dtype': is {own['dtype']}. Give float32 or bfloat16.")
    with working(stderr(), "merging"):
        import torch

        from preftune import merging

        place = merging.merge(
            own["folder"][0], Path(own["output"]), own["base"], getattr(torch, own["dtype"])
        )
    print_json({"folder": str(place)}) if own["json"] else print(f"model: {place}")
    return 0


def of_run(
    command: str, text: str, names: Sequence[str], args: Sequence[str], extra: Sequence[Any] = ()
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run's settings from flags, file and --set; overrides below `terms`; and other flags."""
    import tyro

    from preftune import flags

    many = tyro.conf.UseAppendAction[tuple[str, ...]]
    given, own = flags.parse(
        command,
        text,
        names,
        args,
        [
            ("config", str | None, None, "YAML file of settings; flags win"),
            ("set", many, (), "PATH=VALUE, e.g. terms.1.weight=0.3; may be repeated"),
            *extra,
            JSON,
        ],
    )
    return *settings(given, own["config"], own["set"]), own


def _run(
    command: str, text: str, names: Sequence[str], args: list[str], fixed: dict[str, Any]
) -> tuple[Path, dict[str, Any], bool]:
    """Train as the flags say; the run's folder, its last metrics, and whether JSON is asked for."""
    from preftune import config as configs
    from preftune.progress import Progress, stderr, working

    values, overrides, own = of_run(command, text, names, args)
    values = {**values, **fixed}
    configs.load(values)  # before torch is loaded, which takes seconds
    console = stderr()
    with working(console, "loading"):
        from preftune.resuming import resumed
        from preftune.training import train as run
    with Progress(console) as bar:
        done = run(resumed(values), callbacks=[bar], overrides=overrides)
    return done.folder, done.metrics[-1] if done.metrics else {}, own["json"]
