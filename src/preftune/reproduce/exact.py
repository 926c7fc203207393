"""Claims of bounds and of constructions by hand: sums over arms, nothing is fitted to data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.numerics import normal, stream_keys, uniform
from preftune.report.drawing import NEUTRAL
from preftune.reproduce.charts import BLUE, RED, by_beta, chart, curve
from preftune.reproduce.claims import Claim, Measured, experiment
from preftune.reproduce.solvers import single
from preftune.theory import coverage, proposition
from preftune.theory.closed_form import kl, tilted


@experiment("c1-prop41")
def unseen_mass(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Proposition 4.1: what a policy may put on an arm that no pair shows."""
    eps, beta = float(claim.settings["eps"]), float(claim.settings["beta"])
    grid = torch.logspace(-6, 0, 25, dtype=torch.float64).tolist()
    rows = [_unseen_row(e, b) for b in sorted({beta, 0.03, 0.3}) for e in grid]
    mass = _unseen_row(eps, beta)["mass"]
    title = "Mass that an accurate implicit reward allows on an arm that the data never show"
    x = "ε, error of the implicit reward on the data (squared reward)"
    notes = [
        "The construction is exact: two arms seen, one not; differences of the implicit reward on "
        "the arms seen are exactly right, so that no pair could tell.",
        "Where the reference gives the unseen arm nothing the KL is infinite; the rows give it for "
        "a reference mass of 1e-6.",
    ]
    lines = by_beta(rows, "eps", "mass")
    figure = chart(title, x, "mass on the unseen arm", lines, log="x")
    return Measured(values=single(mass - 0.632), rows=rows, figure=figure, notes=notes)


def _unseen_row(eps: float, beta: float) -> dict[str, Any]:
    log_data = torch.full((2,), 0.5, dtype=torch.float64).log()
    reward = torch.tensor([0.3, 0.0], dtype=torch.float64)
    made = proposition.unseen_arm(log_data, reward, eps, beta, unseen=1e-6)
    error = proposition.in_distribution_error(made.log_p[:2], log_data, made.reward, beta)
    return {
        "eps": eps, "beta": beta, "mass": float(made.log_p[2].exp()),
        "error": float(error), "kl": float(kl(made.log_p, made.log_ref)),
    }  # fmt: skip


