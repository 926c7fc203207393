"""Coverage (arXiv 2406.01462) of trained networks: offline, hybrid and online, on `words`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preftune import objectives as o
from preftune.cells import Cell
from preftune.method import Method
from preftune.problems import words
from preftune.problems.words import Words
from preftune.reproduce import charts, rows
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.reproduce.solvers import slope
from preftune.study import Curves
from preftune.theory.closed_form import tilted
from preftune.theory.linear_reward import fit_linear_reward

Runs = Mapping[str, Curves]
CHI_CLIP = 4.0
"""chi-PO's limit of its implicit reward's difference: twice the largest difference of rewards."""


def _cell(s: Mapping[str, Any], method: Method, problem: Words, points: int = 10) -> Cell:
    return Cell(
        problem=replace(problem, beta=s["beta"]), method=method, updates=s["updates"],
        batch_size=s["batch_size"], learning_rate=s["learning_rate"],
        eval_every=s["updates"] // points,
    )  # fmt: skip


def _plan_c4(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    return {
        f"{n} pairs": (
            _cell(s, rows.given_pairs(s["beta"]), Words(data=s["data"], pairs=n)), seeds
        )
        for n in s["sizes"]
    }  # fmt: skip


@experiment("c4-global-needed", plan=_plan_c4)
def c4(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """DPO's suboptimality at the end against the number of pairs."""
    sizes = claim.settings["sizes"]
    ends = torch.stack([runs[f"{n} pairs"].last("suboptimality") for n in sizes], -1)
    best = torch.stack([runs[f"{n} pairs"].figures["suboptimality"].amin(-1) for n in sizes], -1)
    rare = [float(runs[f"{n} pairs"].last("mass_rare").mean()) for n in sizes]
    series = {"DPO, end of training": (sizes, ends), "DPO, best checkpoint": (sizes, best)}
    notes = [
        f"Mass on responses with the token that no pair contains, at the end: {rare[0]:.3f} with "
        f"{sizes[0]} pairs, {rare[-1]:.3f} with {sizes[-1]} (reference: .002).",
        f"Slope of the best checkpoint: {float(slope(sizes, best).mean()):.2f}.",
    ]
    return _by_size(claim, seeds, series, slope(sizes, ends), notes)


def _by_size(
    claim: Claim, seeds: Sequence[int], series: Mapping[str, tuple[Sequence[float], Tensor]],
    values: Tensor, notes: Sequence[str],
) -> Measured:  # fmt: skip
    title = "Words, pairs without the rare token: suboptimality against the number of pairs"
    return Measured(
        values={"": values}, rows=charts.table("pairs", "suboptimality", seeds, series),
        figure=charts.lines(
            title, "pairs", "J* - J, nats of reward", series, log_x=True, log_y=True
        ),
        notes=notes,
    )  # fmt: skip


@experiment("c5-local-suffices-online")
def c5(claim: Claim, seeds: Sequence[int], _: Runs) -> Measured:
    """RLHF: a reward by maximum likelihood on the pairs, and the exact optimum for it."""
    s = claim.settings
    every = tuple(seeds)
    ref = words.reference_log_probs(every)
    reward = words.true_reward(every)
    law = words.pair_law(s["data"], ref, reward, 1.0)
    found = []
    for n in s["sizes"]:
        prompt, both = words.draw_pairs(law, reward, n, every)
        parts = []
        for i in range(len(every)):  # counts of all seeds at once would be large
            one = slice(i, i + 1)
            wins = words.counts(prompt[one], both[one])
            learned = fit_linear_reward(words.features(), wins, s["ridge"])
            policy = tilted(ref[one], learned, s["beta"])
            parts.append(words.worth(policy, ref[one], reward[one], s["beta"])["suboptimality"])
        found.append(torch.cat(parts))
    ends = torch.stack(found, -1)
    series = {"RLHF": (s["sizes"], ends)}
    return _by_size(claim, seeds, series, slope(s["sizes"], ends), [])


def _hypo(s: Mapping[str, Any], beta: float, weight: float) -> Method:
    return rows.hypo(beta, weight, s["samples_per_prompt"])


