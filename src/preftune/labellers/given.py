"""Labels that the data bring, and samples without a label."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from preftune.advantages import leave_one_out
from preftune.labellers.base import State, index_of, log_ratio
from preftune.samples import DATA, REFERENCE, Batch, Samples
from preftune.sources import good


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The first response is to be imitated."""

    needs = frozenset[str]()
    labelled = True
    given = 1
    least = most = 1

    def items(self, num_responses: int) -> int:
        """One."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        return Batch(index=index_of(samples, [0])), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Good:
    """Only responses labelled good are kept: the chosen of a pair, or those whose `label` says so
    (binary feedback)."""

    needs = frozenset[str]()
    labelled = True
    given = 1
    least = most = 1

    def items(self, num_responses: int) -> int:
        """One."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        keep = good(samples)[..., :1]
        return Batch(index=index_of(samples, [0]), keep=keep), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Each response good or bad, with the KL that KTO measures its gain against.

    The source's last response is a mismatched one: from it comes the KL, max(0, mean log-ratio over
    the round), and it is not trained (arXiv 2402.01306, equation 8 and section 4.1).
    """

    needs = frozenset({"logp", "ref_logp"})
    labelled = True
    given = 1
    least = 2

    def items(self, num_responses: int) -> int:
        """One a response, the mismatched one left out."""
        return num_responses - 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        count = samples.tokens.shape[-2] - 1
        own = torch.arange(count)
        label = good(samples.at(own.expand(*samples.row.shape, count)))
        kl = log_ratio(samples)[..., -1].mean(-1).clamp(min=0.0)  # [*R]
        wide = kl[..., None, None].expand(label.shape)
        data = {"label": label.unsqueeze(-1).to(kl), "kl": wide.unsqueeze(-1)}
        index = own.unsqueeze(-1).expand(*samples.row.shape, count, 1)
        return Batch(index=index, data=data), state

    def signals(self) -> dict[str, list[float]]:
        """Good or bad."""
        return {"label": [0.0, 1.0], "kl": [0.0]}


@dataclass(frozen=True, kw_only=True)
class GivenPreference:
    """The data's own preference: response 0 over response 1.

    A soft label in the data (`probability` that the chosen is the better one) becomes that pair's
    label smoothing, and a `margin` that of an objective which takes one.
    """

    margin: Literal["data", "none"] = "data"
    """none: the data's column of that name means something else."""
    needs = frozenset[str]()
    labelled = True
    given = 2
    least = most = 2

    def items(self, num_responses: int) -> int:
        """One pair."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        data = {}
        if "probability" in samples.extra:
            # NaN, where a row has none: the objective's own setting
            data["label_smoothing"] = (1 - samples.extra["probability"]).unsqueeze(-1)
        if self.margin == "data" and "margin" in samples.extra:
            data["margin"] = samples.extra["margin"].nan_to_num(nan=0.0).unsqueeze(-1)
        batch = Batch(index=index_of(samples, [0, 1]), roles=("chosen", "rejected"), data=data)
        return batch, state

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
    """Taken off each sample's log-ratio: the mean of the prompt's others, or nothing."""
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
        data: dict[str, Tensor] = {}
        if self.baseline == "leave_one_out" and num_responses > 1:
            data["baseline"] = leave_one_out(log_ratio(samples)).unsqueeze(-2)
        return Batch(index=index_of(samples, list(range(num_responses))), data=data), state

    def signals(self) -> dict[str, list[float]]:
        """A baseline of either sign."""
        return {"baseline": [-1.0, 0.0, 1.0]} if self.baseline == "leave_one_out" else {}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One response (of a pool's), told by its origin or its place, without a judgement of it."""

    origin: Literal["policy", "reference", "data"] | None = None
    """Whose: a sample of the policy, one of the reference, or the data's; None: any."""
    place: int = 0
    """Among the prompt's responses of that origin, from 0."""
    needs = frozenset[str]()
    labelled = False
    given = 0

    @property
    def least(self) -> int:
        """See `Labeller.least`."""
        return self.place + 1

    def items(self, num_responses: int) -> int:
        """One."""
        return 1

    def is_at(self, origin: Int[Tensor, "*E K"]) -> Bool[Tensor, "*E K"]:
        """Which of responses with these origins it is: one of them, or none."""
        alike = torch.ones_like(origin, dtype=torch.bool)
        if self.origin is not None:
            version = {"policy": 0, "reference": REFERENCE, "data": DATA}[self.origin]
            alike = origin.clamp(max=0) == version
        return alike & (alike.cumsum(-1) == self.place + 1)

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        found = self.is_at(samples.origin)
        assert bool(found.any(-1).all()), "no such response: see `method_checks`"
        return Batch(index=found.long().argmax(-1)[..., None, None]), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}
