"""Claims of coverage as fits: tables and linear classes to labelled pairs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune import objectives as o
from preftune.numerics import normal, stream_keys, uniform
from preftune.report.drawing import NEUTRAL
from preftune.reproduce.charts import BLUE, GREEN, RED, chart, curve, mean_line
from preftune.reproduce.claims import Claim, Measured, experiment
from preftune.reproduce.solvers import (
    Fit,
    count_pairs,
    descend,
    draw_pairs,
    newton,
    pair_law,
    restricted_optimum,
    slope,
)
from preftune.theory.closed_form import tilted
from preftune.theory.coverage import regularised_value


def _dpo(beta: float) -> Callable[[Tensor], Tensor]:
    """DPO's loss of the chosen log-ratio less the rejected, nats."""
    return lambda lead: o.dpo(lead, *[torch.zeros_like(lead)] * 3, beta=beta)


def _ipo(tau: float) -> Callable[[Tensor], Tensor]:
    return lambda lead: o.ipo(lead, *[torch.zeros_like(lead)] * 3, tau=tau)


def _reward(lead: Tensor) -> Tensor:
    """The loss of a reward model, of the lead of the chosen."""
    return o.bradley_terry(lead, torch.zeros_like(lead))


RIDGE = 1e-4
"""Of half the squared log-ratios, added to the sum of the losses over pairs."""


