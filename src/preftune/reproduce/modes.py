"""Claims of the two divergences on arms: single steps, speed, and which modes a fit takes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.numerics import normal, stream_keys, uniform
from preftune.problems.bandit import Peak
from preftune.report.drawing import NEUTRAL
from preftune.reproduce.charts import BLUE, GREEN, RED, chart, curve
from preftune.reproduce.claims import Claim, Measured, experiment
from preftune.reproduce.solvers import forward_fit, sd_of, single, steps_to_half
from preftune.theory import bimodal, dynamics
from preftune.theory.closed_form import kl
from preftune.theory.dynamics import Order

ROUNDING = 1e-9
"""Relative difference below which two sides of a comparison count as equal."""


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= ROUNDING * torch.maximum(a.abs(), b.abs())


@experiment("m3-cases")
def three_cases(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Steps by autograd of the two divergences against the conditions of `theory.dynamics`."""
    shape = (claim.settings["instances"], claim.settings["arms"])
    p, q = (_policies(stream_keys(seeds, claim.id, name), *shape) for name in "pq")
    kinds = {**_equal_policy(p, q), **_equal_target(p, q)}
    rows, broken, compared = [], 0, 0
    for name, (seen, stated, simple, dropped) in kinds.items():
        kept = ~dropped
        wrong = (seen != stated) & kept
        broken, compared = broken + wrong.sum(-1), compared + kept.sum(-1)
        rows.append({
            "case": name, "compared": int(kept.sum()), "left_out": int(dropped.sum()),
            "seen": float(seen.double().mean()), "stated": float(stated.double().mean()),
            "sufficient": float(simple.double().mean()), "violations": int(wrong.sum()),
            "sufficient_but_not_seen": int((simple & ~seen & kept).sum()),
        })  # fmt: skip
    notes = [
        "The conditions are exact and derived here, not quoted from the paper.",
        f"{sum(r['left_out'] for r in rows)} of {sum(r['compared'] for r in rows)} comparisons "
        f"are left out because both sides are equal to rounding (relative {ROUNDING:g}).",
        "None of the cases is a rule without its condition: they occur in "
        f"{', '.join(format(r['seen'], '.0%') for r in rows)} of random instances.",
    ]
    share = broken / torch.as_tensor(compared).double()
    return Measured(values={"": share}, rows=rows, notes=notes)


def _policies(keys: Int[Tensor, " S"], count: int, arms: int) -> Float[Tensor, "S I A"]:
    """Log-probs from nearly uniform to nearly deterministic: logits of scale 0 to 4."""
    keys, instance = keys[:, None, None], torch.arange(count)[:, None]
    scale = 4 * uniform(keys, instance, arms)
    return (scale * normal(keys, instance, torch.arange(arms))).log_softmax(-1)


