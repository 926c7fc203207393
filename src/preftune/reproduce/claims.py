"""Claims as `claims.yaml` fixes them before they are run, and how numbers become verdicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.errors import UserError, nearest
from preftune.figures import interval
from preftune.study import Curves, Runnable

Direction = Literal["greater", "less", "within"]
Verdict = Literal["holds", "does_not_hold", "not_seen"]
SEEDS = 32
"""Of a claim that does not say how many."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A statement that can hold or fail, with the number that decides it."""

    name: str
    """"" where a claim is one number."""
    claim: str
    statistic: str
    direction: Direction
    margin: float
    seeds: int | None = None
    """Where it needs more than the claim's: so many."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One id of `claims.yaml`."""

    id: str
    source: str
    settings: Mapping[str, Any]
    parts: tuple[Part, ...]
    claim: str
    seeds: int = SEEDS
    scale: str = "bandit"
    label_source: str = "true"
    group: str = "bandits"
    by: str = ""
    """The experiment that measures it; "" is one of its own, by its id."""
    size: str = ""
    """"" is the size of the model that the claim is made for; else a second one's name."""

    @property
    def key(self) -> str:
        """The id and, where it is not a bandit's, scale and size: one id may stand at several."""
        return key_of({"id": self.id, "scale": self.scale, "size": self.size})


def key_of(row: Mapping[str, Any]) -> str:
    """`Claim.key` of a row of results."""
    scale = "" if row["scale"] == "bandit" else row["scale"]
    return "-".join(filter(None, (row["id"], scale, row["size"])))


@dataclass(kw_only=True)
class Measured:
    """What a claim's runs gave."""

    values: Mapping[str, Tensor]
    """Of each part, the statistic of each seed, [S] float64; one number where no seed enters."""
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """The data behind it and behind the figure, a dict a row."""
    figure: Any = None
    """A plotly figure, or None."""
    notes: Sequence[str] = ()
    """What a reader must know beside the number."""


@dataclass(frozen=True)
class Judged:
    """A claim's verdicts."""

    claim: Claim
    rows: list[dict[str, Any]]
    measured: Measured | None
    """None: it failed."""
    failed: str = ""
    """Why."""


Cells = Mapping[str, tuple[Runnable, Sequence[int]]]
"""By name: what must be run for a claim, and with which seeds."""
Plan = Callable[[Claim, Sequence[int], bool], Cells]
"""(claim, seeds, full) -> cells; `full` adds the rest of the claim's grid."""
Conclude = Callable[[Claim, Sequence[int], Mapping[str, Curves]], Measured]
"""(claim, seeds, what the cells gave) -> what was measured."""


@dataclass(frozen=True)
class Experiment:
    """How a claim is measured."""

    conclude: Conclude
    plan: Plan | None = None
    """None: exact, nothing is trained by the loop."""


FILES = {
    "claims.yaml": {},
    "language.yaml": {"group": "language", "scale": "synthetic", "label_source": "rm_same"},
    "model.yaml": {"group": "model", "scale": "model", "label_source": "rm_same"},
}  # fmt: skip
"""Of claims, and what all of a file have in common."""
BY_NAME = {"model", "larger"}
"""Groups that are run only where they are named: they take hours."""
LARGER = {"width": 128}
"""What language claims have at their second size (group `larger`), those apart whose runs have
widths of their own."""


def load() -> dict[str, Claim]:
    """Every claim by its key, in the order of the files."""
    import yaml

    found: dict[str, Claim] = {}
    for name, common in FILES.items():
        text = resources.files("preftune.reproduce").joinpath(name).read_text("utf-8")
        for one, entry in yaml.safe_load(text).items():
            claim = _claim(one, common | entry)
            both = [claim, *_at_second_size(claim)]
            found |= {c.key: c for c in both}
    return found


def _at_second_size(claim: Claim) -> list[Claim]:
    """The same of a larger model, at the same settings."""
    widths = any("width" in own for own in claim.settings.get("runs", {}).values())
    if claim.group != "language" or widths:
        return []
    size = ", ".join(f"{k} {v}" for k, v in LARGER.items())
    parts = tuple(replace(p, statistic=f"{p.statistic}; {size}") for p in claim.parts)
    name, settings = size.replace(" ", "-"), {**claim.settings, **LARGER}
    return [replace(claim, group="larger", size=name, settings=settings, parts=parts)]