@experiment("c2-kl-bound")
def tilt_bound(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """Random references, bounded rewards and betas: the optimum's KL against its bound."""
    shape = (claim.settings["instances"], claim.settings["arms"])
    log_ref, reward, beta = _bounded_problems(seeds, claim.id, *shape)
    spread = reward.amax(-1) - reward.amin(-1)
    divergence = kl(tilted(log_ref, reward, beta[..., None]), log_ref.log_softmax(-1))
    bound = coverage.tilt_kl_bound(spread, beta)
    beyond = divergence > bound * (1 + 1e-12)
    dpo = [_dpo_beyond(seed, claim.id) for seed in seeds]
    rows = [
        {
            "seed": seed, "beyond": int(beyond[i].sum()), "instances": shape[0],
            "closest": float((divergence / bound)[i].max()), **dpo[i],
        }
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    notes = [
        f"The KL comes as near to the bound as {max(r['closest'] for r in rows):.4f} of it. The "
        "paper's bound is 2 R'/β for rewards in [-R', R'], which is range/β.",
        f"A policy whose implicit reward is exact in its differences on the data is beyond the "
        f"bound for its reward in {sum(r['dpo_kl'] > r['dpo_bound'] for r in rows)} of "
        f"{len(rows)} seeds (ε = 0.01, reference mass 1e-9 on the arm never seen); without that "
        "mass its KL is infinite.",
    ]
    return Measured(
        values={"": beyond.double().mean(-1)}, rows=rows, notes=notes,
        figure=_bound_figure((spread / beta)[0], divergence[0], rows),
    )  # fmt: skip


def _bounded_problems(
    seeds: Sequence[int], name: str, count: int, arms: int
) -> tuple[Float[Tensor, "S I A"], Float[Tensor, "S I A"], Float[Tensor, "S I"]]:
    """References (a third each uniform, peaked, with arms of tiny mass), rewards and betas.

    Rewards are uniform draws or, in every second triple, the two ends of the range alone, which
    come nearest to the bound. Ranges up to [0.1, 5], betas in [0.05, 5], uniform in the log.
    """
    keys = stream_keys(seeds, name)[:, None, None]
    at, arm = torch.arange(count)[:, None], torch.arange(arms)
    z, u, v = normal(keys, at, arm, 0), uniform(keys, at, arm, 1), uniform(keys, at, arm, 2)
    tiny = torch.where(u < 0.3, -30.0 + z, 0.0)
    log_ref = torch.stack([0.0 * z, 5 * z, tiny])[torch.arange(count) % 3, :, torch.arange(count)]
    # A threshold between the least and the largest draw, so that no reward is constant.
    least, largest = v.amin(-1, True), v.amax(-1, True)
    ends = (v > least + uniform(keys, at, 3) * (largest - least)).double()
    reward = torch.where(at // 3 % 2 == 0, v, ends)
    size, beta = (uniform(keys[..., 0], torch.arange(count), k) for k in (4, 5))
    reward = 0.1 * 50.0 ** size[..., None] * reward
    return log_ref.transpose(0, 1).contiguous(), reward, 0.05 * 100.0**beta


def _dpo_beyond(seed: int, name: str) -> dict[str, Any]:
    """KL and bound of `proposition.unseen_arm` with random data, rewards and β."""
    (key,) = stream_keys([seed], name, "dpo").tolist()
    log_data = normal(key, torch.arange(2)).log_softmax(-1)
    reward = uniform(key, torch.arange(2, 4))
    beta = 0.05 * 100.0 ** float(uniform(key, 4))
    made = proposition.unseen_arm(log_data, reward, 0.01, beta, unseen=1e-9)
    spread = reward.max() - reward.min()
    return {
        "dpo_beta": beta, "dpo_range": float(spread), "dpo_mass": float(made.log_p[2].exp()),
        "dpo_kl": float(kl(made.log_p, made.log_ref)),
        "dpo_bound": float(coverage.tilt_kl_bound(spread, beta)),
    }  # fmt: skip


def _bound_figure(scaled: Tensor, divergence: Tensor, rows: Sequence[dict[str, Any]]) -> Any:
    x = torch.logspace(-2, 2, 100, dtype=torch.float64)
    traces = [
        curve("optimum of a bounded reward (first seed)", scaled, divergence, BLUE,
              mode="markers", marker={"size": 3, "color": BLUE}),
        curve("accurate on the data, arm unseen (each seed)",
              [r["dpo_range"] / r["dpo_beta"] for r in rows], [r["dpo_kl"] for r in rows], RED,
              mode="markers", marker={"size": 7, "color": RED, "symbol": "diamond"}),
        curve("bound min(R/β, R²/8β²)", x, coverage.tilt_kl_bound(x, 1.0), NEUTRAL, "dash"),
    ]  # fmt: skip
    title = "KL to the reference and its bound, for optima and for policies right on the data alone"
    return chart(title, "R/β, range of the reward over β", "KL (nats)", traces, log="xy")


@experiment("d5-misspecified")
def misspecified(claim: Claim, seeds: Sequence[int], _: Any) -> Measured:
    """One parameter, three arms, full coverage, and a population optimum below the start."""
    weights, beta = [float(w) for w in claim.settings["weights"]], float(claim.settings["beta"])
    gain = _misspecified_row(weights[0], weights[1], weights[2], beta)["gain"]
    grid = [float(k) for k in range(21)]
    rows = [
        _misspecified_row(weights[0], w, weights[2], b)
        for b in sorted({beta, 0.3, 3.0})
        for w in grid
    ]
    t1, t2 = (1 / (1 + math.exp(-k)) - 0.5 for k in (1, 2))
    least = (2 * weights[0] * t1 + weights[2] * t2) / t1
    lines = by_beta([r | {"w": r["weights"][1]} for r in rows], "w", "gain")
    lines.append(curve("the start", [grid[0], grid[-1]], [0.0, 0.0], NEUTRAL, "dot"))
    title = "What DPO's optimum gains over the reference, by how often arms 1 and 3 are compared"
    notes = [
        f"With weights {weights[0]:g} : w : {weights[2]:g} of the pairs (1, 2), (1, 3), (2, 3) it "
        f"happens for w above {least:.2f}, whatever β is, and not below: with equal weights DPO "
        "ends above the start.",
        "The policies have one parameter and none holds the true reward; every arm has a third of "
        "the reference's mass.",
    ]
    y = "expected reward at DPO's optimum less at the start"
    figure = chart(title, "weight of comparisons of arms 1 and 3", y, lines)
    return Measured(values=single(gain), rows=rows, figure=figure, notes=notes)


def _misspecified_row(w12: float, w13: float, w23: float, beta: float) -> dict[str, Any]:
    example = proposition.auxdpo_example(w12, w13, w23)
    theta = proposition.dpo_population_optimum(example, beta)
    gain = proposition.expected_reward(example, torch.stack([theta, 0 * theta])).diff()
    return {
        "weights": [w12, w13, w23], "beta": beta, "theta": float(theta), "gain": float(-gain)
    }  # fmt: skip
