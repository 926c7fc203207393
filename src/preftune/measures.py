"""Metrics of an update, taken from the tensors that it computes anyway.

`DOCUMENTED` is the one list of their names; docs/metrics.md is made from it.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preftune.labellers.base import KL_SCALE, log_ratio
from preftune.numerics import masked_sum
from preftune.rounds import PART, Group
from preftune.samples import Batch, Samples
from preftune.terms import gather

DOCUMENTED = {
    "loss": "sum over terms of weight x mean loss; null if no item remained (all tied)",
    "loss_I": "mean loss of term I before its weight (rows of several terms)",
    "learning_rate": "rate of this update",
    "grad_norm": "norm of the whole gradient before clipping",
    "seconds": "time in updates so far (sampling and scoring included, evaluation not)",
    "pairs": "pairs that remained after ties (rows with pairs)",
    "tied": "pairs masked because their rewards differ by no more than the threshold",
    "log_ratio_chosen": "mean log(policy / reference) of chosen responses, nats",
    "log_ratio_rejected": "the same of rejected responses, nats",
    "margin": "chosen less rejected, of the log-ratio, the log-prob or the score",
    "accuracy": "share of pairs with a margin above 0 (ties half)",
    "logp_chosen": "mean log-prob of chosen responses, nats, where the row needs no reference",
    "logp_rejected": "the same of rejected responses, nats",
    "score_chosen": "mean score of chosen responses (the row that trains a reward model)",
    "score_rejected": "the same of rejected responses",
    "logp": "mean log-prob of the trained responses, nats (rows without pairs)",
    "kl": "mean log(policy / reference) of the minibatch's fresh samples at collection, nats",
    "reward": "mean reward of the minibatch's sampled responses",
    "reward:NAME": "mean of one of several rewards, before its weight",
    "round_items": "items (pairs, responses, groups) of a round of fresh samples",
    "updates_a_round": "updates of a round: the last one's staleness is one less",
    "length": "mean response tokens of the minibatch's sampled responses, end token included",
    "no_end": "share of sampled responses that were cut before an end token",
    "staleness": "optimizer steps since these samples were drawn",
    "ratio_mean": "mean over tokens of policy now / policy at collection",
    "ratio_max": "the largest of these",
    "effective_sample_size": "(sum w)^2 / (n sum w^2) of the responses' ratios w, 0 to 1",
    "clip_fraction": "share of tokens whose ratio is outside 1 - clip to 1 + clip",
    "explained_variance": "1 - Var(target - value) / Var(target) of the value head at collection",
    "skipped": "1: the update was left out, its mean ratio was above max_ratio",
    "kl_coefficient": "strength of the KL as target_kl has set it",
    "reward_queries": "responses that the reward was asked about so far",
    "sampler_gap": "mean |log-prob by sampler - by trainer| of a response, nats, at staleness 0",
    "eval_reward": "mean reward of samples on held-out prompts (with _low, _high: 95 % interval)",
    "eval_kl": "KL(policy || reference) on held-out prompts, exact at each step of a sample, nats",
    "eval_win_rate": "share of held-out prompts won against the reference's sample (ties half)",
    "eval_length": "mean response tokens on held-out prompts, end token not counted",
    "eval_no_end": "share of held-out samples that were cut",
}


class Measures:
    """Weighted means over the micro-batches of one update, and what needs the whole of it."""

    def __init__(self) -> None:
        self._sum: dict[str, float] = defaultdict(float)
        self._weight: dict[str, float] = defaultdict(float)
        self._plain: dict[str, float] = {}
        self._all: dict[str, list[Tensor]] = defaultdict(list)
        self._skip_above: float | None = None

    def add(self, name: str, values: Tensor, keep: Tensor | None = None) -> None:
        """Take `values` (where `keep`) into the mean of that name."""
        values = values.detach().double()
        if keep is not None:
            values = values[keep.expand(values.shape)]
        self._sum[name] += float(values.sum())
        self._weight[name] += values.numel()

    def count(self, name: str, number: float) -> None:
        """Add to the total of that name."""
        self._plain[name] = self._plain.get(name, 0) + number

    def minibatch(
        self, group: Group, samples: Samples, labelled: list[Batch], version: int
    ) -> None:
        """What is known before the forward pass."""
        if samples.reward is not None:
            self.add("reward", samples.reward)
        for name, part in samples.extra.items():
            if name.startswith(PART):
                self.add(name, part)
        for batch in labelled:
            if batch.roles:
                items = batch.index.shape[:-1].numel()
                kept = items if batch.keep is None else int(batch.keep.sum())
                self.count("pairs", kept)
                if "reward" in group.needs:
                    self.count("tied", items - kept)
        for term, state in zip(group.terms, group.states, strict=True):
            if KL_SCALE in state and term.kl_coefficient:
                self.add("kl_coefficient", term.kl_coefficient * state[KL_SCALE])
        if group.source.on_policy:
            self._fresh(group, samples, version)
        ratios = [t.max_ratio for t in group.terms if t.max_ratio is not None]
        self._skip_above = min(
            [*ratios, *([self._skip_above] if self._skip_above else [])], default=None
        )

    def _fresh(self, group: Group, samples: Samples, version: int) -> None:
        """Of the policy's own samples."""
        assert group.round is not None, "a minibatch is of a round"
        whole = group.round.samples
        items = max(t.labeller.items(whole.tokens.shape[-2]) for t in group.terms)
        self._plain["round_items"] = whole.row.shape[-1] * items
        self._plain["updates_a_round"] = len(group.round.minibatches)
        fresh = samples.origin >= 0  # a pool also holds others
        self.add("length", samples.lengths(), fresh)
        self.add("no_end", ~samples.finished, fresh)
        self.add("staleness", version - samples.origin, fresh)
        if group.round.trained_logp and samples.ref_logp is not None:
            # of all samples: those that a labeller picks by their reward give no KL
            self.add("kl", log_ratio(samples), fresh)
        if group.round.sampler_gap is not None and self._sum["staleness"] == 0:
            self._plain["sampler_gap"] = group.round.sampler_gap

    def outputs(self, group: Group, samples: Samples, now: Mapping[str, Tensor]) -> None:
        """What the forward pass of a micro-batch shows of the policy on a source's samples."""
        if "logp" not in now or samples.logp is None or not group.source.on_policy:
            return
        assert group.round is not None, "a minibatch is of a round"
        fresh, logp = samples.origin >= 0, now["logp"].detach()
        moved = torch.where(samples.mask, logp - samples.logp.to(logp), 0.0)
        if self._sum["staleness"] == 0 and group.round.sampler_gap is None:
            self.add("sampler_gap", moved.sum(-1).abs(), fresh)
        if not group.round.trained_logp:
            return
        self._all["moved"].append(moved.sum(-1)[fresh])
        self._all["token_moved"].append(moved[samples.mask & fresh.unsqueeze(-1)])

    def term(
        self,
        group: Group,
        i: int,
        samples: Samples,
        batch: Batch,
        arguments: Mapping[str, Any],
        mean: Tensor,
    ) -> None:
        """What the forward pass of a micro-batch shows of the group's term i."""
        term = group.terms[i]
        self.count(f"loss_{group.places[i]}", float(mean.detach().mean()))
        mask = gather(samples.mask, batch.index, True) if term.level == "token" else None
        if "value_old" in arguments:
            for name in ("target", "value_old"):
                self._all[name].append(arguments[name].detach().double()[mask])
        if "logp_old" in arguments and "clip" in arguments:
            ratio = (arguments["logp"] - arguments["logp_old"]).detach().exp()
            outside = (ratio - 1).abs() > arguments["clip"]
            self.add("clip_fraction", outside, mask)
        if set(batch.roles) == {"chosen", "rejected"}:
            self._pairs(batch, arguments)
        elif term.labeller.labelled and "logp" in arguments:
            logp = arguments["logp"].detach()
            logp = logp if mask is None else masked_sum(logp, mask)
            self.add("logp", logp, None if batch.keep is None else batch.keep.unsqueeze(-1))

    def _pairs(self, batch: Batch, arguments: Mapping[str, Any]) -> None:
        """What the term's own arguments say of its pairs, in their unit (sum or mean of tokens)."""
        base = "score" if "score_chosen" in arguments else "logp"
        shown = {
            r: arguments[f"{base}_{r}"].detach() for r in batch.roles if f"{base}_{r}" in arguments
        }
        name = base
        if "ref_logp_chosen" in arguments:
            shown = {r: x - arguments[f"ref_logp_{r}"] for r, x in shown.items()}
            name = "log_ratio"
        for role, values in shown.items():
            self.add(f"{name}_{role}", values, batch.keep)
        if len(shown) == 2:
            margin = shown["chosen"] - shown["rejected"]
            self.add("margin", margin, batch.keep)
            self.add("accuracy", 0.5 * (1 + torch.sign(margin)), batch.keep)

    def result(self) -> dict[str, Any]:
        """The figures, by name."""
        means = {n: self._sum[n] / self._weight[n] for n in self._sum if self._weight[n]}
        losses = [n for n in self._plain if n.startswith("loss_")]
        plain = {n: v for n, v in self._plain.items() if n not in losses or len(losses) > 1}
        out: dict[str, Any] = {**plain, **means, **self._ratios()}
        if self._all["target"]:
            target, value = (torch.cat(self._all[n]) for n in ("target", "value_old"))
            spread = target.var(correction=0)
            left = (target - value).var(correction=0)
            out["explained_variance"] = float(1 - left / spread) if spread > 0 else None
        if self._skip_above is not None:
            out["skipped"] = int(out.get("ratio_mean", 1.0) > self._skip_above)
        return out

    def _ratios(self) -> dict[str, float]:
        """How far the policy has moved from the one that drew the samples."""
        moved = [x for x in self._all["moved"] if x.numel()]
        if not moved:
            return {}
        sequences = torch.cat(moved).double()
        tokens = torch.cat(self._all["token_moved"]).double()
        weight = (sequences - sequences.max()).exp()
        size = float(weight.sum().square() / weight.square().sum() / len(weight))
        return {
            "ratio_mean": float(tokens.clamp(max=80.0).exp().mean()),
            "ratio_max": float(tokens.clamp(max=80.0).max().exp()),
            "effective_sample_size": size,
        }
