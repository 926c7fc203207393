"""A PEFT folder on disk, looked at before anything of it is loaded.

What is taken from `adapter_config.json` is a short list of plain values. Which modules an adapter
changes, and with how many ranks, is read off the names and shapes of its weights: the patterns
that may stand in the configuration are regular expressions, and some take for ever.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from preftune.errors import UserError
from preftune.model_folder import DEFAULT_MODEL

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
"""Estimates of the reward before each token, where training had them."""
PREFIX = "base_model.model."
"""Of the names of weights in such a folder."""
_LARGEST = 2**24
"""Bytes of a configuration, at most; ours have a few thousand."""
_PLAIN = re.compile(r"[\w.^$-]{1,300}")
"""A pattern that any engine matches in one pass."""
_UNKNOWN = (
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config",
    "megatron_config",
)  # fmt: skip
"""Settings of peft that change what the adapter computes, and are not supported here."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model as it is."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a folder says of its adapter."""

    folder: Path
    base: str
    """The base model: a folder, a Hub id or the embedded default."""
    scores: bool
    """It is an adapter of a sequence-classification model."""
    settings: dict[str, Any]
    """For peft's LoraConfig."""


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter, as transformers decides it."""
    return (Path(name) / CONFIG).is_file()


def describe(name: str | Path, base: str | None = None) -> Described:
    """What an adapter's folder holds.

    Args:
        base: the base model, in place of the one that the folder names.
    Raises:
        UserError: anything that is not as it should be.
    """
    folder = Path(name)
    read = _Reader(str(name), _values(folder))
    base = base_of(folder, base or read.text("base_model_name_or_path"))
    if read.values.get("peft_type") != "LORA":
        raise read.refuse("peft_type", "Give LoRA (also rsLoRA or DoRA), or merge it with peft.")
    task = read.values.get("task_type")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise read.refuse("task_type", "Give an adapter of a causal language model.")
    for key in _UNKNOWN:
        if read.values.get(key):
            raise read.refuse(key, "This is not supported. Merge the adapter with peft.")
    start = read.values.get("init_lora_weights")
    if not any(start is known or start == known for known in _STARTS if type(start) is type(known)):
        raise read.refuse(
            "init_lora_weights",
            "It changes the base model's weights. Save the adapter converted to LoRA with peft.",
        )
    ranks = _ranks(folder)
    return Described(
        folder=folder, base=base, scores=task == "SEQ_CLS", settings=_settings(read, ranks, task)
    )


def _settings(read: "_Reader", ranks: Mapping[str, int], task: str | None) -> dict[str, Any]:
    """What peft's LoraConfig is given."""
    rank = read.whole("r")
    if rank not in ranks.values() and rank > max(ranks.values()):
        raise read.refuse("r", f"The weights have ranks up to {max(ranks.values())}.")
    bias = read.values.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise read.refuse("bias", "It must be none, all or lora_only.")
    return {
        "r": rank,
        "lora_alpha": read.number("lora_alpha"),
        "target_modules": sorted(ranks),
        "rank_pattern": {name: found for name, found in ranks.items() if found != rank},
        "alpha_pattern": read.patterns("alpha_pattern"),
        "use_rslora": read.switch("use_rslora"),
        "use_dora": read.switch("use_dora"),
        "fan_in_fan_out": read.switch("fan_in_fan_out"),
        "lora_bias": read.switch("lora_bias"),
        "bias": bias,
        "modules_to_save": read.names("modules_to_save"),
        "task_type": task,
    }


def base_of(folder: Path, base: str) -> str:
    """Where the base model is: as named, seen from here or from the adapter's folder; the embedded
    default by its folder's name, since a cache is elsewhere on every machine.

    Raises:
        UserError: a local folder that is not there, or holds an adapter itself.
    """
    places = [Path(base), folder / base]
    found = next((p for p in places if p.is_dir()), None)
    local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if found is None and Path(base).name == DEFAULT_MODEL:
        return DEFAULT_MODEL
    if found is None and local:
        raise UserError(
            f"adapter '{folder}': its base model '{base:.200}' is not there. Put it back, or name "
            f"its place: preftune merge {folder} --base MODEL --output DIR."
        )
    if found is not None and is_adapter(found):
        raise UserError(
            f"adapter '{folder}': its base model '{found}' is an adapter itself. Merge that one "
            f"(preftune merge {found} --output DIR), and name DIR as the base."
        )
    return base if found is None else str(found)


def _values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"adapter '{folder}': {CONFIG} cannot be read ({type(error).__name__}: {error}). "
            "Copy or download the folder anew."
        ) from error
    return values


def _ranks(folder: Path) -> dict[str, int]:
    """The modules that an adapter changes, and its rank there, by the headers of its weights."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = any(folder.glob("adapter_model.*"))
        why = "has pickled weights, which can run code" if pickled else f"holds no {WEIGHTS}"
        raise UserError(
            f"adapter '{folder}': {why}. Save it with safetensors (model.save_pretrained)."
        )
    found: dict[str, int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                for end in (".lora_A.weight", ".lora_embedding_A"):
                    if name.startswith(PREFIX) and name.endswith(end):
                        shape = file.get_slice(name).get_shape()
                        found[name[len(PREFIX) : -len(end)]] = shape[0] if shape else 0
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"adapter '{folder}': {WEIGHTS} cannot be read as safetensors ({error}). "
            "Copy or download the folder anew."
        ) from error
    if not found or min(found.values()) < 1 or not all(map(_PLAIN.fullmatch, found)):
        raise UserError(
            f"adapter '{folder}': {WEIGHTS} holds no weights of LoRA by peft's names. "
            "Save it with model.save_pretrained."
        )
    return found


@dataclass(frozen=True)
class _Reader:
    """Values of a configuration that was written elsewhere, each of the type that it must have."""

    name: str
    values: Mapping[str, Any]

    def refuse(self, key: str, cure: str) -> UserError:
        """What is wrong with a value."""
        return UserError(
            f"adapter '{self.name}': {CONFIG} has {key} {self.values.get(key)!r:.80}. {cure}"
        )

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.values.get(key)
        if value is None:
            raise UserError(
                f"adapter '{self.name}': {CONFIG} names no base model ({key}). Name it: "
                f"preftune merge {self.name} --base MODEL --output DIR."
            )
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.refuse(key, "It must be the base model's folder or Hub id.")
        return value

    def whole(self, key: str) -> int:
        """A number from 1."""
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "It must be a whole number from 1.")
        return value

    def number(self, key: str) -> int | float:
        """A finite number."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise self.refuse(key, "It must be a number.")
        return value

    def switch(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.refuse(key, "It must be true or false.")
        return value

    def names(self, key: str) -> list[str] | None:
        """Names of modules."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(v, str) and _PLAIN.fullmatch(v) for v in value
        ):
            raise self.refuse(key, "It must be a list of names of modules.")
        return value

    def patterns(self, key: str) -> dict[str, int | float]:
        """Names of modules to numbers; regular expressions that repeat are not run."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict) or not all(
            isinstance(k, str) and _PLAIN.fullmatch(k) for k in value
        ):
            raise self.refuse(key, "It must map names of modules to numbers.")
        return {k: _Reader(self.name, value).number(k) for k in value}
