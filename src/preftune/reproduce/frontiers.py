"""Reward against KL: two families of runs, each at its frontier, over settings and checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.reproduce import charts
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.reproduce.language import GRID, cell, notes
from preftune.study import Curves

Runs = Mapping[str, Curves]
PLACES = 20
"""On the axis that two frontiers are compared along."""
STARTS = 0.05
"""Nats: at less, neither has left the reference."""


def _plan(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    return {
        _named(name, rate): (cell(s, {**own, "learning_rate": rate}), seeds)
        for name, own in s["runs"].items()
        for rate in _rates(s["rates"], full)
    }


def _rates(listed: Sequence[float], full: bool) -> list[float]:
    """Those that the verdict is of and, with `full`, their multiples; a multiple that has the name
    of a listed rate (1e-4 * 3.0, of 3e-4) is that rate, which decides."""
    more = [rate * times for rate in listed for times in GRID] if full else []
    return sorted({_named("", rate): rate for rate in [*more, *listed]}.values())


def _named(run: str, rate: float) -> str:
    return f"{run}, rate {rate:g}"


@experiment("frontier", plan=_plan)
def frontier(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Frontier against frontier, the ends of one budget, and what training on costs."""
    s = claim.settings
    first, second = (_points(s["sides"][side], s["rates"], runs) for side in ("hypo", "dpo"))
    mine, other = (_better(name, s["rates"], runs) for name in s["pair"])
    if s["of"] == "reward":
        values = {
            "frontier": reward_at_equal_kl(*first, *second),
            "end": mine.last("gold") - other.last("gold"),
            "best minus last": _lost(other) - _lost(mine),
        }
    else:
        values = {
            "frontier": kl_at_equal_reward(*second, *first),
            "end": other.last("kl") - mine.last("kl"),
        }
    shown = {name: (c.steps, c.figures["gold"]) for name, c in runs.items()}
    return Measured(
        values={k: values[k] for k in (p.name for p in claim.parts)},
        rows=charts.table("update", "gold", seeds, shown), figure=_figure(claim, runs),
        notes=notes(runs),
    )  # fmt: skip


def _points(names: Sequence[str], rates: Sequence[float], runs: Runs) -> tuple[Tensor, Tensor]:
    """KL and true reward of every checkpoint of these runs, [S, P] each."""
    found = [runs[_named(name, rate)].figures for name in names for rate in rates]
    return torch.cat([f["kl"] for f in found], -1), torch.cat([f["gold"] for f in found], -1)


def _better(name: str, rates: Sequence[float], runs: Runs) -> Curves:
    """The run at the rate whose mean true reward at the end is the higher."""
    each = [runs[_named(name, rate)] for rate in rates]
    return max(each, key=lambda c: float(c.last("gold").mean()))


def _lost(run: Curves) -> Tensor:
    """The best checkpoint's true reward less the last one's, [S]."""
    return run.figures["gold"].amax(-1) - run.last("gold")


def reward_at_equal_kl(
    kl: Float[Tensor, "S P"], reward: Float[Tensor, "S P"],
    other_kl: Float[Tensor, "S Q"], other_reward: Float[Tensor, "S Q"],
) -> Float[Tensor, " S"]:  # fmt: skip
    """What the best checkpoint within a KL has more of, mean over KLs that both families reach."""
    end = torch.minimum(kl.amax(-1), other_kl.amax(-1)).clamp_min(STARTS)
    places = _between(torch.full_like(end, STARTS), end)

    def best(k: Tensor, r: Tensor) -> Tensor:
        within = k[:, None, :] <= places[:, :, None]
        return torch.where(within, r[:, None, :], -torch.inf).amax(-1)

    return (best(kl, reward) - best(other_kl, other_reward)).mean(-1)


def kl_at_equal_reward(
    kl: Float[Tensor, "S P"], reward: Float[Tensor, "S P"],
    other_kl: Float[Tensor, "S Q"], other_reward: Float[Tensor, "S Q"],
) -> Float[Tensor, " S"]:  # fmt: skip
    """How much more KL the first family's nearest checkpoint with a reward has, mean over rewards
    from the reference's (at KL 0) to the highest that both families reach."""
    start = torch.where(kl <= 0, reward, torch.inf).amin(-1)
    end = torch.maximum(torch.minimum(reward.amax(-1), other_reward.amax(-1)), start)
    places = _between(start, end)

    def least(k: Tensor, r: Tensor) -> Tensor:
        reached = r[:, None, :] >= places[:, :, None]
        return torch.where(reached, k[:, None, :], torch.inf).amin(-1)

    return (least(kl, reward) - least(other_kl, other_reward)).mean(-1)


def _between(start: Float[Tensor, " S"], end: Float[Tensor, " S"]) -> Float[Tensor, "S N"]:
    """Places from `start` to `end`, whose ends are these very numbers: a checkpoint lies on them,
    and a rounding beyond it would find none."""
    places = start[:, None] + (end - start)[:, None] * torch.linspace(0, 1, PLACES).double()
    places[:, 0], places[:, -1] = start, end
    return places


def _figure(claim: Claim, runs: Runs) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    sides = list(claim.settings["sides"].items())
    for name, c in runs.items():
        kl, reward = (c.figures[k].mean(0).tolist() for k in ("kl", "gold"))
        place = next((i for i, (_, own) in enumerate(sides) if name.rpartition(",")[0] in own), 2)
        figure.add_scatter(
            x=kl, y=reward, name=name, mode="lines+markers",
            line={"color": charts.PALETTE[place], "dash": ("dash", "solid", "dot")[place]},
            marker={"size": 4},
        )  # fmt: skip
    title = "True reward against KL, every checkpoint (means over seeds)"
    return charts.styled(figure, title, "KL(policy || reference), nats", "true reward")
