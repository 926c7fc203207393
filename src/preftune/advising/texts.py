"""A problem whose reference is a model folder: its pairs are text, and it is judged by sampling.

The schema is that of `TextProblem`; paths in a file are relative to it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_args

from preftune import config as configs
from preftune import durable, huggingface, judges, model_folder, rewards
from preftune.advising.stated import FORMAT, Kind, LabelSource, Prices
from preftune.config import Config
from preftune.data import load_examples
from preftune.errors import UserError

Spec = str | Sequence[str]
"""A reward as elsewhere in preftune, or several that are summed."""
Row = Mapping[str, Any]
LEAST = 2
"""Held-out prompts."""


@dataclass(frozen=True, kw_only=True)
class TextLabels:
    """Who judges fresh samples."""

    source: LabelSource
    reward: Spec | None = None
    """Of `rm_other`: a worse version of the true one."""
    reward_weights: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class TextProblem:
    """One problem of a language model."""

    kind: ClassVar[Kind] = "text"
    name: str
    family: str
    """Problems of one family are never in both halves of a cross-validation."""
    folder: Path
    """Where its file stands."""
    reference: Mapping[str, str]
    """`model`: the folder."""
    reward: Spec
    """The true one, in nats: pairs and humans prefer by Bradley-Terry on it."""
    reward_weights: Sequence[float] | None = None
    """What each is multiplied by before they are summed."""
    pairs: Sequence[Row]
    """Rows of prompt, chosen and rejected; in a file also the path of such rows."""
    held_out: Sequence[Row]
    """Prompts that policies are judged on."""
    labels: TextLabels
    prices: Prices
    beta: float
    """What a nat of KL costs in reward: U = E reward - beta KL."""
    budget: float
    """All that may be spent, in the prices' unit."""
    max_new_tokens: int = 28
    """A response that has not ended by then is cut."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was drawn."""

    @property
    def shape(self) -> tuple[str, int, float]:
        """Runs of one problem are run together, those of two never."""
        return self.name, len(self.pairs), self.beta

    @property
    def model(self) -> str:
        """The reference's folder."""
        return str(self.folder / self.reference["model"])

    def true_reward(self) -> rewards.Reward:
        """As a function."""
        return self._made(self.reward, self.reward_weights)

    def other_reward(self) -> rewards.Reward:
        """That of the labels."""
        assert self.labels.reward is not None, "checked where the file was read"
        return self._made(self.labels.reward, self.labels.reward_weights)

    def _made(self, spec: Spec, weights: Sequence[float] | None) -> rewards.Reward:
        found = judges.make_reward(
            [_placed(name, self.folder) for name in _names(spec)],
            None if weights is None else [*weights],
        )
        assert found is not None, "there is a name"
        if rewards.is_open(found):
            raise UserError("reward 'length:mode' has no length here. Give length:mode=L")
        return found

    def config(self) -> Config:
        """Settings by which its model is loaded and its rows are read."""
        return settings_of(self.model, self.max_new_tokens)

    @property
    def digest(self) -> str:
        """Of all that decides what its runs give: the problem, and the files that it names."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256(json.dumps(plain(self), sort_keys=True).encode())
        model = Path(huggingface.resolve_model(self.model))
        for path in (*sorted(model.glob("*")), *self._functions()):
            if path.suffix in (".json", ".safetensors", ".py"):
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    def _functions(self) -> list[Path]:
        """Files of its rewards."""
        named = [n for spec in (self.reward, self.labels.reward) for n in _names(spec or ())]
        each = [Path(_placed(n, self.folder).rpartition(":")[0]) for n in named if ".py:" in n]
        return [path for path in each if path.is_file()]


def settings_of(model: str, max_new_tokens: int) -> Config:
    """Settings by which a tiny model is used: on one core, plain padded rows are the quickest."""
    return configs.load({
        "model": model, "device": "cpu", "dtype": "float32", "share_prefix": False,
        "packing": False, "max_new_tokens": max_new_tokens,
    })  # fmt: skip


def _names(spec: Spec) -> Sequence[str]:
    return [spec] if isinstance(spec, str) else spec


def _placed(spec: str, folder: Path) -> str:
    """A reward whose file or folder is relative to the problem's."""
    path = spec.rpartition(":")[0] if ".py:" in spec else spec
    return str(folder / path) + spec[len(path) :] if path and (folder / path).exists() else spec


