"""Where the data's responses stand among the reference's own samples, by likelihood or by reward.

N prompts with one pair each (of several pairs of a prompt take one), m reference samples a prompt.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.estimators.estimate import Estimate, cannot_tell, mean, share
from preftune.figures import wins

LEAST_MATCHES = 4
"""Samples of a like length that a prompt needs."""
LEAST_PROMPTS = 10
"""Prompts with so many of them that an estimate needs; half of all prompts as well."""


@dataclass(frozen=True, kw_only=True)
class PairAccuracy:
    """How far the reference already orders the pairs as the labels do."""

    accuracy: Estimate
    """P[s(chosen) > s(rejected)], ties ½."""
    margin: Estimate
    """Mean of s(chosen) − s(rejected), nats."""


def reference_pair_accuracy(
    chosen_ref_logp: Float[Tensor, " N"], rejected_ref_logp: Float[Tensor, " N"], seed: int = 0
) -> PairAccuracy:
    """Share of pairs whose chosen response is the likelier under the reference.

    P[s(y⁺) > s(y⁻)] + ½ P[s(y⁺) = s(y⁻)],  s = log π_ref(y | x), summed over tokens

    Args:
        chosen_ref_logp: [N], nats.
        rejected_ref_logp: [N], nats.
    """
    won = wins(chosen_ref_logp, rejected_ref_logp)
    margin = chosen_ref_logp.double() - rejected_ref_logp.double()
    return PairAccuracy(accuracy=share(won[:, None], seed), margin=mean(margin[:, None], seed))


@dataclass(frozen=True, kw_only=True)
class PitRanks:
    """Ranks of given responses among the reference's samples."""

    rank: Float[Tensor, " N"]
    """In [0, 1), uniform if the response is one more sample; NaN where a prompt is left out."""
    lowest: Estimate
    """Share in the lowest bin: stranger than (nearly) all samples."""
    highest: Estimate
    """Share in the highest bin: greedy or low-temperature text."""
    null: float
    """What either share is if the responses are the reference's own samples."""


def pit(
    logp: Float[Tensor, " N"],
    sample_logp: Float[Tensor, "N m"],
    u: Float[Tensor, " N"],
    keep: Bool[Tensor, "N m"] | None = None,
    same: Bool[Tensor, "N m"] | None = None,
) -> Float[Tensor, " N"]:
    """Randomised rank of a response among samples.

    (#{s_j < s} + U (1 + #{s_j = s})) / (m + 1)

    Exactly uniform on [0, 1) under exchangeability, with ties too: the response is equally likely
    at each of the 1 + ties places that it shares with them.

    Args:
        logp: [N], s, nats.
        sample_logp: [N, m], s_j, nats.
        u: [N], uniform in [0, 1).
        keep: [N, m], samples that count; all of them without it.
        same: [N, m], samples whose tokens are the response's: they tie, though log-probs of two
            forward passes differ in their last digits. None without it.
    """
    keep = torch.ones_like(sample_logp, dtype=torch.bool) if keep is None else keep
    s, others = logp.double()[:, None], sample_logp.double()
    alike = others == s if same is None else (others == s) | same
    less = ((others < s) & ~alike & keep).sum(-1)
    ties = (alike & keep).sum(-1)
    return (less + u.double() * (ties + 1)) / (keep.sum(-1) + 1)


def pit_ranks(
    logp: Float[Tensor, " N"],
    sample_logp: Float[Tensor, "N m"],
    u: Float[Tensor, " N"],
    seed: int = 0,
    same: Bool[Tensor, "N m"] | None = None,
) -> PitRanks:
    """Rank of a response's reference log-prob among m reference samples to its prompt.

    Bins are 1 / (m + 1) wide. Log-probs fall with length, so that long responses rank low whatever
    they say: compare `length_matched_ranks`, or prefer `surprisal`.

    Args: as `pit`, log-probs under the reference.
    """
    rank = pit(logp, sample_logp, u, same=same)
    return _shares(rank, 1 / (sample_logp.shape[-1] + 1), seed)


