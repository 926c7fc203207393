"""Rules that turn TRL's settings into preftune's, and back.

A rule is a pair: `there` takes TRL's values and gives settings with what differs, `back` takes a
configuration and gives TRL's values. Rules of methods stand in `rows`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.config import Config
from preftune.errors import UserError
from preftune.from_trl.table import Field, Trainer

Settings = dict[str, Any]
Notes = dict[str, str]
"""What differs, by TRL's name: what preftune does instead."""


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """A run of TRL's."""

    trainer: Trainer
    values: Mapping[str, Any]
    """Every setting of the trainer's, defaults included."""
    given: frozenset[str]
    """Those that the user gave."""

    def number(self, name: str, *, least: float | None = None) -> float:
        """A value as a number.

        Raises:
            UserError: it is none, or too small.
        """
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise UserError(f"{name}: {value!r} is no number.")
        if least is not None and value < least:
            raise UserError(f"{name}: {value} is too small. Give {least:g} or more.")
        return value

    def whole(self, name: str, *, least: int = 0) -> int:
        """A value as a whole number."""
        value = self.number(name, least=least)
        if int(value) != value:
            raise UserError(f"{name}: {value} is no whole number.")
        return int(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A run of preftune's."""

    trainer: Trainer
    config: Config
    bound: Mapping[str, Any] = field(default_factory=dict)
    """TRL's values that its row holds (`rows.match`)."""
    fields: frozenset[str] = frozenset()
    """TRL's settings that the trainer has."""


There = Callable[[Theirs], tuple[Settings, Notes]]
Back = Callable[[Ours], dict[str, Any]]


def same(row: Field) -> tuple[There, Back]:
    """The value as it is."""

    def there(theirs: Theirs) -> tuple[Settings, Notes]:
        value = theirs.values[row.name]
        return ({} if value is None else {row.to: value}), {}

    def back(ours: Ours) -> dict[str, Any]:
        value = getattr(ours.config, row.to)
        return {} if value is None else {row.name: value}

    return there, back


EMBEDDED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m"}
"""Models that preftune has under a name of its own."""


def model_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The embedded model is the Hub's of that id."""
    name = theirs.values["model_name_or_path"]
    if name is None:
        return {}, {"model_name_or_path": "none is given: preftune train takes its embedded model"}
    return {"model": EMBEDDED.get(str(name), str(name))}, {}


def model_back(ours: Ours) -> dict[str, Any]:
    """The Hub's id of the embedded model."""
    named = {own: hub for hub, own in EMBEDDED.items()}
    return {"model_name_or_path": named.get(ours.config.model, ours.config.model)}


LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Of `datasets.load_dataset`, by the ending of a file's name."""


def data_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """A Hub id or a folder; or the one data set of a mixture."""
    mixture, name = theirs.values["datasets"], theirs.values["dataset_name"]
    if not mixture:
        if name is None:
            return {}, {"dataset_name": "none is given: give --data to preftune train"}
        return {"data": str(name)}, {}
    entries = mixture if isinstance(mixture, list) else [mixture]
    if len(entries) > 1 or not isinstance(entries[0], Mapping) or "path" not in entries[0]:
        raise UserError("datasets: preftune reads one data set. Join their rows in one file.")
    entry = dict(entries[0])
    path, files = str(entry.pop("path")), entry.pop("data_files", None)
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, str) and path in LOADERS.values():
        path, files = files, None
    plain = {"name": None, "split": "train", "data_dir": None, "columns": None, "fraction": None}
    left = {k: v for k, v in {**entry, "data_files": files}.items() if v != plain.get(k)}
    notes = {f"datasets.{k}": "not read; save these rows as a file" for k in left}
    return {"data": path}, notes


def data_back(ours: Ours) -> dict[str, Any]:
    """A file goes through the loader of its kind."""
    data = ours.config.data
    if data is None:
        return {}
    loader = LOADERS.get(Path(data).suffix.lower())
    if loader is None and not ours.config.eval_fraction:  # a mixture alone can be split
        return {"dataset_name": data}
    entry = {"path": data} if loader is None else {"path": loader, "data_files": data}
    return {"datasets": [entry]}