def _plan_c6(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    problem = Words(data=s["data"], pairs=s["pairs"])
    return {
        "DPO": (_cell(s, rows.given_pairs(s["beta"]), problem), seeds),
        "HyPO": (_cell(s, _hypo(s, s["beta"], s["weight"]), problem), seeds),
    }


@experiment("c6-hypo-local", plan=_plan_c6)
def c6(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """HyPO less DPO at the end."""
    gap = runs["HyPO"].last("value") - runs["DPO"].last("value")
    return _values(claim, seeds, runs, gap)


def _values(
    claim: Claim, seeds: Sequence[int], runs: Runs, values: Tensor, notes: Sequence[str] = ()
) -> Measured:
    """Regularised value against updates."""
    series = {name: (c.steps, c.figures["value"]) for name, c in runs.items()}
    title = "Words: regularised value E r - beta KL during training"
    return Measured(
        values={"": values}, rows=charts.table("update", "value", seeds, series), notes=notes,
        figure=charts.lines(title, "updates", "E r - beta KL", series),
    )  # fmt: skip


def _plan_c8(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    problem = Words(data=s["data"], pairs=s["pairs"])
    methods = {f"DPO, beta {b}": rows.given_pairs(b) for b in s["betas"]}
    methods |= {f"HyPO, weight {w}": _hypo(s, s["beta"], w) for w in s["weights"]}
    methods["chi-PO"] = rows.given_pairs(s["beta"], o.chi_po, clip=CHI_CLIP)
    cells = {name: _cell(s, m, problem) for name, m in methods.items()}
    found: dict[str, tuple[Cell, Sequence[int]]] = {n: (c, seeds) for n, c in cells.items()}
    last = claim.parts[-1]  # what is lost after the best checkpoint varies more between seeds
    more = range(seeds[0], seeds[0] + (last.seeds or len(seeds)))
    for name in (f"DPO, beta {s['beta']}", f"HyPO, weight {s['weights'][1]}"):
        found[f"more seeds: {name}"] = (cells[name], more)
    return found


def _least_kl(cells: Sequence[Curves], level: Tensor) -> Tensor:
    """Least KL of any checkpoint of the cells that has the reward, [S] each; infinite if none."""
    reward = torch.cat([c.figures["reward"][:, 1:] for c in cells], -1)
    kl = torch.cat([c.figures["reverse_kl"][:, 1:] for c in cells], -1)
    return kl.masked_fill(reward < level[:, None], torch.inf).amin(-1)


LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the way from the start to the lower of the two families' highest rewards: both get there."""


@experiment("c8-hypo-kl", plan=_plan_c8)
def c8(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """KL at the end, KL at equal reward, and what is lost after the best checkpoint."""
    s = claim.settings
    names = (f"DPO, beta {s['beta']}", f"HyPO, weight {s['weights'][1]}")
    more_dpo, more_hypo = (runs[f"more seeds: {n}"] for n in names)
    runs = {n: c for n, c in runs.items() if not n.startswith("more")}
    dpo, hypo = (runs[n] for n in names)
    families = [[c for n, c in runs.items() if n.startswith(f)] for f in ("DPO", "HyPO")]
    highest = torch.stack(
        [torch.cat([c.figures["reward"][:, 1:] for c in f], -1).amax(-1) for f in families]
    ).amin(0)
    way = (highest - dpo.at("reward", 0)).abs()
    least = [[_least_kl(f, highest - (1 - x) * way).log() for f in families] for x in LEVELS]
    ratios = [own_hypo - own_dpo for own_dpo, own_hypo in least]

    def lost(c: Curves) -> Tensor:
        return c.figures["value"].amax(-1) - c.last("value")

    series = {n: (c.steps, c.figures["reverse_kl"]) for n, c in runs.items()}
    table = charts.table("update", "reverse_kl", seeds, series)
    for row, reward in zip(
        table, charts.table("update", "reward", seeds,
                            {n: (c.steps, c.figures["reward"]) for n, c in runs.items()}),
        strict=True,
    ):  # fmt: skip
        row["reward"] = reward["reward"]
    return Measured(
        values={
            "end": (hypo.last("reverse_kl") / dpo.last("reverse_kl")).log(),
            "frontier": torch.stack(ratios).mean(0),
            "best-minus-last": lost(more_dpo) - lost(more_hypo),
        },
        rows=table, figure=_frontier(runs), notes=[_early(s, runs)],
    )  # fmt: skip


def _early(s: Mapping[str, Any], runs: Runs) -> str:
    """DPO stopped at its best checkpoint, and chi-PO, beside HyPO."""
    dpo, hypo = runs[f"DPO, beta {s['beta']}"], runs[f"HyPO, weight {s['weights'][1]}"]
    value = {
        "DPO at its best checkpoint": dpo.figures["value"].mean(0).amax(),
        "DPO at the end": dpo.last("value").mean(),
        "HyPO at its best checkpoint": hypo.figures["value"].mean(0).amax(),
        "HyPO at the end": hypo.last("value").mean(),
        "chi-PO at the end": runs["chi-PO"].last("value").mean(),
    }
    return "Regularised value: " + "; ".join(f"{k} {float(v):.3f}" for k, v in value.items()) + "."


def _frontier(runs: Runs) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, c in runs.items():
        kl, reward = (c.figures[k].mean(0).tolist() for k in ("reverse_kl", "reward"))
        dash = "solid" if name.startswith("HyPO") else "dot" if name == "chi-PO" else "dash"
        figure.add_scatter(x=kl, y=reward, name=name, mode="lines+markers", line={"dash": dash})
    title = "Words: true reward against KL, every checkpoint (means over seeds)"
    return charts.styled(figure, title, "KL(policy || reference), nats", "expected true reward")


def _plan_c12(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    found: dict[str, Cell] = {}
    for data in [*s["data"], *(["uniform", "covered"] if full else [])]:
        problem = Words(data=data, pairs=s["pairs"], temperature=s["temperature"])
        found[f"offline DPO, {data} data"] = _cell(s, rows.given_pairs(s["beta"]), problem)
    problem = Words(pairs=s["pairs"])
    found["on-policy DPO"] = _cell(s, rows.fresh_pairs(s["beta"]), problem)
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("c12-diversity-gap", plan=_plan_c12)
def c12(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Gap to online DPO (which sees no data) on narrow data less on the reference's."""
    narrow, broad = (runs[f"offline DPO, {d} data"].last("value") for d in claim.settings["data"])
    return _values(claim, seeds, runs, broad - narrow)


def _plan_d1(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    online = _cell(s, rows.fresh_pairs(s["beta"]), Words(data=s["data"]))
    replay = replace(_cell(s, rows.given_pairs(s["beta"]), Words(data=s["data"])), after=online)
    return {"on-policy DPO": (online, seeds), "offline DPO on its pairs": (replay, seeds)}


@experiment("d1-replay", plan=_plan_d1)
def d1(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """On-policy less the replay of its own pairs."""
    gap = runs["on-policy DPO"].last("value") - runs["offline DPO on its pairs"].last("value")
    notes = ["The replay sees every pair of the on-policy run once, in a shuffled order."]
    return _values(claim, seeds, runs, gap, notes)


def _plan_d4(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    true = Words(data=s["data"], pairs=s["pairs"])
    learned = replace(true, labels="rm_same", ridge=s["ridge"])
    found = {
        "offline DPO": _cell(s, rows.given_pairs(s["beta"]), true),
        "on-policy DPO, true labels": _cell(s, rows.fresh_pairs(s["beta"]), true),
        "on-policy DPO, learned labels": _cell(s, rows.fresh_pairs(s["beta"]), learned),
        "half and half, true labels": _cell(s, rows.half_and_half(s["beta"]), true),
        "half and half, learned labels": _cell(s, rows.half_and_half(s["beta"]), learned),
    }
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("d4-label-source", plan=_plan_d4)
def d4(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """On-policy DPO by who labels its samples."""
    ends = {name: c.last("value") for name, c in runs.items()}
    gap = ends["on-policy DPO, true labels"] - ends["on-policy DPO, learned labels"]
    gains = [f"{n}: {float((v - ends['offline DPO']).mean()):+.3f}" for n, v in ends.items()]
    return _values(claim, seeds, runs, gap, ["Gain over offline DPO: " + "; ".join(gains[1:])])


def _plan_c11(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    from preftune.problems.unseen import Unseen

    s = claim.settings
    found = {}
    for name, strength in (("uniform", 0.0), ("anti-aligned", s["anti"])):
        problem = Unseen(
            arms=s["arms"], seen=s["seen"], reward_range=s["reward_range"], pairs=s["pairs"],
            anti=strength,
        )  # fmt: skip
        found[name] = Cell(
            problem=problem, method=rows.given_pairs(s["beta"]), updates=s["updates"],
            batch_size=64, learning_rate=s["learning_rate"], eval_every=s["updates"] // 25,
        )  # fmt: skip
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("c11-fig3", plan=_plan_c11)
def c11(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Mass of arms that no pair contains, from two references."""
    unseen = {name: c.figures["mass_unseen"] for name, c in runs.items()}
    first, anti = unseen["uniform"], unseen["anti-aligned"]
    series = {f"{n} reference": (runs[n].steps, x) for n, x in unseen.items()}
    title = "Tabular DPO: probability of the arms that no pair contains"
    return Measured(
        values={
            "uniform": first[:, -1] - first[:, 0],
            "anti-aligned": anti.amax(-1) - anti[:, 0],
        },
        rows=charts.table("update", "mass_unseen", seeds, series),
        figure=charts.lines(title, "updates", "mass of unseen arms", series),
        notes=[
            "A pair moves two logits by as much, up and down, and leaves the others: from a "
            "uniform reference the sum over seen arms can only grow. Unseen arms rise where the "
            "policy ranks the rejected above the chosen, to first order."
        ],
    )  # fmt: skip
