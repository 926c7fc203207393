"""What a round's samples are taken to say: pairs, the best of N, weights, advantages, nothing."""

from preftune.advantages import gae, leave_one_out, whiten
from preftune.labellers.base import Labeller, Shaping, State
from preftune.labellers.given import (
    Demonstration,
    Feedback,
    GivenPreference,
    Good,
    Member,
    Unlabelled,
)
from preftune.labellers.ranked import AllPairs, Best, BestWorst, RandomPair
from preftune.labellers.weighted import Advantage, RewardWeights

__all__ = [
    "Advantage", "AllPairs", "Best", "BestWorst", "Demonstration", "Feedback", "GivenPreference",
    "Good", "Labeller", "Member", "RandomPair", "RewardWeights", "Shaping", "State", "Unlabelled",
    "gae", "leave_one_out", "whiten",
]  # fmt: skip
