"""The table: a named method is one row of terms, and its defaults are the vetted ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from preftune import objectives as o
from preftune.collecting import Source
from preftune.errors import UserError, nearest
from preftune.labellers import (
    Advantage,
    Best,
    BestWorst,
    Demonstration,
    Feedback,
    GivenPreference,
    Good,
    Member,
    RewardWeights,
    Unlabelled,
)
from preftune.labellers.base import Labeller
from preftune.method import SETTINGS, Method, configure, resolve
from preftune.method_checks import check
from preftune.sources import Offline, OnPolicy, Pool, Reference
from preftune.terms import PLAIN, Objective, Term, Times

__all__ = ["SETTINGS", "Method", "check", "configure", "get", "resolve", "table"]

_TAJWAR, _SONG = "arXiv 2404.14367", "arXiv 2406.01462"
_IMITATION, _CONTRAST = 2e-5, 1e-6
"""Learning rates that likelihood rows and the others were vetted with."""


def _term(source: Source, labeller: Labeller, objective: Objective, **more: Any) -> Term:
    """A term; what is no part of it is a setting of the objective."""
    parts = {k: more.pop(k) for k in PLAIN if k in more}
    return Term(source=source, labeller=labeller, objective=objective, settings=more, **parts)


def _row(
    name: str, paper: str, equation: str, summary: str, rate: float, *terms: Term, **more: Any
) -> Method:
    return Method(
        name=name, terms=terms, paper=paper, equation=equation, summary=summary,
        defaults={"learning_rate": rate}, **more,
    )  # fmt: skip


_CHOSEN, _PAIRS = Offline(take="chosen"), Offline()
_FRESH, _FRESH_PAIRS = OnPolicy(samples_per_prompt=2), OnPolicy(samples_per_prompt=2, passes=2)
_GIVEN, _RANKED = GivenPreference(), BestWorst()
_ACTOR = OnPolicy(samples_per_prompt=1, passes=2)
_GENERALISED = Advantage(baseline="value", whiten="round", kl=0.05)
_OWN = Pool(members=(_CHOSEN, OnPolicy(samples_per_prompt=1, passes=2)))
_WITH_REFERENCE = Pool(members=(OnPolicy(samples_per_prompt=1), Reference(samples_per_prompt=1)))
_GROUP = OnPolicy(samples_per_prompt=8)
_ONCE = OnPolicy(samples_per_prompt=2)
_H = "h = log π/π_ref"

# Rows of the two papers.
_PAPERS = (
    _row(
        "sft", "supervised fine-tuning", "−log π(y|x)", "imitate demonstrations", _IMITATION,
        _term(_CHOSEN, Demonstration(), o.nll),
    ),
    _row(
        "pref_ft", f"{_TAJWAR} section 3", "−log π(y_w|x)", "imitate the preferred responses",
        _IMITATION, _term(_CHOSEN, Demonstration(), o.nll),
    ),
    _row(
        "binary_feedme", f"{_TAJWAR} section 3", "−log π(y|x) where y is labelled good",
        "imitate the responses labelled good; on pairs the same as pref_ft", _IMITATION,
        _term(_PAIRS, Good(), o.nll),
    ),
    _row(
        "binary_reward_conditioning", f"{_TAJWAR} section 3; AlpacaFarm, arXiv 2305.14387",
        "−log π(y|x, c), c the control token for good or bad",
        "imitate every response behind a control that says whether it is good; ask for good",
        _IMITATION, _term(Offline(take="conditioned"), Demonstration(), o.nll),
    ),
    _row(
        "rwr", f"{_TAJWAR} section 3", "−min(exp(r/β), w_max) log π(y|x), y ~ π",
        "imitate fresh samples, each weighed by its reward", 1e-5,
        _term(OnPolicy(samples_per_prompt=2, passes=2), RewardWeights(), o.weighted_nll),
    ),
    _row(
        "offline_rwr", f"{_TAJWAR} section 3", "−min(exp(r/β), w_max) log π(y|x), y from the data",
        "imitate the data's responses, each weighed by its reward", _IMITATION,
        _term(_PAIRS, RewardWeights(), o.weighted_nll),
    ),
    _row(
        "best_of_n", f"{_TAJWAR} section 3",
        "−log π(y*|x), y* = argmax r over N reference samples",
        "imitate the best of N samples, drawn once from the reference", _IMITATION,
        _term(Reference(samples_per_prompt=4), Best(), o.nll),
    ),
    _row(
        "on_policy_best_of_n", f"{_TAJWAR} section 3",
        "−log π(y*|x), y* = argmax r over N samples of π",
        "imitate the best of N fresh samples", _CONTRAST,
        _term(OnPolicy(samples_per_prompt=4, passes=2), Best(), o.nll),
    ),
    _row(
        "reinforce", f"{_TAJWAR} section 3; Williams 1992",
        "−(r − b) log π(y|x), b = mean of earlier r",
        "raise samples in proportion to their reward above the running mean", _CONTRAST,
        _term(OnPolicy(samples_per_prompt=1), Advantage(baseline="running"), o.reinforce),
    ),
    _row(
        "rloo", "arXiv 2402.14740", "−(r_k − mean of the other r_j) log π(y_k|x)",
        "raise samples in proportion to their reward above the prompt's others", _CONTRAST,
        _term(OnPolicy(samples_per_prompt=4), Advantage(baseline="leave_one_out"), o.reinforce),
    ),
    _row(
        "ppo", f"{_TAJWAR} section 3; arXiv 1707.06347 equation 7",
        "−min(ρA, clip(ρ, 1±ε)A) + c ½ max((v − R)², (v_clip − R)²), A by GAE of r − κ log π/π_ref",
        "clipped policy gradient with a value head, the KL in the reward", _CONTRAST,
        _term(_ACTOR, _GENERALISED, o.ppo_clip, clip=0.2, level="token", max_ratio=10.0),
        _term(_ACTOR, _GENERALISED, o.value_clip, clip=0.2, level="token", weight=0.1),
    ),
    _row(
        "dpo", "arXiv 2305.18290 equation 7", f"−log σ(β(h_w − h_l)), {_H}",
        "contrast the given pairs", _CONTRAST, _term(_PAIRS, _GIVEN, o.dpo, beta=0.1),
    ),
    _row(
        "ipo", "arXiv 2310.12036 equation 17", f"(h_w − h_l − 1/(2τ))², {_H}",
        "regress the given pairs' margin", _CONTRAST, _term(_PAIRS, _GIVEN, o.ipo, tau=0.1),
    ),
    _row(
        "on_policy_dpo", f"{_TAJWAR} section 5",
        "−log σ(β(h_w − h_l)), y_w, y_l ~ π ranked by r",
        "contrast the best and the worst of fresh samples", _CONTRAST,
        _term(_FRESH_PAIRS, _RANKED, o.dpo, beta=0.1),
    ),
    _row(
        "on_policy_ipo", f"{_TAJWAR} section 5",
        "(h_w − h_l − 1/(2τ))², y_w, y_l ~ π ranked by r",
        "regress the margin of the best and the worst of fresh samples", _CONTRAST,
        _term(_FRESH_PAIRS, _RANKED, o.ipo, tau=0.1),
    ),
    _row(
        "hypo", f"{_SONG} Algorithm 1",
        "−log σ(β(h_w − h_l)) + λ KL(π‖π_ref), the KL on fresh unlabelled samples",
        "contrast the given pairs, held near the reference by fresh samples", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=0.1),
        _term(_FRESH, Unlabelled(), o.reverse_kl, weight=Times(0.05, "beta")),
    ),
    _row(
        "half_and_half", f"{_TAJWAR} section 6 joined with offline pairs",
        "½ DPO on the given pairs + ½ DPO on ranked fresh samples",
        "contrast the given pairs and fresh ones, half and half", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=0.1, weight=0.5, share=0.5),
        _term(_FRESH_PAIRS, _RANKED, o.dpo, beta=0.1, weight=0.5, share=0.5),
    ),
    _row(
        "chosen_vs_own", "SPIN, arXiv 2401.01335, with fresh samples",
        "−log σ(β(h(y_w) − h(y))), y ~ π",
        "contrast the given chosen response with an own sample: for data without bad responses",
        _CONTRAST, _term(_OWN, _GIVEN, o.dpo, beta=0.1),
    ),
)  # fmt: skip

# Rows beyond the papers: one objective each, or the same objective on another source.
_BEYOND = (
    _row(
        "cdpo", "Mitchell 2023, A note on DPO with noisy preferences",
        "−(1−ε) log σ(βΔ) − ε log σ(−βΔ)", "DPO where a share of the labels is wrong", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=0.1, label_smoothing=0.1),
    ),
    _row(
        "robust_dpo", "arXiv 2403.00409", "[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)",
        "DPO, unbiased where a known share of the labels is flipped", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.robust_dpo, beta=0.1, label_smoothing=0.1),
    ),
    _row(
        "ln_dpo", "length-normalised DPO, as in Tulu 3, arXiv 2411.15124",
        "−log σ(β(h_w/|y_w| − h_l/|y_l|))", "DPO on the mean log-ratio of a token", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=2.0, level="mean"),
    ),
    _row(
        "dpo_nll", "arXiv 2404.19733 (Iterative RPO)", "DPO + α NLL of y_w, a token",
        "DPO that keeps the chosen response likely", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=0.1),
        _term(_PAIRS, Demonstration(), o.nll, unit="token"),
    ),
    _row(
        "dpop", "arXiv 2402.13228", "−log σ(β(Δ − λ max(0, −h_w)))",
        "DPO that is penalised where the chosen response falls below the reference", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpop, beta=0.1, penalty=5.0),
    ),
    _row(
        "wpo", "arXiv 2406.11827", "w(y_w) w(y_l) · DPO, w = exp of the mean of log π(y_t)/Σπ²",
        "DPO with pairs weighed by how likely the policy is to draw them", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.wpo, beta=0.1),
    ),
    _row(
        "chi_po", "arXiv 2407.13399", "−log σ(clip(β(φ(ρ_w) − φ(ρ_l)))), φ(z) = z + log z",
        "DPO under a χ² and KL penalty: single-policy coverage is enough", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.chi_po, beta=0.05, clip=10.0),
    ),
    _row(
        "simpo", "arXiv 2405.14734", "−log σ(β(log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)",
        "contrast mean log-probs, without a reference", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.simpo, beta=2.0, gamma=1.0),
    ),
    _row(
        "orpo", "arXiv 2403.07691", "−log π(y_w)/|y_w| − λ log σ(log odds ratio)",
        "imitate the chosen response and contrast the odds, without a reference", 8e-6,
        _term(_PAIRS, _GIVEN, o.orpo, odds_weight=0.1),
    ),
    _row(
        "cpo", "arXiv 2401.08417", "−log σ(β(log π(y_w) − log π(y_l))) − λ log π(y_w)",
        "DPO without a reference, and imitation of the chosen response", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.cpo, beta=0.1, nll_weight=1.0),
    ),
    _row(
        "kto", "arXiv 2402.01306", "λ_y (1 − σ(±β(h − z₀))), z₀ = max(0, KL on mismatched pairs)",
        "push single responses up or down by good and bad labels", _CONTRAST,
        _term(Offline(take="mismatched"), Feedback(), o.kto, beta=0.1, weight_good=1.0,
              weight_bad=1.0),
    ),
    _row(
        "xpo", "arXiv 2405.21046", "DPO on (y ~ π, ỹ ~ π_ref) ranked by r + α log π(ỹ|x)",
        "contrast an own sample with the reference's, and move away from the reference", _CONTRAST,
        _term(_WITH_REFERENCE, _RANKED, o.dpo, beta=0.1),
        _term(_WITH_REFERENCE, Member(origin="reference"), o.nll, weight=-1e-5),
    ),
    _row(
        "grpo", "arXiv 2402.03300", "−min(ρA, clip(ρ, 1±ε)A) + β k3, A = (r − mean)/sd of a prompt",
        "clipped policy gradient on groups of samples, without a value head", _CONTRAST,
        _term(_GROUP, Advantage(whiten="prompt"), o.ppo_clip, clip=0.2, level="token",
              unit="token"),
        _term(_GROUP, Unlabelled(baseline="none"), o.kl_loss, estimator="k3", level="token",
              unit="token", weight=0.04),
    ),
    _row(
        "auto", "half_and_half under a KL budget; near SIMPLEMIX, arXiv 2505.02363",
        "½ DPO on the given pairs + ½ DPO on ranked fresh samples + λ KL(π‖π_ref), λ so that KL "
        "stays at target_kl",
        "half given pairs and half fresh ones, held at a KL budget; ends when the reward no longer "
        "rises", _CONTRAST,
        _term(_PAIRS, _GIVEN, o.dpo, beta=0.1, weight=0.5, share=0.5),
        _term(_ONCE, _RANKED, o.dpo, beta=0.1, weight=0.5, share=0.5),
        _term(_ONCE, Unlabelled(), o.reverse_kl, weight=Times(0.05, "beta"), share=0.5),
        target_kl=10.0, patience=3,
    ),
    _row(
        "reward", "Ouyang et al. 2022, arXiv 2203.02155 equation 1",
        "−log σ(r(x, y_w) − r(x, y_l))",
        "train a Bradley-Terry reward model on the given pairs", 1e-5,
        _term(_PAIRS, _GIVEN, o.bradley_terry),
    ),
)  # fmt: skip

_OTHERS = {
    "hypo": "Not Hybrid-DPO (arXiv 2602.11902), also called HyPO, nor HPO (arXiv 2405.17956).",
    "best_of_n": "Not inference-time best-of-n, which trains nothing.",
    "reward": "A model of the reward, not a policy.",
    "grpo": "The mean is over the round's tokens, as in DAPO (arXiv 2503.14476), not over each "
    "response first; the k3 of the paper has not the gradient of KL(π‖π_ref).",
    "ppo": "The KL is in the reward. OpenAI's later PPO without KL is kl: 0.",
    "cpo": "Not Constrained Policy Optimization (arXiv 1705.10528).",
    "xpo": "Exploratory Preference Optimization.",
    "dpop": "Also called Smaug or DPO-Positive.",
    "wpo": "Weighted Preference Optimization, not the Wasserstein one.",
}
"""Names that collide with others' papers, told apart."""


def table() -> Mapping[str, Method]:
    """Every named method, in the order of the table."""
    rows = (*_PAPERS, *_BEYOND)
    return {row.name: replace(row, note=_OTHERS.get(row.name, "")) for row in rows}


def get(name: str) -> Method:
    """The row of that name.

    Raises:
        UserError: no such row; the nearest name is offered.
    """
    rows = table()
    if name not in rows:
        raise UserError(
            f"method '{name}' is unknown.{nearest(name, rows)} Methods: {', '.join(rows)}."
        )
    return rows[name]
