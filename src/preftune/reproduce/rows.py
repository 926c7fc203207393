"""The laboratory's rows: the table's methods with the papers' bandit settings, all pairs of N."""

from torch import Tensor

from preftune import objectives as o
from preftune.labellers import (
    Advantage,
    AllPairs,
    Best,
    GivenPreference,
    Labeller,
    RewardWeights,
    Unlabelled,
)
from preftune.method import Method
from preftune.sources import Offline, OnPolicy
from preftune.terms import Objective, Term

N = 10
"""Samples a prompt."""


def fresh(rounds: int | None = None, passes: int = 1, samples: int = N) -> OnPolicy:
    """Rounds of that many prompts, gone through `passes` times."""
    return OnPolicy(samples_per_prompt=samples, prompts_per_round=rounds, passes=passes)


def kept(samples: int = N) -> Offline:
    """Rows of the data with that many responses."""
    return Offline(responses=samples)


def _row(name: str, source: Offline | OnPolicy, labeller: Labeller, objective: Objective,
         **settings: float) -> Method:  # fmt: skip
    term = Term(source=source, labeller=labeller, objective=objective, settings=settings)
    return Method(name=name, terms=(term,))


def best_of_n(source: Offline | OnPolicy) -> Method:
    """Imitate the best of a prompt's samples."""
    return _row("best_of_n", source, Best(), o.nll)


def rwr(source: Offline | OnPolicy, beta: float) -> Method:
    """Weights exp(r / beta); the largest, exp(1 / beta), is not cut."""
    weights = RewardWeights(beta=beta, max_weight=None)
    return _row("rwr", source, weights, o.weighted_nll)


def ppo(source: OnPolicy, clip: float) -> Method:
    """Clipped ratios, rewards whitened over the round, no value head: one reward a response."""
    term = Term(
        source=source, labeller=Advantage(whiten="round"), objective=o.ppo_clip,
        settings={"clip": clip}, level="token",
    )  # fmt: skip
    return Method(name="ppo", terms=(term,))


def dpo(source: Offline | OnPolicy, beta: float) -> Method:
    """All pairs of a prompt's samples, ranked by reward."""
    return _row("dpo", source, AllPairs(), o.dpo, beta=beta)


def ipo(source: Offline | OnPolicy, tau: float, threshold: float) -> Method:
    """All pairs whose rewards differ by more than the threshold."""
    return _row("ipo", source, AllPairs(threshold=threshold), o.ipo, tau=tau)


def reinforce(source: Offline | OnPolicy, centred: bool) -> Method:
    """Rewards less their mean over the prompt (negative ones push down), or less the least of them
    (none does)."""
    baseline = "prompt" if centred else "least"
    return _row("reinforce", source, Advantage(baseline=baseline), o.reinforce)


def scaled_dpo(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    *,
    beta: float | Tensor,
    rejected: float,
) -> Tensor:
    """DPO whose gradient through the rejected response is multiplied by `rejected`, its value kept.

    Args:
        rejected: 0 takes the negative gradient away, 1 is DPO.
    """
    held = logp_rejected.detach()
    scaled = held + rejected * (logp_rejected - held)
    return o.dpo(logp_chosen, scaled, ref_logp_chosen, ref_logp_rejected, beta=beta)


def dpo_with(source: Offline | OnPolicy, beta: float, rejected: float) -> Method:
    """See `scaled_dpo`."""
    return _row("dpo_scaled", source, AllPairs(), scaled_dpo, beta=beta, rejected=rejected)


def given_pairs(beta: float, objective: Objective = o.dpo, **settings: float) -> Method:
    """Offline pairs as the data give them."""
    return _row("offline", Offline(), GivenPreference(), objective, beta=beta, **settings)


def fresh_pairs(beta: float) -> Method:
    """Two fresh samples a prompt, the better one chosen, one update a round."""
    return _row("on_policy_dpo", fresh(samples=2), AllPairs(), o.dpo, beta=beta)


def half_and_half(beta: float) -> Method:
    """Given pairs and fresh ones, half and half."""
    halves = (given_pairs(beta).terms[0], fresh_pairs(beta).terms[0])
    terms = tuple(
        Term(
            source=t.source, labeller=t.labeller, objective=t.objective, settings=t.settings,
            weight=0.5, share=0.5,
        )
        for t in halves
    )  # fmt: skip
    return Method(name="half_and_half", terms=terms)


def hypo(beta: float, weight: float, samples: int) -> Method:
    """Given pairs, and a reverse KL on fresh samples of as many prompts."""
    kl = Term(
        source=fresh(samples=samples), labeller=Unlabelled(), objective=o.reverse_kl, weight=weight
    )
    return Method(name="hypo", terms=(given_pairs(beta).terms[0], kl))
