"""Metrics of an update, taken from the tensors that it computes anyway.

`DOCUMENTED` is the one list of their names; docs/metrics.md is made from it.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from preftune.numerics import masked_sum
from preftune.rounds import Group
from preftune.samples import Batch, Samples
from preftune.terms import Term

DOCUMENTED = {
    "loss": "sum over terms of weight x mean loss; null if no item remained (all tied)",
    "loss_I": "mean loss of term I before its weight (rows of several terms)",
    "learning_rate": "rate of this update",
    "grad_norm": "norm of the whole gradient before clipping",
    "seconds": "time in updates so far (sampling and scoring included, evaluation not)",
    "pairs": "pairs that remained after ties (rows with pairs)",
    "log_ratio_chosen": "mean log(policy / reference) of chosen responses, nats",
    "log_ratio_rejected": "the same of rejected responses, nats",
    "margin": "log_ratio_chosen - log_ratio_rejected, nats",
    "accuracy": "share of pairs whose chosen response has the larger log-ratio (ties half)",
    "logp_chosen": "mean log-prob of chosen responses, nats, where the row needs no reference",
    "logp": "mean log-prob of the trained responses, nats (rows without pairs)",
    "kl": "mean log(policy / reference) of the minibatch's fresh samples: a sampled KL, nats",
    "reward": "mean reward of the minibatch's sampled responses",
    "length": "mean response tokens of the minibatch's sampled responses, end token included",
    "no_end": "share of sampled responses that were cut before an end token",
    "staleness": "optimizer steps since these samples were drawn",
    "sampler_gap": "mean |log-prob by sampler - by trainer| of a response, nats, at staleness 0",
    "eval_reward": "mean reward of samples on held-out prompts (with _low, _high: 95 % interval)",
    "eval_kl": "KL(policy || reference) on held-out prompts, exact at each step of a sample, nats",
    "eval_win_rate": "share of held-out prompts won against the reference's sample (ties half)",
    "eval_length": "mean response tokens on held-out prompts, end token not counted",
    "eval_no_end": "share of held-out samples that were cut",
}


class Measures:
    """Weighted means over the micro-batches of one update."""

    def __init__(self) -> None:
        self._sum: dict[str, float] = defaultdict(float)
        self._weight: dict[str, float] = defaultdict(float)
        self._plain: dict[str, float] = {}

    def add(self, name: str, values: Tensor, keep: Tensor | None = None) -> None:
        """Take `values` (where `keep`) into the mean of that name."""
        values = values.detach().double()
        if keep is not None:
            values = values[keep.expand(values.shape)]
        self._sum[name] += float(values.sum())
        self._weight[name] += values.numel()

    def minibatch(
        self, group: Group, samples: Samples, labelled: list[Batch], version: int
    ) -> None:
        """What is known before the forward pass."""
        if samples.reward is not None:
            self.add("reward", samples.reward)
        for batch in labelled:
            if batch.roles:
                kept = (
                    batch.index.shape[:-1].numel() if batch.keep is None else int(batch.keep.sum())
                )
                self._plain["pairs"] = self._plain.get("pairs", 0) + kept
        if group.source.on_policy:
            self.add("length", samples.lengths())
            self.add("no_end", ~samples.finished)
            self.add("staleness", version - samples.origin)

    def term(
        self, place: int, term: Term, samples: Samples, batch: Batch, logp: Tensor, mean: Tensor
    ) -> None:
        """What the forward pass of a micro-batch shows of a term."""
        self._plain[f"loss_{place}"] = self._plain.get(f"loss_{place}", 0.0) + float(
            mean.detach().mean()
        )
        total = masked_sum(logp.detach(), samples.mask)
        if samples.logp is not None and term.source.on_policy and self._fresh():
            self.add(
                "sampler_gap", (masked_sum(samples.logp.to(total), samples.mask) - total).abs()
            )
        ratio = None
        if samples.ref_logp is not None:
            ratio = total - masked_sum(samples.ref_logp.to(total), samples.mask)
            if term.source.on_policy:
                self.add("kl", ratio)
        if batch.roles:
            self._pairs(batch, ratio, total)
        elif term.labeller.labelled:
            self.add("logp", _of(total, batch, 0))

    def _fresh(self) -> bool:
        return self._sum["staleness"] == 0

    def _pairs(self, batch: Batch, ratio: Tensor | None, total: Tensor) -> None:
        shown, name = (total, "logp") if ratio is None else (ratio, "log_ratio")
        by_role = {role: _of(shown, batch, a) for a, role in enumerate(batch.roles)}
        for role, values in by_role.items():
            self.add(f"{name}_{role}", values, batch.keep)
        if ratio is not None and set(by_role) == {"chosen", "rejected"}:
            margin = by_role["chosen"] - by_role["rejected"]
            self.add("margin", margin, batch.keep)
            self.add("accuracy", 0.5 * (1 + torch.sign(margin)), batch.keep)

    def result(self) -> dict[str, Any]:
        """The means, by name."""
        means = {n: self._sum[n] / self._weight[n] for n in self._sum if self._weight[n]}
        losses = [n for n in self._plain if n.startswith("loss_")]
        plain = {n: v for n, v in self._plain.items() if n not in losses or len(losses) > 1}
        return {**plain, **means}


def _of(x: Tensor, batch: Batch, place: int) -> Tensor:
    """x [*R, n, K] at the item's response `place`: [*R, n, Q]."""
    return x.gather(-1, batch.index[..., place])