def length_matched_ranks(
    logp: Float[Tensor, " N"],
    length: Int[Tensor, " N"],
    sample_logp: Float[Tensor, "N m"],
    sample_length: Int[Tensor, "N m"],
    u: Float[Tensor, " N"],
    factor: float = 1.25,
    least: int = LEAST_MATCHES,
    seed: int = 0,
    same: Bool[Tensor, "N m"] | None = None,
) -> PitRanks:
    """`pit_ranks` among the samples whose length is within a factor of the response's.

    Prompts with fewer than `least` such samples are left out, and bins are 1 / (least + 1) wide.
    Only nearly uniform for own samples: the response stands in the middle of its window, so that
    both ends are a little rarer than the null if s follows the length closely.

    Args:
        logp, sample_logp, u, same: as `pit`.
        length, sample_length: tokens, ≥ 1.
        factor: > 1.

    Returns:
        not trusted where under half of the prompts, or under `LEAST_PROMPTS`, have such samples.
    """
    apart = (sample_length.double().log() - length.double().log()[:, None]).abs()
    keep = apart <= math.log(factor) + 1e-12
    enough = keep.sum(-1) >= least
    rank = pit(logp, sample_logp, u, keep, same).where(enough, torch.nan)
    found, null = int(enough.sum()), 1 / (least + 1)
    if found < max(LEAST_PROMPTS, len(rank) / 2):
        why = cannot_tell(
            f"cannot tell with {sample_logp.shape[-1]} samples: {found} of {len(rank)} prompts "
            f"have {least} within a factor {factor:g} of the response's length"
        )
        return PitRanks(rank=rank, lowest=why, highest=why, null=null)
    return _shares(rank, null, seed, f"{found} of {len(rank)} prompts")


def _shares(rank: Float[Tensor, " N"], null: float, seed: int, note: str = "") -> PitRanks:
    known = rank[~rank.isnan()][:, None]
    return PitRanks(
        rank=rank,
        lowest=share((known < null).double(), seed, note),
        highest=share((known >= 1 - null).double(), seed, note),
        null=null,
    )


@dataclass(frozen=True, kw_only=True)
class RewardQuantiles:
    """How often the reference does as well as the data's responses."""

    chosen: Estimate
    """q_w = P[r(y) ≥ r(chosen)] over y ∼ π_ref."""
    rejected: Estimate
    """q_l = P[r(y) ≥ r(rejected)]."""


def reward_quantiles(
    sample_reward: Float[Tensor, "N m"],
    chosen_reward: Float[Tensor, " N"],
    rejected_reward: Float[Tensor, " N"],
    seed: int = 0,
) -> RewardQuantiles:
    """Share of reference samples that reach the reward of the chosen, and of the rejected.

    q = E_x P_{y∼π_ref(·|x)}[r(x, y) ≥ r(x, y_D)]

    Both small: the data are above what the reference says. q_w above ½: it beats the chosen.

    Args:
        sample_reward: [N, m], of reference samples to the same prompts.
        chosen_reward, rejected_reward: [N], by the same reward.
    """

    def reached(level: Tensor) -> Estimate:
        return share((sample_reward >= level[:, None]).double(), seed)

    return RewardQuantiles(chosen=reached(chosen_reward), rejected=reached(rejected_reward))


def best_of_n_reach(
    sample_reward: Float[Tensor, "N m"], chosen_reward: Float[Tensor, " N"], seed: int = 0
) -> tuple[Estimate, ...]:
    """Share of prompts whose best of n reference samples reaches the chosen response's reward.

    P_n = E_x[1 − C(m − c, n) / C(m, n)],  c = #{j: r_j ≥ r(chosen)},  n = 1 … m

    Without bias: the mean over all subsets of n of the m samples. P_1 is q_w.

    Args:
        sample_reward: [N, m], of reference samples to the same prompts.
        chosen_reward: [N], by the same reward.

    Returns:
        one estimate for each n, in order.
    """
    m = sample_reward.shape[-1]
    reached = (sample_reward >= chosen_reward[:, None]).sum(-1)
    table = torch.tensor(
        [
            [1 - math.comb(m - c, n) / math.comb(m, n) for n in range(1, m + 1)]
            for c in range(m + 1)
        ],
        dtype=torch.float64,
    )
    by_prompt = table[reached.cpu()]
    return tuple(share(by_prompt[:, [i]], seed) for i in range(m))