def plain(problem: TextProblem) -> dict[str, Any]:
    """As the file holds it."""
    held = {f.name: getattr(problem, f.name) for f in fields(problem) if f.name != "folder"}
    held |= {"labels": vars(problem.labels), "prices": vars(problem.prices)}
    for name in ("pairs", "held_out"):
        held[name] = [dict(row) for row in held[name]]
    return {"format": FORMAT, **held}


def save(problem: TextProblem) -> Path:
    """Write NAME.json, and its pairs beside it in pairs/NAME.jsonl."""
    path, pairs = (problem.folder / n for n in (f"{problem.name}.json", _pairs_of(problem.name)))
    durable.write_rows(pairs, problem.pairs)
    held = plain(problem) | {"pairs": _pairs_of(problem.name)}
    durable.write_text(path, json.dumps(held, separators=(",", ":")) + "\n")
    return path


def _pairs_of(name: str) -> str:
    return f"pairs/{name}.jsonl"


def is_text(found: Any) -> bool:
    """Whether plain data are those of such a problem."""
    return isinstance(found, dict) and isinstance(found.get("reference"), dict)


def checked(found: Mapping[str, Any], folder: Path) -> TextProblem:
    """A problem of plain data.

    Raises:
        KeyError, TypeError, ValueError, UserError: it is not as the schema says.
    """
    if found.get("format") != FORMAT:
        raise ValueError(f"'format' is not '{FORMAT}'")
    rest = {k: v for k, v in found.items() if k != "format"}
    prices = Prices(**{k: float(v) for k, v in found["prices"].items()})
    if min(vars(prices).values()) < 0:
        raise ValueError("a price is below 0")
    for name in ("beta", "budget"):
        rest[name] = float(found[name])
        if not rest[name] > 0:
            raise ValueError(f"'{name}' is not above 0")
    tokens = found.get("max_new_tokens", 1)
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError("'max_new_tokens' is not a whole number above 0")
    rest |= {
        "labels": _labels(found["labels"]), "prices": prices, "folder": folder,
        "pairs": _rows(found["pairs"], "pairs", folder),
        "held_out": _rows(found["held_out"], "prompts", folder),
    }  # fmt: skip
    problem = TextProblem(**rest)
    _check_model(problem)
    problem.true_reward()
    if problem.labels.source == "rm_other":
        problem.other_reward()
    return problem


def _labels(given: Mapping[str, Any]) -> TextLabels:
    if given["source"] not in get_args(LabelSource):
        known = ", ".join(get_args(LabelSource))
        raise ValueError(f"labels.source '{given['source']}' is none of {known}")
    if given["source"] == "rm_other" and not given.get("reward"):
        raise ValueError("'labels.reward' is missing: rm_other needs a reward")
    return TextLabels(**given)


def _check_model(problem: TextProblem) -> None:
    if set(problem.reference) != {"model"}:
        raise ValueError("'reference' is not {\"model\": FOLDER}")
    folder = huggingface.resolve_model(problem.model)
    if not Path(folder).is_dir():
        raise ValueError(f"reference.model '{problem.reference['model']}' is no folder beside it")
    model_folder.check_folder(folder)


def _rows(given: Any, want: str, folder: Path) -> list[Row]:
    """Rows of a path or of the file itself: each must be of use."""
    name = "pairs" if want == "pairs" else "held_out"
    if not isinstance(given, (str, list)) or not given:
        raise ValueError(f"'{name}' is neither rows nor the path of a file of them")
    loaded = load_examples(str(folder / given) if isinstance(given, str) else given, want=want)
    if loaded.rejected:
        first = loaded.rejected[0]
        raise ValueError(f"'{name}': {first.where} cannot be used: {first.reason}")
    if want != "pairs" and len(loaded.examples) < LEAST:
        raise ValueError(f"'{name}' holds fewer than {LEAST} prompts")
    return [example.as_row() for example in loaded.examples]
