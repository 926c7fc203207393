"""From the pieces of `study_gpu.py` to a table: means and 95 % intervals over seeds.

Rates and strengths are chosen for a seed by the gain in true reward of the other seeds that all of
them have, so that the choice owes nothing to the numbers that it is shown with; where there is no
such seed they are chosen on itself, and said.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from study_parts import PROBLEMS

from preftune import methods
from preftune.figures import Figure, interval

FEW = 5
"""Seeds under which an interval by resampling them is too narrow."""
LEVELS = 8
"""Of reward, at which two frontiers are compared."""
LEAST_KL = 0.01
"""Nats; less counts as so much."""
Piece = Mapping[str, Any]


class Cell(NamedTuple):
    """Pieces that differ in their seed alone."""

    problem: str
    method: str
    rate: float
    beta: float | None
    weight: float | None

    @classmethod
    def of(cls, piece: Piece) -> "Cell":
        """The one that a piece is of."""
        return cls(*(piece[name] for name in cls._fields))

    @property
    def knobs(self) -> dict[str, float]:
        """Its learning rate, and what else was set."""
        named = {"rate": self.rate, "beta": self.beta, "weight": self.weight}
        return {k: v for k, v in named.items() if v is not None}


def read(folder: Path, study: Mapping[str, Any]) -> tuple[list[Piece], list[str]]:
    """The finished pieces of a study, and what is to be said of them."""
    found, notes = [], []
    for path in sorted((folder / "pieces").glob("*.json")):
        piece = json.loads(path.read_text(encoding="utf-8"))
        if piece["study"] == study:
            found.append(piece)
        else:
            notes.append(f"{path.name} was made with other settings and is left out")
    for seed in sorted({p["seed"] for p in found}):
        grounds = [p["ground"] for p in found if p["seed"] == seed]
        bases = {ground["reference"] for ground in grounds}
        if len(bases) > 1:
            notes.append(
                f"pieces of seed {seed} stand on {len(bases)} references, trained anew from the "
                "same seed: differences of methods within it are not paired"
            )
        if any("prompts" not in ground for ground in grounds):
            notes.append(
                f"pieces of seed {seed} are of a time when prompts came several times: some of "
                "those held out were trained on, too. Begin another folder"
            )
    return found, notes


def over_seeds(values: Sequence[float]) -> Figure:
    """Mean of one number a seed, and its 95 % bootstrap interval over them."""
    return interval(torch.tensor(values, dtype=torch.float64)[:, None])


def last(piece: Piece, name: str) -> float:
    """A figure of a piece's last checkpoint."""
    return piece["curve"][-1].get(name, math.nan)


def gain(piece: Piece, name: str) -> float:
    """The same less what it was before training."""
    return last(piece, name) - piece["curve"][0][name]


def cells(pieces: Iterable[Piece]) -> dict[Cell, list[Piece]]:
    """Pieces by cell, in the order of the problems and of the table of methods; each cell's by
    seed."""
    names = list(methods.table())

    def place(piece: Piece) -> tuple[Any, ...]:
        own = Cell.of(piece)
        knobs = (own.rate, own.beta or 0.0, own.weight or 0.0)
        return PROBLEMS.index(own.problem), names.index(own.method), knobs

    found: dict[Cell, list[Piece]] = {}
    for piece in sorted(pieces, key=place):
        found.setdefault(Cell.of(piece), []).append(piece)
    return {cell: sorted(own, key=lambda p: p["seed"]) for cell, own in found.items()}


def judges(pieces: Sequence[Piece], seed: int) -> list[int]:
    """The seeds that one's settings are chosen by: the others that all of its cells have, since
    seeds are harder and easier; itself where there is none."""
    each = [{p["seed"] for p in own} for own in cells(pieces).values()]
    return sorted(set.intersection(*(own for own in each if seed in own)) - {seed}) or [seed]