def batch_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """Items of an update: a device's, times accumulation, times processes, in groups."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
    size = math.prod(theirs.whole(name, least=1) for name in names)
    if not theirs.trainer.groups:
        return {"batch_size": size}, {}
    group = theirs.whole("num_generations", least=2)
    if size % group:
        raise UserError(
            f"num_generations: {group} does not divide the {size} responses of an update "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes)."
        )
    return {"batch_size": size // group}, {}


def batch_back(ours: Ours) -> dict[str, Any]:
    """One device, without accumulation."""
    group = ours.bound["num_generations"] if ours.trainer.groups else 1
    return {"per_device_train_batch_size": ours.config.batch_size * group}


def max_steps_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """-1 is none."""
    steps = theirs.whole("max_steps", least=-1)
    return ({"max_steps": steps} if steps > 0 else {}), {}


def max_steps_back(ours: Ours) -> dict[str, Any]:
    """None is -1, TRL's default."""
    return {} if ours.config.max_steps is None else {"max_steps": ours.config.max_steps}


def warmup_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """A whole number is of steps, a smaller one their share."""
    name = "warmup_ratio" if theirs.values.get("warmup_ratio") else "warmup_steps"
    warmup = theirs.number(name, least=0)
    if theirs.values["lr_scheduler_type"] == "constant":  # transformers has no warm-up there
        warmup = 0
    steps = warmup >= 1 or (not warmup and isinstance(warmup, int))
    found: Settings = {"warmup_steps": int(warmup)} if steps else {"warmup_ratio": float(warmup)}
    first = "the first update has 1/n of the rate, in TRL none: of a warm-up of n steps"
    return found, ({name: first} if warmup else {})


def warmup_back(ours: Ours) -> dict[str, Any]:
    """Steps, or a share of them."""
    config = ours.config
    if config.warmup_steps is not None:
        return {"warmup_steps": config.warmup_steps}
    whole = config.warmup_ratio == 1  # TRL would read 1.0 as one step
    return {"warmup_steps": math.nextafter(1.0, 0) if whole else config.warmup_ratio}


SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant",
             "constant_with_warmup": "constant"}  # fmt: skip


def schedule_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The nearest of three schedules."""
    name = str(theirs.values["lr_scheduler_type"])
    if name in SCHEDULES:
        return {"lr_schedule": SCHEDULES[name]}, {}
    kind = next((k for k in ("cosine", "constant") if k in name), "linear")
    return {"lr_schedule": kind}, {"lr_scheduler_type": f"{kind}, the nearest of three"}


def schedule_back(ours: Ours) -> dict[str, Any]:
    """transformers' `constant` has no warm-up."""
    name = ours.config.lr_schedule
    return {"lr_scheduler_type": "constant_with_warmup" if name == "constant" else name}


def optimizer_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """AdamW, whatever it is."""
    name = str(theirs.values["optim"])
    usual = name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")
    return {"optimizer": "adamw"}, {} if usual else {"optim": "torch's fused AdamW in float32"}


UNCLIPPED = 1e9
"""A norm that no gradient has."""


def norm_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """0 clips nothing."""
    norm = theirs.number("max_grad_norm", least=0)
    return {"max_grad_norm": float(norm) or UNCLIPPED}, {}


def norm_back(ours: Ours) -> dict[str, Any]:
    """As it is; a norm that no gradient has is TRL's 0."""
    norm = ours.config.max_grad_norm
    return {"max_grad_norm": 0.0 if norm >= UNCLIPPED else norm}


def decay_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The same, of all weights."""
    decay = theirs.number("weight_decay", least=0)
    notes = {"weight_decay": "of all weights; TRL leaves out biases and norms"} if decay else {}
    return {"weight_decay": float(decay)}, notes


def decay_back(ours: Ours) -> dict[str, Any]:
    """As it is."""
    return {"weight_decay": ours.config.weight_decay}


def precision_there(theirs: Theirs) -> tuple[Settings, Notes]:
    """TRL computes in bfloat16 unless told otherwise."""
    if theirs.values["fp16"]:
        return {"dtype": "bfloat16"}, {"fp16": "bfloat16: float16 is not supported"}
    half = theirs.values["bf16"]
    return {"dtype": "float32" if half is False else "bfloat16"}, {}


def precision_back(ours: Ours) -> dict[str, Any]:
    """What is settled at the start is TRL's default."""
    return {} if ours.config.dtype == "auto" else {"bf16": ours.config.dtype == "bfloat16"}