def _claim(name: str, entry: dict[str, Any]) -> Claim:
    keys = ("statistic", "direction", "margin")
    listed = entry.pop("parts", None) or {"": {k: entry.pop(k) for k in keys}}
    parts = tuple(
        Part(name=part, **({"claim": entry["claim"]} | fields)) for part, fields in listed.items()
    )
    return Claim(id=name, parts=parts, **entry)


def choose(ids: Sequence[str], full: bool = False) -> list[Claim]:
    """The claims of these ids (at every scale), keys or groups; all if none is given.

    Args:
        full: each also at its second size.

    Raises:
        UserError: an id that is neither.
    """
    known = load()
    names = {n for c in known.values() for n in (c.id, c.key, c.group)}
    for name in ids:
        if name not in names:
            raise UserError(
                f"claim '{name}' is unknown.{nearest(name, names)} See preftune reproduce --list."
            )
    found = [c for c in known.values() if not ids or {c.id, c.key, c.group} & set(ids)]
    # an id that also stands elsewhere does not mean what takes hours
    quick = {c.id for c in found if c.group not in BY_NAME}
    found = [c for c in found if _meant(c, ids) or (ids and c.id not in quick)]
    chosen = {(c.id, c.scale) for c in found}
    more = [c for c in known.values() if full and c.size and (c.id, c.scale) in chosen]
    return found + [c for c in more if c not in found]


def _meant(claim: Claim, ids: Sequence[str]) -> bool:
    return claim.group not in BY_NAME or bool({claim.key, claim.group} & set(ids))


def judge(part: Part, low: float, high: float) -> Verdict:
    """`holds` where the whole interval is beyond the margin, `does_not_hold` where all of it is
    short of it, `not_seen` between."""
    m = part.margin
    if part.direction == "within":
        inside, outside = -m < low and high < m, low > m or high < -m
    elif part.direction == "greater":
        inside, outside = low > m, high < m
    else:
        inside, outside = high < m, low > m
    return "holds" if inside else "does_not_hold" if outside else "not_seen"


def verdicts(claim: Claim, measured: Measured) -> list[dict[str, Any]]:
    """A row a part: claim, measured mean with its interval over seeds, margin, verdict."""
    rows = []
    for part in claim.parts:
        values = measured.values[part.name].double()
        assert torch.isfinite(values).all(), f"{claim.id}: a seed's statistic is not finite"
        exact = len(values) == 1  # no seed enters it
        found = interval(values[:, None])
        mean = values.mean().item()
        low, high = (
            mean if found[end] is None else float(found[end] or 0) for end in ("low", "high")
        )
        rows.append({
            **listed(claim, part), "measured": mean, "interval": [low, high],
            "seeds": 0 if exact else len(values), "verdict": judge(part, low, high),
        })  # fmt: skip
    return rows


def listed(claim: Claim, part: Part) -> dict[str, Any]:
    """A part that has not been run: the same row without numbers."""
    return {
        "id": claim.id, "part": part.name, "claim": part.claim, "statistic": part.statistic,
        "source": claim.source, "scale": claim.scale, "size": claim.size,
        "label_source": claim.label_source,
        "measured": None, "interval": None, "direction": part.direction, "margin": part.margin,
        "seeds": part.seeds or claim.seeds, "verdict": None, "settings": dict(claim.settings),
    }  # fmt: skip


EXPERIMENTS: dict[str, Experiment] = {}
"""By the id of the claim; filled by the modules of experiments as they are imported."""


def experiment(*ids: str, plan: Plan | None = None) -> Callable[[Conclude], Conclude]:
    """Register what measures the claims of these ids."""

    def add(function: Conclude) -> Conclude:
        assert not EXPERIMENTS.keys() & set(ids), f"{ids} are measured already"
        EXPERIMENTS.update(dict.fromkeys(ids, Experiment(function, plan)))
        return function

    return add