@experiment("c3-global-suffices")
def global_coverage(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Tabular fits to more and more pairs of a reference that covers every arm."""
    s = claim.settings
    arms, beta, sizes = s["arms"], float(s["beta"]), s["sizes"]
    keys, arm = stream_keys(seeds, claim.id, "problem")[:, None], torch.arange(arms)
    log_ref = normal(keys, arm, 0).log_softmax(-1)
    reward = s["reward_range"] * uniform(keys, arm, 1)
    law = pair_law(log_ref.exp(), reward)
    counts = count_pairs(stream_keys(seeds, claim.id, "pairs"), law, sizes)
    policies, gradient = _tabular_fits(log_ref[:, None], counts, beta)
    best = tilted(log_ref, reward, beta)
    top = regularised_value(best, log_ref, reward, beta)[:, None]
    lost = {
        name: top - regularised_value(log_p, log_ref[:, None], reward[:, None], beta)
        for name, log_p in policies.items()
    }
    slopes = {name: slope(sizes, x) for name, x in lost.items()}
    rows = [
        {"method": name, "seed": seed, "pairs": n, "suboptimality": float(x[i, k])}
        for name, x in lost.items() for i, seed in enumerate(seeds) for k, n in enumerate(sizes)
    ]  # fmt: skip
    apart = (policies["DPO"] - policies["RLHF"]).abs().max()
    later = float(slope(sizes[1:], lost["DPO"][:, 1:]).mean())
    notes = [
        f"From the second size on the slope of DPO is {later:.2f}: with the fewest pairs some "
        "arms never lose, and only the ridge holds them.",
        f"IPO does not get there: {float(lost['IPO'][:, -1].mean()):.3f} are left at the end, "
        f"slope {float(slopes['IPO'].mean()):.2f}. Its optimum on Bradley-Terry labels is another "
        f"policy. With the fewest pairs it loses {float(lost['IPO'][:, 0].mean()):.2f}, DPO "
        f"{float(lost['DPO'][:, 0].mean()):.2f}.",
        f"DPO and RLHF are one fit here (log-probs differ by {float(apart):.1g} at most).",
        "A ridge of 1e-4 on the log-ratios, on the sum over pairs, keeps arms that never lose or "
        f"are never drawn finite. Fits by Newton's method: gradient a pair {gradient:.1g} at most.",
        "Larger data sets contain the smaller; both arms of a pair are independent draws from the "
        "reference, so that some pairs are of one arm and say nothing.",
    ]
    return Measured(
        values={"": slopes["DPO"]}, rows=rows, figure=_loss_figure(sizes, lost), notes=notes
    )


def _tabular_fits(
    log_ref: Float[Tensor, "S 1 A"], counts: Int[Tensor, "S N A A"], beta: float
) -> tuple[dict[str, Tensor], float]:
    """Log-probs [S, N, A] of each method, and the largest gradient norm of their fits."""
    arms = counts.shape[-1]
    one = torch.eye(arms, dtype=log_ref.dtype)
    # Log-ratios that sum to zero: pairs do not see their mean, and the ridge sets it to zero.
    basis = torch.linalg.qr(torch.cat([torch.ones_like(one[:, :1]), one[:, 1:]], -1)).Q[:, 1:]
    design = (one[:, None] - one).flatten(0, 1) @ basis
    weight = counts.flatten(-2).to(log_ref)
    dpo = newton(_dpo(beta), design, weight, RIDGE)
    ipo = newton(_ipo(beta), design, weight, RIDGE)
    reward = newton(_reward, design, weight, RIDGE / beta**2)  # on the log-ratios r̂ / β
    policies = {
        "DPO": (log_ref + dpo.theta @ basis.mT).log_softmax(-1),
        "RLHF": tilted(log_ref, reward.theta @ basis.mT, beta),
        "IPO": (log_ref + ipo.theta @ basis.mT).log_softmax(-1),
    }
    return policies, max(fit.rest() for fit in (dpo, ipo, reward))


def _loss_figure(sizes: Sequence[int], lost: dict[str, Tensor]) -> Any:
    ring = {"marker": {"size": 12, "symbol": "circle-open"}}  # RLHF's line lies on DPO's
    lines = []
    for (name, values), colour in zip(lost.items(), (BLUE, RED, GREEN), strict=True):
        lines += mean_line(name, sizes, values, colour, **(ring if name == "DPO" else {}))
    middle = float(lost["DPO"].mean(0)[0])
    guide = [middle * sizes[0] / n for n in (sizes[0], sizes[-1])]
    lines.append(curve("in proportion to 1/N", [sizes[0], sizes[-1]], guide, NEUTRAL, "dot"))
    title = "Suboptimality over the number of pairs, from a reference that covers every response"
    y = "regularised value lost (reward)"
    return chart(title, "N, pairs", y, lines, log="xy")


@experiment("c10-fig2")
def extrapolation(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Figure 2: a log-linear policy raises the best response, which no pair contains."""
    s = claim.settings
    features, reward = _spanned_problem(claim, seeds)
    seen, beta = s["seen"], float(s["beta"])
    log_ref = torch.zeros_like(reward).log_softmax(-1)
    uniform_seen = torch.full_like(reward[:, :seen], 1 / seen)
    law = pair_law(uniform_seen, reward[:, :seen])
    pairs = draw_pairs(stream_keys(seeds, claim.id, "pairs"), law, 0, s["pairs"])
    counts = torch.stack([torch.bincount(p, minlength=seen**2) for p in pairs]).to(reward)
    fit = newton(_reward, _differences(features[:, :seen]), counts)
    estimate = (features @ fit.theta[..., None])[..., 0]
    chosen = counts.unflatten(-1, (seen, seen)).sum(-1) / s["pairs"]
    best = seen + reward[:, seen:].argmax(-1)

    def watch(log_p: Tensor) -> Tensor:
        """Mean log-prob of what was chosen and that of the best unseen arm, [S, 2]."""
        top = log_p.gather(-1, best[:, None])[:, 0]
        return torch.stack([(chosen * log_p[:, :seen]).sum(-1), top], -1)

    keys = stream_keys(seeds, claim.id, "batches")[:, None]

    def dpo_loss(log_p: Tensor, step: int) -> Tensor:
        index = (uniform(keys, step, torch.arange(64)) * s["pairs"]).long()
        taken = pairs.gather(-1, index)
        ratio = log_p - log_ref
        win, lose = ratio.gather(-1, taken // seen), ratio.gather(-1, taken % seen)
        zero = torch.zeros_like(win)
        return o.dpo(win, lose, zero, zero, beta=beta).mean(-1)

    def rlhf_loss(log_p: Tensor, step: int) -> Tensor:
        return -regularised_value(log_p, log_ref, estimate, beta)

    rate, steps = s["dpo_rate"], s["steps"]
    paths = {
        "DPO": descend(dpo_loss, features, watch, rate, steps),
        "RLHF": descend(rlhf_loss, features, watch, rate, steps),
    }
    optimum = watch(tilted(log_ref, estimate, beta))
    return _extrapolation_measured(seeds, paths, optimum, fit.rest())


def _spanned_problem(
    claim: Claim, seeds: Sequence[int]
) -> tuple[Float[Tensor, "S A D"], Float[Tensor, "S A"]]:
    """Features of l1 norm 1 (normals over their norm), the last arm's e_1, and true rewards."""
    keys, features = _features(claim, seeds)
    arms, dims = features.shape[1:]
    features = features / features.abs().sum(-1, keepdim=True)
    features[:, -1] = torch.eye(dims, dtype=features.dtype)[0]
    weights = 4 * uniform(keys, arms, torch.arange(dims)) - 2
    weights[:, 0] = 5.0
    return features, (features @ weights[..., None])[..., 0]


def _features(
    claim: Claim, seeds: Sequence[int]
) -> tuple[Int[Tensor, "S 1"], Float[Tensor, "S A D"]]:
    """Keys of the problem's draws, and standard normal features, draws 0 to A − 1."""
    keys = stream_keys(seeds, claim.id, "problem")[:, None]
    arm, feature = (torch.arange(claim.settings[k]) for k in ("arms", "features"))
    return keys, normal(keys[..., None], arm[:, None], feature)


def _differences(features: Float[Tensor, "S A D"]) -> Float[Tensor, "S P D"]:
    """Winner's features less loser's of every ordered pair."""
    return (features[:, :, None] - features[:, None]).flatten(1, 2)


def _extrapolation_measured(
    seeds: Sequence[int], paths: dict[str, Tensor], optimum: Tensor, gradient: float
) -> Measured:
    """Of what was watched along each method's path, [T, S, 2], and at RLHF's optimum, [S, 2]."""
    start = paths["DPO"][0]
    ends = {name: path[-1] for name, path in paths.items()} | {"RLHF optimum": optimum}
    change = {name: end - start for name, end in ends.items()}
    rows = [
        {
            "method": name, "seed": seed, "chosen": float(end[i, 0]), "best": float(end[i, 1]),
            "chosen_change": float(change[name][i, 0]), "best_change": float(change[name][i, 1]),
        }
        for name, end in ends.items() for i, seed in enumerate(seeds)
    ]  # fmt: skip
    lines = []
    for (name, path), dash in zip(paths.items(), ("solid", "dash"), strict=True):
        at = torch.arange(0, len(path), max(1, len(path) // 60))
        for k, (what, colour) in enumerate((("chosen (mean)", RED), ("best unseen", BLUE))):
            lines.append(curve(f"{name}, {what}", at, path[at, :, k].mean(-1), colour, dash))
    notes = [
        f"{name}: what was chosen falls by {-float(change[name][:, 0].mean()):.1f} nats in the "
        f"mean over seeds (it falls in {int((change[name][:, 0] < 0).sum())} of {len(start)})."
        for name in ends
    ]
    notes += [
        "RLHF is the reward by maximum likelihood and exact gradient ascent with DPO's rate. Its "
        "optimum is log-linear too, and further off: the ascent slows down as the policy becomes "
        "nearly deterministic.",
        "DPO's batches are 64 pairs drawn with replacement. The reward model's gradient a pair is "
        f"{gradient:.1g} at most.",
    ]
    title = "Log-probs during training of what was chosen and of the best response, in no pair"
    return Measured(
        values={"": torch.stack([change[name][:, 1] for name in paths]).amin(0)}, rows=rows,
        figure=chart(title, "gradient steps", "log-prob, mean over seeds (nats)", lines),
        notes=notes,
    )  # fmt: skip


@experiment("d2-isomorphic")
def isomorphic(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Log-linear policies and linear rewards, in the same features and in fewer."""
    s = claim.settings
    dims, seen, beta = s["features"], s["seen"], float(s["beta"])
    fewer = max(1, dims * 2 // 3)
    features, reward, log_ref = _linear_problem(claim, seeds, fewer)
    law = pair_law(torch.full_like(reward[:, :seen], 1 / seen), reward[:, :seen])
    counts = count_pairs(stream_keys(seeds, claim.id, "pairs"), law, [s["pairs"]])[:, 0]
    weight, design = counts.flatten(1).to(reward), _differences(features[:, :seen])

    def dpo(used: int) -> tuple[Tensor, Fit]:
        fit = newton(_dpo(beta), design[..., :used], weight, s["ridge"])
        moved = (features[..., :used] @ fit.theta[..., None])[..., 0]
        return (log_ref + moved).log_softmax(-1), fit

    (same, fit), (narrow, narrow_fit) = dpo(dims), dpo(fewer)
    model = newton(_reward, design, weight, s["ridge"])
    estimate = (features @ model.theta[..., None])[..., 0]
    rlhf = tilted(log_ref, estimate, beta)
    narrow_rlhf, left = restricted_optimum(log_ref, features[..., :fewer], estimate, beta)
    apart = (same - rlhf).abs().amax(-1)
    narrow_apart = (narrow - narrow_rlhf).abs().amax(-1)
    narrow_mass = (narrow.exp() - narrow_rlhf.exp()).abs().sum(-1) / 2
    values = [
        regularised_value(p, log_ref, reward, beta) for p in (same, rlhf, narrow, narrow_rlhf)
    ]
    rows = [
        {"seed": seed, "apart": float(apart[i]), "narrow_apart": float(narrow_apart[i]),
         "narrow_mass": float(narrow_mass[i])}
        | {k: float(v[i]) for k, v in zip(("dpo", "rlhf", "narrow_dpo", "narrow_rlhf"), values,
                                          strict=True)}
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    gradient = max(f.rest() for f in (fit, narrow_fit, model))
    notes = [
        "Both are one fit in two parametrisations; stopped early, they need not agree.",
        f"Policies with the first {fewer} of the {dims} features, the reward model with all: DPO "
        f"and RLHF end {float(narrow_apart.median()):.2f} nats apart in the median seed (from "
        f"{float(narrow_apart.min()):.2f} to {float(narrow_apart.max()):.0f}) and have "
        f"{float(narrow_mass.median()):.2f} of their mass on different arms; RLHF's regularised "
        f"value by the true reward is higher by {float((values[3] - values[2]).mean()):.2f}.",
        "That RLHF maximises its regularised value within the smaller class by natural gradient "
        f"(last step {left:.1g}); it is a local optimum, as the problem is not concave.",
        f"Newton's gradient a pair {gradient:.1g}. Pairs are of the first {seen} arms alone; the "
        "differences are over all arms.",
    ]
    names = ("same features", f"policy with {fewer} of {dims} features")
    figure = _apart_figure(seeds, dict(zip(names, (apart, narrow_apart), strict=True)))
    return Measured(values={"": apart}, rows=rows, figure=figure, notes=notes)


def _linear_problem(
    claim: Claim, seeds: Sequence[int], fewer: int
) -> tuple[Float[Tensor, "S A D"], Float[Tensor, "S A"], Float[Tensor, "S A"]]:
    """Normal features, a reward linear in them (variance about 1), and a reference log-linear in
    the first few alone, so that it is in the smaller class too."""
    keys, features = _features(claim, seeds)
    arms, dims = features.shape[1:]
    weights, start = (normal(keys, arms + k, torch.arange(dims)) for k in (0, 1))
    start[:, fewer:] = 0.0
    reward = (features @ weights[..., None])[..., 0] / math.sqrt(dims)
    return features, reward, (features @ start[..., None])[..., 0].log_softmax(-1)


def _apart_figure(seeds: Sequence[int], apart: dict[str, Tensor]) -> Any:
    lines = [
        curve(
            name, list(seeds), x.clamp(min=1e-16), colour,
            mode="markers", marker={"size": 8, "color": colour},
        )
        for (name, x), colour in zip(apart.items(), (BLUE, RED), strict=True)
    ]  # fmt: skip
    title = "How far apart DPO and RLHF end, with the reward's features and with fewer"
    return chart(title, "seed", "largest difference of log-probs (nats)", lines, log="y")