def chosen(pieces: Sequence[Piece]) -> dict[int, Piece]:
    """Of one problem and method, the piece of each seed in the cell that gains most on its judges.

    A cell that diverged on one of the other seeds is taken only where all did.
    """
    by_cell = cells(pieces)

    def worth(cell: Cell, seed: int, by: Sequence[int]) -> tuple[bool, float]:
        others = [p for p in by_cell[cell] if p["seed"] != seed] or by_cell[cell]
        gains = [gain(p, "gold") for p in by_cell[cell] if p["seed"] in by]
        return not any(p["diverged"] for p in others), sum(gains) / len(gains)

    out = {}
    for seed in sorted({p["seed"] for p in pieces}):
        able = {c: p for c, own in by_cell.items() for p in own if p["seed"] == seed}
        by = judges(pieces, seed)
        out[seed] = able[max(able, key=lambda c: worth(c, seed, by))]
    return out


# --- frontiers ------------------------------------------------------------------------------------


def least_kl(points: Sequence[tuple[float, float]], level: float) -> float:
    """Of points (KL, reward), the least KL that reaches a level of reward."""
    return min((kl for kl, reward in points if reward >= level), default=math.inf)


def log_kl_ratio(
    mine: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], start: float
) -> float | None:
    """Mean over levels of reward, from `start` to what both reach, of log(KL of mine / of other).

    Returns:
        None where one of them reaches nothing above the start.
    """
    top = min(max(reward for _, reward in points) for points in (mine, other))
    if top <= start:
        return None
    ratios = []
    for i in range(1, LEVELS + 1):
        level = start + (top - start) * i / LEVELS if i < LEVELS else top
        a, b = (max(LEAST_KL, least_kl(points, level)) for points in (mine, other))
        ratios.append(math.log(a / b))
    return sum(ratios) / len(ratios)


def points_of(pieces: Iterable[Piece]) -> list[tuple[float, float]]:
    """KL and true reward of every checkpoint but the first."""
    return [(c["kl"], c["gold"]) for p in pieces for c in p["curve"] if c["step"]]


def frontier(pieces: Sequence[Piece], problem: str) -> tuple[Figure | None, list[int]]:
    """HyPO's KL against DPO's at equal true reward, over all of their rates, strengths and
    checkpoints: mean over seeds of `log_kl_ratio`.

    Returns:
        The figure, and the seeds that are not in it: a side is missing or nowhere above the start.
    """
    of = [p for p in pieces if p["problem"] == problem and p["method"] in ("hypo", "dpo")]
    ratios, dropped = [], list[int]()
    for seed in sorted({p["seed"] for p in of}):
        sides = [[p for p in of if (p["method"], p["seed"]) == (m, seed)] for m in ("hypo", "dpo")]
        points = [points_of(side) for side in sides]
        found = None
        if all(points):
            found = log_kl_ratio(points[0], points[1], sides[0][0]["curve"][0]["gold"])
        if found is None:
            dropped.append(seed)
        else:
            ratios.append(found)
    return over_seeds(ratios) if ratios else None, dropped


# --- what is shown --------------------------------------------------------------------------------

_SHOWN = {
    "gold": lambda p: last(p, "gold"), "gold gain": lambda p: gain(p, "gold"),
    "proxy gain": lambda p: gain(p, "proxy"), "KL": lambda p: last(p, "kl"),
    "length": lambda p: last(p, "length"),
    "log-ratio chosen": lambda p: last(p, "log_ratio_chosen"),
    "log-ratio rejected": lambda p: last(p, "log_ratio_rejected"),
}  # fmt: skip
"""Columns of figures with intervals."""
_PLAIN = {
    "samples judged": lambda p: last(p, "reward_queries"), "s": lambda p: p["seconds"]["total"],
    "tokens/s": lambda p: p["tokens_per_second"].get("train", math.nan),
    "GiB": lambda p: p["peak_gib"],
}  # fmt: skip
"""Columns of means."""


