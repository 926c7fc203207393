"""What a round's samples are taken to say: pairs, the best of N, a baseline, nothing.

A labeller is `(samples, state) -> (batch, state)` over the whole round, already scored; its state
is a plain dict of tensors that the checkpoint saves. Statistics over a batch live here, never in an
objective.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.advantages import gae, leave_one_out, whiten
from preftune.numerics import masked_sum
from preftune.samples import Batch, Samples

__all__ = [
    "Best", "BestWorst", "Demonstration", "GivenPreference", "Labeller", "Unlabelled",
    "gae", "leave_one_out", "whiten",
]  # fmt: skip

State = dict[str, Tensor]


@runtime_checkable
class Labeller(Protocol):
    """Frozen; sees a whole scored round."""

    @property
    def needs(self) -> frozenset[str]:
        """What the round must be scored with: a subset of logp, ref_logp, value, reward."""
        ...

    @property
    def labelled(self) -> bool:
        """It uses a judgement (False: the samples alone)."""
        ...

    @property
    def given(self) -> int:
        """Responses a prompt that the data must hold for it (0: any source will do)."""
        ...

    @property
    def least(self) -> int:
        """Fewest responses a prompt that it can work with."""
        ...

    def items(self, num_responses: int) -> int:
        """Q: items it makes of a prompt's K responses, known before sampling."""
        ...

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]: ...

    def signals(self) -> dict[str, list[float]]:
        """Admissible values of its data: from them the axes of a row are computed."""
        ...


def _index(samples: Samples, places: list[int]) -> Tensor:
    """One item a prompt that points at the given responses: [*R, N, 1, A]."""
    return torch.tensor(places).expand(*samples.row.shape, 1, len(places))


def log_ratio(samples: Samples) -> Tensor:
    """log policy - log reference of each response at collection, [*R, N, K], nats."""
    assert samples.logp is not None and samples.ref_logp is not None, "the round was not scored"
    return masked_sum(samples.logp - samples.ref_logp, samples.mask)


def _shaped(samples: Samples, kl: float) -> Tensor:
    """reward - kl * log-ratio, [*R, N, K]: the KL-regularised reward of a response."""
    assert samples.reward is not None, "the round has no rewards"
    return samples.reward - kl * log_ratio(samples) if kl else samples.reward


def _reward_needs(kl: float) -> frozenset[str]:
    return frozenset({"reward", "logp", "ref_logp"} if kl else {"reward"})


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The first response is to be imitated."""

    needs = frozenset[str]()
    labelled = True
    given = 1
    least = 1

    def items(self, num_responses: int) -> int:
        """One."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        return Batch(index=_index(samples, [0])), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class GivenPreference:
    """The data's own preference: response 0 over response 1.

    A soft label in the data (`probability` that the chosen is the better one) becomes that pair's
    label smoothing.
    """

    needs = frozenset[str]()
    labelled = True
    given = 2
    least = 2

    def items(self, num_responses: int) -> int:
        """One pair."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        data = {}
        if "probability" in samples.extra:
            sure = samples.extra["probability"].nan_to_num(nan=1.0)
            data["label_smoothing"] = (1 - sure).unsqueeze(-1)
        batch = Batch(index=_index(samples, [0, 1]), roles=("chosen", "rejected"), data=data)
        return batch, state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class BestWorst:
    """The best and the worst of K by reward, as a pair; a tie is masked."""

    threshold: float = 0.0
    """A pair counts if its rewards differ by more than this."""
    kl: float = 0.0
    """Strength of KL in the reward (rank by reward - kl * log-ratio)."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return _reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """One pair."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward = _shaped(samples, self.kl)
        best, worst = reward.max(-1), reward.min(-1)
        index = torch.stack([best.indices, worst.indices], -1).unsqueeze(-2)
        keep = (best.values - worst.values > self.threshold).unsqueeze(-1)
        return Batch(index=index, roles=("chosen", "rejected"), keep=keep), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of N by reward; of equals the first."""

    kl: float = 0.0
    """Strength of KL in the reward (rank by reward - kl * log-ratio)."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return _reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """One response."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        best = _shaped(samples, self.kl).argmax(-1)
        return Batch(index=best[..., None, None]), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """The samples alone, a prompt's K as one item; for terms such as the reverse KL.

    The baseline of a sample is the mean log-ratio of the prompt's *other* samples: with the sample
    itself in the mean, the gradient would be scaled by (K - 1) / K.
    """

    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    labelled = False
    given = 0
    least = 1

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return frozenset({"logp", "ref_logp"} if self.baseline == "leave_one_out" else ())

    def items(self, num_responses: int) -> int:
        """One: the group."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        num_responses = samples.tokens.shape[-2]
        data = {}
        if self.baseline == "leave_one_out" and num_responses > 1:
            data["baseline"] = leave_one_out(log_ratio(samples)).unsqueeze(-2)
        return Batch(index=_index(samples, list(range(num_responses))), data=data), state

    def signals(self) -> dict[str, list[float]]:
        """A baseline of either sign."""
        return {"baseline": [-1.0, 0.0, 1.0]} if self.baseline == "leave_one_out" else {}