def _steps(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of the first two logits, [..., 2], in a step on forward and on reverse KL.

    Of size 0.01; the change of a log-ratio is linear in the size, as the normaliser cancels.
    """
    changes = []
    for divergence in (lambda z: kl(log_q, z), lambda z: kl(z, log_q)):
        logits = log_p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(logits.log_softmax(-1)).sum(), logits)
        changes.append(-0.01 * gradient[..., :2])
    return changes[0], changes[1]


Case = tuple[Tensor, Tensor, Tensor, Tensor]
"""What the step shows, what the exact condition says, what a sufficient one says, and which
comparisons are equal to rounding: each [S, I] bool."""


def _equal_policy(log_p: Tensor, log_q: Tensor) -> dict[str, Case]:
    """Case 1: p1 = p2, q1 > q2."""
    log_p, log_q = _equal_pair(log_p), _sorted_pair(log_q)
    forward, reverse = (s[..., 0] - s[..., 1] for s in _steps(log_p, log_q))
    mass, (q1, q2) = log_p[..., 0].exp(), log_q[..., :2].exp().unbind(-1)
    mean = dynamics.logarithmic_mean(q1, q2)
    name = "1: reverse KL widens the ratio more"
    return {name: (reverse > forward, mass > mean, mass > q1, _equal(reverse, forward))}


def _equal_target(log_p: Tensor, log_q: Tensor) -> dict[str, Case]:
    """Cases 2 and 3: p1 > p2, q1 = q2."""
    log_p, log_q = _sorted_pair(log_p), _equal_pair(log_q)
    steps = _steps(log_p, log_q)
    forward, reverse = (s[..., 0] - s[..., 1] for s in steps)
    (p1, p2), q = log_p[..., :2].exp().unbind(-1), log_q[..., 0].exp()
    divergence = kl(log_p, log_q)
    order = dynamics.equal_target_order(p1, p2, q, divergence)
    falls = forward < 0
    return {
        "2: reverse KL raises the likelier arm": (
            (reverse > 0) & falls, order == Order.ABOVE, q > math.e * p1,
            _equal(steps[1][..., 0], steps[1][..., 1]),
        ),
        "3: reverse KL strips it faster": (
            (reverse < forward) & falls, order == Order.BELOW, q < (-divergence).exp() * p2,
            _equal(reverse, forward),
        ),
    }  # fmt: skip


def _equal_pair(log_p: Tensor) -> Tensor:
    return torch.cat([log_p[..., :1], log_p[..., :1], log_p[..., 2:]], -1).log_softmax(-1)


def _sorted_pair(log_p: Tensor) -> Tensor:
    return torch.cat([log_p[..., :2].sort(-1, descending=True).values, log_p[..., 2:]], -1)


CENTRES = tuple(range(35, 75, 5))
"""Targets of `first-2` beside the two of its settings, arms: from the first that the reference does
not have half of already."""


@experiment("first-2")
def mode_seeking_speed(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Exact gradient steps on forward and reverse KL from a narrow reference."""
    s = claim.settings
    centres = sorted({s["near"], s["far"], *CENTRES})
    wide = float(s["width"])
    means = torch.tensor([s["reference"], *centres], dtype=torch.float64)
    log_all = bimodal.discretised_gaussian(means, torch.full_like(means, wide))
    log_ref, log_target = log_all[0], log_all[1:]
    near = ((torch.arange(log_ref.shape[-1]) - means[1:, None]).abs() <= wide).double()
    runs = {
        name: steps_to_half(step, log_ref, log_target, near, s["rate"], s["most"])
        for name, step in (
            ("forward", dynamics.forward_kl_step), ("reverse", dynamics.reverse_kl_step)
        )
    }  # fmt: skip
    steps = {name: reached for name, (reached, _) in runs.items()}
    rows = [
        {
            "target": centre, "forward": int(steps["forward"][i]),
            "reverse": int(steps["reverse"][i]), "most": s["most"],
            "log2": math.log2(steps["forward"][i] / steps["reverse"][i]),
            "reference_mass": float((log_ref.exp() * near[i]).sum()),
        }
        for i, centre in enumerate(centres)
    ]  # fmt: skip
    by = {row["target"]: row for row in rows}
    half = (log_target.exp() * near).sum(-1) / 2
    chosen = {f"target at {s[k]}": centres.index(s[k]) for k in ("near", "far")}
    ahead = [r["target"] for r in rows if r["reverse"] < r["forward"]]
    notes = [
        _says(by[s["near"]]), _says(by[s["far"]]),
        f"Reverse KL needs fewer steps for targets at {ahead or 'none'}, of {centres}. The lines "
        "end where the last of these is reached, or at the most steps.",
        "Reverse KL moves an arm in proportion to its own mass (a policy-gradient plateau): where "
        "the reference has next to none, it is the slower. The statement needs its regime.",
    ]  # fmt: skip
    figure = _speed_figure(runs, chosen, half)
    return Measured(values=single(by[s["far"]]["log2"]), rows=rows, figure=figure, notes=notes)


def _says(row: dict[str, Any]) -> str:
    steps = (
        f"{row[k]}{' or more' if row[k] == row['most'] else ''} steps on {k} KL"
        for k in ("forward", "reverse")
    )
    mass = f"reference mass {row['reference_mass']:.2g} near it"
    return f"Target at {row['target']}, {mass}: {', '.join(steps)}."


def _speed_figure(
    runs: dict[str, tuple[Tensor, Tensor]], targets: dict[str, int], half: Tensor
) -> Any:
    lines = []
    for (label, i), colour in zip(targets.items(), (BLUE, RED), strict=True):
        for (name, (_, mass)), dash in zip(runs.items(), ("dash", "solid"), strict=True):
            # evenly spaced on the logarithmic axis
            at = torch.logspace(0, math.log10(len(mass) - 1), 300).round().long().unique()
            lines.append(curve(f"{label}, {name} KL", at, mass[at, i], colour, dash))
    ends = [1, max(len(mass) for _, mass in runs.values())]
    lines.append(curve("half of the target's own", ends, [float(half[0])] * 2, NEUTRAL, "dot"))
    title = "Mass near the target's peak over gradient steps, for a near target and a far one"
    return chart(title, "gradient steps", "mass within one width of the peak", lines, log="x")


@experiment("m3-bimodal")
def two_modes(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Exact projections of two modes on the discretised Gaussians, by search of a grid."""
    target = bimodal.two_modes()
    family, grid = bimodal.unimodal_grid()
    arms, rows = torch.arange(len(target)), []
    lines = [curve("target", arms, target.exp(), NEUTRAL, fill="tozeroy")]
    forward, reverse = bimodal.fits(target, family)
    for name, nats, colour in (("forward", forward, BLUE), ("reverse", reverse, RED)):
        i = int(nats.argmin())
        rows.append({
            "divergence": name, "mean": int(grid[i, 0]), "sd_parameter": int(grid[i, 1]),
            "sd": float(sd_of(family[i])), "nats": float(nats[i]),
        })  # fmt: skip
        lines.append(curve(f"best by {name} KL", arms, family[i].exp(), colour))
    notes = [
        "{divergence} KL: mean parameter {mean}, sd parameter {sd_parameter}, sd over the arms "
        "{sd:.2f}, {nats:.3f} nats from the target.".format(**row)
        for row in rows
    ]
    notes += [
        "The statistic takes the fits' sd over the 100 arms; a wide member is cut off at the ends, "
        "so that its parameter is larger.",
        "The paper's own target could not be recovered: modes at 25 and 75 of sd 5, weights 1 : "
        "0.8, stand for it.",
    ]
    figure = chart("Forward KL covers both modes, reverse KL one", "arm", "mass", lines)
    difference = rows[0]["sd"] - rows[1]["sd"]
    return Measured(values=single(difference), rows=rows, figure=figure, notes=notes)


LEAST_SD, MOST_SD = 2.0, 40.0
"""Bounds of the family of `m3-reuse-limit`, arms."""
UNIT = 5.0
"""Arms to one unit of the mean's parameter: the largest round number with which steps of rate 0.5
still settle at the least sd, where the curvature by the mean is up to (UNIT / sd)²."""


@experiment("m3-reuse-limit")
def reuse_limit(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """One exact round fitted to the end, and exact gradient steps on fresh samples."""
    s = claim.settings
    mean = 30 + 40 * uniform(stream_keys(seeds, claim.id, "start"), 0)
    start = bimodal.discretised_gaussian(mean, torch.full_like(mean, 20.0))
    log_weight = torch.maximum(Peak(25, 8)(), 0.9 * Peak(75, 8)()) / s["beta"]
    target = (start + log_weight).log_softmax(-1)
    once = forward_fit(target, LEAST_SD, MOST_SD)
    fresh, widest, moved = _fresh_steps(mean, log_weight, s["rate"], s["steps"])
    log_once, log_fresh = (bimodal.discretised_gaussian(*fit) for fit in (once, fresh))
    difference = sd_of(log_once) - sd_of(log_fresh)
    on_one = ((fresh[0] - 25).abs() < 8) | ((fresh[0] - 75).abs() < 8)
    on_one &= sd_of(log_fresh) < 8
    rows = [
        {
            "seed": seed, "start": float(mean[i]), "sd_once": float(sd_of(log_once)[i]),
            "mean_once": float(once[0][i]), "parameter_once": float(once[1][i]),
            "sd_fresh": float(sd_of(log_fresh)[i]), "mean_fresh": float(fresh[0][i]),
            "widest_fresh": float(widest[i]), "on_one_mode": bool(on_one[i]),
        }
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    notes = [
        f"Fresh steps end on one mode in {int(on_one.sum())} of {len(seeds)} seeds, on the higher "
        f"one in {int(((fresh[0] - 25).abs() < 8).sum())}; the last step moved a parameter by at "
        f"most {float(moved.max()):.1g}.",
        f"From a start between the modes they widen first (in {int((widest > 21).sum())} seeds, to "
        f"an sd parameter of {float(widest.max()):.0f} at most): one mode is where they end, not "
        "what they do throughout.",
        "Fresh steps ascend log E[exp(r/β)], not the reward under a KL penalty: nothing holds the "
        f"fit to its start, and its sd falls to {float(sd_of(log_fresh).max()):.2f} at most.",
        "One round is fitted exactly, by bisection: the best member has the first two moments, "
        "over the arms, of the start's samples as weighted.",
        f"Parameters: mean in units of {UNIT:g} arms and log sd; sd parameter kept in "
        f"[{LEAST_SD:g}, {MOST_SD:g}]. With units of 10 arms the steps overshoot at small sd "
        "and wander around one mode.",
    ]
    return Measured(
        values={"": difference}, rows=rows, notes=notes,
        figure=_reuse_figure(seeds, target, log_once, log_fresh),
    )  # fmt: skip


def _fresh_steps(
    mean: Float[Tensor, " S"], log_weight: Float[Tensor, " A"], rate: float, steps: int
) -> tuple[tuple[Tensor, Tensor], Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Gradient ascent on Σ_a sg(p(a) w(a) / E_p[w]) log p(a), from sd 20.

    No baseline is needed: the weights are exact, and the score has mean zero under p.

    Returns:
        (mean, sd) at the end, arms; the largest sd on the way; and the last step's size.
    """
    at = torch.stack([mean / UNIT, torch.full_like(mean, math.log(20.0))], -1)
    limits = [[-torch.inf, math.log(LEAST_SD)], [torch.inf, math.log(MOST_SD)]]
    low, high = torch.tensor(limits, dtype=at.dtype)
    widest = moved = at[:, 1]
    for _ in range(steps):
        leaf = at.clone().requires_grad_()
        log_p = bimodal.discretised_gaussian(UNIT * leaf[:, 0], leaf[:, 1].exp(), len(log_weight))
        share = (log_p.detach() + log_weight).softmax(-1)
        (gradient,) = torch.autograd.grad((share * log_p).sum(), leaf)
        new = (at + rate * gradient).clamp(low, high)
        moved, at = (new - at).abs().amax(-1), new
        widest = torch.maximum(widest, at[:, 1])
    return (UNIT * at[:, 0], at[:, 1].exp()), widest.exp(), moved


def _reuse_figure(seeds: Sequence[int], target: Tensor, once: Tensor, fresh: Tensor) -> Any:
    arms, lines = torch.arange(target.shape[-1]), []
    for i, (seed, colour) in enumerate(zip(seeds, (BLUE, RED, GREEN), strict=False)):
        for name, log_p, dash in (
            ("weighted samples of the start", target, "dot"),
            ("one round to the end", once, "solid"), ("fresh at each step", fresh, "dash"),
        ):  # fmt: skip
            lines.append(curve(f"seed {seed}, {name}", arms, log_p[i].exp(), colour, dash))
    title = "Reward-weighted likelihood: one round used to the end, and fresh samples at each step"
    figure = chart(title, "arm", "mass", lines, log="y")
    return figure.update_yaxes(range=[-4, 0])  # powers of ten: what lies below is next to nothing