def summary(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """A row a cell."""
    return [
        {
            "problem": cell.problem, "method": cell.method, **cell.knobs,
            "seeds": [p["seed"] for p in own],
            "diverged": sum(bool(p["diverged"]) for p in own),
            **{name: over_seeds([f(p) for p in own]) for name, f in _SHOWN.items()},
            **{name: sum(f(p) for p in own) / len(own) for name, f in _PLAIN.items()},
        }
        for cell, own in cells(pieces).items()
    ]  # fmt: skip


def method_line(pieces: Sequence[Piece], method: str, known: str) -> dict[str, Any]:
    """What a method comes to on each problem at its chosen settings, and against DPO there."""
    line: dict[str, Any] = {"name": method, "problems": {}, "hardware": known}
    seeds: set[int] = set()
    for problem in PROBLEMS:
        own = [p for p in pieces if (p["problem"], p["method"]) == (problem, method)]
        if not own:
            continue
        best = chosen(own)
        seeds |= set(best)
        found: dict[str, Any] = {
            "settings": {str(s): Cell.of(p).knobs for s, p in best.items()},
            "gold_gain": over_seeds([gain(p, "gold") for p in best.values()]),
            "kl": over_seeds([last(p, "kl") for p in best.values()]),
            "chosen_on_itself": [s for s in best if judges(own, s) == [s]],
        }
        rival = chosen([p for p in pieces if (p["problem"], p["method"]) == (problem, "dpo")])
        both = [s for s in best if s in rival]
        if both and method != "dpo":
            found["gold_less_dpo"] = over_seeds(
                [last(best[s], "gold") - last(rival[s], "gold") for s in both]
            )
        if method == "hypo":
            figure, dropped = frontier(pieces, problem)
            found |= {"frontier_log_kl_over_dpo": figure, "frontier_seeds_dropped": dropped}
        line["problems"][problem] = found
    return line | {"seeds": sorted(seeds), "few_seeds": len(seeds) < FEW}


def shown(value: Any) -> str:
    """A figure as text."""
    if isinstance(value, Mapping):
        ends = (value["low"], value["high"])
        if None in ends or math.isnan(value["value"]):
            return shown(value["value"])
        return f"{shown(value['value'])} [{shown(ends[0])}, {shown(ends[1])}]"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in columns; it is Markdown too."""
    heads = ["problem", "method", "settings", "seeds", *_SHOWN, *_PLAIN, "diverged"]
    lines = [heads]
    for row in rows:
        knobs = ", ".join(f"{k} {row[k]:g}" for k in ("rate", "beta", "weight") if k in row)
        given = {**row, "settings": knobs, "seeds": len(row["seeds"])}
        lines.append([shown(given[h]) for h in heads])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    out = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *out[1:]])


def notes_of(pieces: Sequence[Piece]) -> list[str]:
    """What a reader must know of the intervals and of the checks."""
    counts = {len(own) for own in cells(pieces).values()}
    notes = []
    if counts and min(counts) < FEW:
        notes.append(
            f"few seeds ({min(counts)} of some cells): resampling so few gives intervals that are "
            "too narrow; of one seed there is none. Where no other seed has all settings of a "
            "method, they are chosen on the seed itself (chosen_on_itself)"
        )
    for problem in PROBLEMS:
        _, dropped = frontier(pieces, problem)
        if dropped and any((p["problem"], p["method"]) == (problem, "hypo") for p in pieces):
            notes.append(
                f"{problem}: the frontier of HyPO against DPO is without {len(dropped)} seeds "
                f"({', '.join(map(str, dropped))}), where one of them is missing or never above "
                "its start"
            )
    failed = {(c["name"], p["hardware"]) for p in pieces for c in p["checks"] if not c["holds"]}
    return notes + [f"FAILED check: {name} ({where})" for name, where in sorted(failed)]


def report(folder: Path, study: Mapping[str, Any]) -> tuple[str, bool]:
    """Everything as text, also written to `results.json`; and whether all checks of its pieces
    held."""
    pieces, notes = read(folder, study)
    notes += notes_of(pieces)
    rows = summary(pieces)
    known = "; ".join(sorted({p["hardware"] for p in pieces}))
    ran = {p["method"] for p in pieces}
    lines = [method_line(pieces, m, known) for m in methods.table() if m in ran]
    data = {"study": dict(study), "notes": notes, "rows": rows, "methods": lines}
    (folder / "results.json").write_text(json.dumps(strict(data), indent=1) + "\n")
    made = [json.dumps(strict(line)) for line in lines]
    text = "\n".join([known, *notes, "", as_text(rows), "", *made])
    return text, not any(n.startswith("FAILED") for n in notes)


def strict(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
