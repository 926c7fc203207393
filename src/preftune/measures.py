"""Metrics of an update, taken from the tensors that it computes anyway: one number, or one a run.

`DOCUMENTED` is the one list of their names; docs/metrics.md is made from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preftune import informative
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
    "seconds_prefill": "of this update: prompts through the sampler",
    "seconds_decode": "of this update: sampling one token after another",
    "seconds_score": "of this update: log-probs and values of fresh samples and of the reference",
    "seconds_reward": "of this update: in the reward",
    "seconds_train": "of this update: forward, backward and optimizer",
    "seconds_sync": "of this update: weights to the engine that samples (sampler)",
    "seconds_idle": "of this update: all else",
    "tokens_per_second_decode": "sampled tokens, over prefill and decode",
    "tokens_per_second_train": "tokens of responses and of prompts (each once), over training",
    "pairs": "pairs that remained after ties (rows with pairs)",
    "tied": "pairs masked because their rewards differ by no more than the threshold",
    "log_ratio_chosen": "mean log(policy / reference) of chosen responses, nats",
    "log_ratio_rejected": "the same of rejected responses, nats",
    "margin": "chosen less rejected, of the log-ratio, the log-prob or the score",
    "accuracy": "share of pairs with a margin above 0 (ties half)",
    "informative_pairs": "share of pairs that are none of the next three",
    "settled_pairs": "share of pairs whose rejected response the loss pushes down by less than a "
    "tenth of what it would at margin 0",
    "unlikely_pairs": "share whose rejected response has less than 1 % a token (geometric mean) "
    "under the policy",
    "alike_pairs": "share whose responses begin alike for nine tenths of the longer",
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
    "entropy": "mean -log-prob of a token of these samples at collection, nats (of samples at "
    "temperature 1: the policy's entropy)",
    "ended": "of the last row of a run that ended before its last step: plateau (patience), "
    "data (no more rows came: follow)",
    "distinct_samples": "different responses among a prompt's fresh samples: 0 all the same, 1 no "
    "two are",
    "updates_not_finite": "updates left out so far, not being finite (max_skipped)",
    "ratio_mean": "mean over tokens of policy now / policy at collection",
    "ratio_max": "the largest of these",
    "effective_sample_size": "(sum w)^2 / (n sum w^2) of the responses' ratios w, 0 to 1",
    "clip_fraction": "share of tokens whose ratio is outside 1 - clip to 1 + clip",
    "explained_variance": "1 - Var(target - value) / Var(target) of the value head at collection",
    "value_offset": "|mean of target - value| / deviation of the target, of the value head at "
    "collection: how far it is off as a whole",
    "skipped": "1: the update was left out, its mean ratio was above max_ratio",
    "kl_coefficient": "strength of the KL as target_kl has set it",
    "reward_queries": "responses that the reward was asked about so far",
    "sampler_gap": "mean |log-prob by trainer - by sampler| of a response, nats, as its round "
    "begins",
    "sampler_gap_max": "the largest of these",
    "sampler_effective_sample_size": "(sum w)^2 / (n sum w^2) of the round's responses, w = "
    "probability by trainer / by sampler: 1 where they agree",
    "eval_reward": "mean reward of samples on held-out prompts (with _low, _high: 95 % interval)",
    "eval_kl": "KL(policy || reference) on held-out prompts, exact at each step of a sample, nats",
    "eval_win_rate": "share of held-out prompts won against the reference's sample (ties half)",
    "eval_length": "mean response tokens on held-out prompts, end token not counted",
    "eval_no_end": "share of held-out samples that were cut",
}


class Measures:
    """Weighted means over the micro-batches of one update, and what needs the whole of it.

    Every figure has the batch shape of the policy: a study of R runs has R of each.
    """

    def __init__(self, batch_shape: tuple[int, ...] = (), on: bool = True) -> None:
        """
        Args:
            on: False measures nothing (an update that is not logged).
        """
        self.on = on
        self._shape = batch_shape
        self._sum: dict[str, Tensor] = {}
        self._weight: dict[str, Tensor] = {}
        self._plain: dict[str, Any] = {}
        self._all: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._skip_above: float | None = None
        self._stale = False
        """Some sample of the update is older than the policy."""

    def apart(self) -> "Measures":
        """An empty one of the same update, for one process's share of the passes."""
        found = Measures(self._shape, self.on)
        found._stale = self._stale
        return found

    def absorb(self, shares: Iterable["Measures"]) -> None:
        """Take in what was measured apart."""
        for share in shares:
            for name, total in share._sum.items():
                self._sum[name] = self._sum.get(name, 0) + total
                self._weight[name] = self._weight.get(name, 0) + share._weight[name]
            for name, number in share._plain.items():
                self.count(name, number)
            for name, pairs in share._all.items():
                self._all.setdefault(name, []).extend(pairs)

    def _flat(self, values: Tensor) -> Tensor:
        """[*R, m] of anything [*R, ...]; a single number is every run's."""
        if values.ndim < len(self._shape):
            values = values.expand(self._shape)
        return values.reshape(*self._shape, -1)

    def add(self, name: str, values: Tensor, keep: Tensor | None = None) -> None:
        """Take `values` (where `keep`) into the mean of that name."""
        keep = torch.ones_like(values, dtype=torch.bool) if keep is None else keep
        values, keep = self._flat(values.detach().double()), self._flat(keep.expand(values.shape))
        total = masked_sum(values, keep)
        self._sum[name] = self._sum[name] + total if name in self._sum else total
        weight = keep.sum(-1)
        self._weight[name] = self._weight[name] + weight if name in self._weight else weight

    def count(self, name: str, number: float | Tensor) -> None:
        """Add to the total of that name."""
        self._plain[name] = self._plain.get(name, 0) + number

    def _keep_all(self, name: str, values: Tensor, keep: Tensor) -> None:
        """Every value, for what no running sum gives."""
        pair = (self._flat(values.detach().double()), self._flat(keep.expand(values.shape)))
        self._all.setdefault(name, []).append(pair)

    def _joined(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Values [*R, m] that were kept under the name, and which of them count."""
        if name not in self._all:
            return None
        values, keep = zip(*self._all[name], strict=True)
        return torch.cat(values, -1), torch.cat(keep, -1)

    def minibatch(
        self, group: Group, samples: Samples, labelled: list[Batch], version: int
    ) -> None:
        """What is known before the forward pass."""
        if not self.on:
            return
        if samples.reward is not None:
            self.add("reward", samples.reward)
        for name, part in samples.extra.items():
            if name.startswith(PART):
                self.add(name, part, ~part.isnan())  # NaN: this part of the sum left it to others
        for batch in labelled:
            if batch.roles:
                self._count_pairs(batch, "reward" in group.needs)
        for i, (term, state) in enumerate(zip(group.terms, group.states, strict=True)):
            if KL_SCALE in state and term.kl_coefficient:
                now = (
                    group.factor(i) if term.penalises_kl else term.kl_coefficient * state[KL_SCALE]
                )
                self.add("kl_coefficient", torch.as_tensor(now))
        if group.source.on_policy:
            self._fresh(group, samples, version)
        ratios = [t.max_ratio for t in group.terms if t.max_ratio is not None]
        self._skip_above = min(
            [*ratios, *([self._skip_above] if self._skip_above else [])], default=None
        )

    def _count_pairs(self, batch: Batch, ranked: bool) -> None:
        """Pairs kept, and those that tied in a reward."""
        items = batch.index.shape[len(self._shape) : -1].numel()
        kept = torch.full(self._shape, items)
        kept = kept if batch.keep is None else self._flat(batch.keep).sum(-1)
        self.count("pairs", kept)
        if ranked:
            self.count("tied", items - kept)

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
        age = version - samples.origin
        self.add("staleness", age, fresh)
        self._stale |= bool((age[fresh] != 0).any())
        if not self._shape:  # what alarms read is of single runs
            shares = informative.distinct(samples.tokens, samples.mask, fresh)
            self.add("distinct_samples", shares, fresh.sum(-1) > 1)
        if samples.logp is not None:
            self.add("entropy", -samples.logp, samples.mask & fresh.unsqueeze(-1))
        if group.round.trained_logp and samples.ref_logp is not None:
            # of all samples: those that a labeller picks by their reward give no KL
            self.add("kl", log_ratio(samples), fresh)
        if group.round.sampler_gap is not None and group.round.taken == 1:
            self._keep_all("gap", group.round.sampler_gap, whole.origin >= 0)

    def outputs(self, group: Group, samples: Samples, now: Mapping[str, Tensor]) -> None:
        """What the forward pass of a micro-batch shows of the policy on a source's samples."""
        if not self.on or "logp" not in now or samples.logp is None or not group.source.on_policy:
            return
        assert group.round is not None, "a minibatch is of a round"
        fresh, logp = samples.origin >= 0, now["logp"].detach()
        moved = torch.where(samples.mask, logp - samples.logp.to(logp), 0.0)
        own_moves = group.round.trained_logp and self._stale
        if group.round.sampler_gap is None and group.round.taken == 1 and not own_moves:
            self._keep_all("gap", moved.sum(-1), fresh)
        if not group.round.trained_logp:
            whole = logp.shape[-2] == group.round.samples.tokens.shape[-2]
            if not self._stale and whole and samples.ref_logp is not None:
                self.add("kl", log_ratio(replace(samples, logp=logp)), fresh)
            return
        self._keep_all("moved", moved.sum(-1), fresh)
        self._keep_all("token_moved", moved, samples.mask & fresh.unsqueeze(-1))

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
        if not self.on:
            return
        term = group.terms[i]
        self.count(f"loss_{group.places[i]}", mean.detach().double())
        mask = gather(samples.mask, batch.index, True) if term.level == "token" else None
        if "value_old" in arguments:
            for name in ("target", "value_old"):
                x = arguments[name]
                self._keep_all(
                    name, x, torch.ones_like(x, dtype=torch.bool) if mask is None else mask
                )
        if "logp_old" in arguments and "clip" in arguments:
            ratio = (arguments["logp"] - arguments["logp_old"]).detach().exp()
            self.add("clip_fraction", (ratio - 1).abs() > arguments["clip"], mask)
        if set(batch.roles) == {"chosen", "rejected"}:
            self._pairs(batch, arguments)
            if not self._shape:
                for name, pairs in informative.of_pairs(term, samples, batch, arguments).items():
                    self.add(name, pairs, batch.keep)
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

    def skipped(self) -> Tensor:
        """[*R]: the update is to be left out, as its mean ratio is above max_ratio."""
        ratios = self._ratios()
        if self._skip_above is None or "ratio_mean" not in ratios:
            return torch.zeros(self._shape, dtype=torch.bool)
        return ratios["ratio_mean"] > self._skip_above

    def result(self) -> dict[str, Any]:
        """The figures, by name: numbers, or lists of one a run."""
        seen = {n: w for n, w in self._weight.items() if bool((w > 0).any())}
        means = {n: self._sum[n] / w for n, w in seen.items()}  # 0 / 0: nothing of that run
        losses = [n for n in self._plain if n.startswith("loss_")]
        plain = {n: v for n, v in self._plain.items() if n not in losses or len(losses) > 1}
        of_policies = {**self._ratios(), **self._gap()}
        out: dict[str, Any] = {**plain, **means, **of_policies, **self._explained()}
        if self._skip_above is not None:
            out["skipped"] = self.skipped().int()
        return {n: numbers(v) for n, v in out.items()}

    def _explained(self) -> dict[str, Any]:
        """How much of the value head's target it foresaw, and how far off it is as a whole."""
        target, value = self._joined("target"), self._joined("value_old")
        if target is None or value is None:
            return {}
        spread, error = _variance(*target), target[0] - value[0]
        left = _variance(error, target[1])
        offset = masked_sum(error, target[1]).abs() / target[1].sum(-1)
        found = {
            "explained_variance": 1 - left / spread, "value_offset": offset / spread.sqrt()
        }  # fmt: skip
        found = {n: torch.where(spread > 0, x, torch.nan) for n, x in found.items()}
        return {n: None if bool(x.isnan().all()) else x for n, x in found.items()}

    def _gap(self) -> dict[str, Tensor]:
        """How far the trainer is from what drew the samples, as a round begins."""
        found = self._joined("gap")
        if found is None or not bool(found[1].any()):
            return {}
        moved, keep = found
        size = moved.abs()
        return {
            "sampler_gap": masked_sum(size, keep) / keep.sum(-1),
            "sampler_gap_max": size.masked_fill(~keep, 0.0).amax(-1),
            "sampler_effective_sample_size": _effective(moved, keep),
        }

    def _ratios(self) -> dict[str, Tensor]:
        """How far the policy has moved from the one that drew the samples."""
        sequences, tokens = self._joined("moved"), self._joined("token_moved")
        if sequences is None or tokens is None or not bool(sequences[1].any()):
            return {}
        logs, of = tokens[0].clamp(max=80.0), tokens[1]
        return {
            "ratio_mean": masked_sum(logs.exp(), of) / of.sum(-1),
            "ratio_max": logs.masked_fill(~of, -torch.inf).amax(-1).exp(),
            "effective_sample_size": _effective(*sequences),
        }


def _effective(log_weights: Tensor, keep: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) over the last dim, where kept: 1 where all weigh alike."""
    logs = log_weights.masked_fill(~keep, -torch.inf)
    weight = (logs - logs.amax(-1, keepdim=True)).exp()
    return weight.sum(-1).square() / weight.square().sum(-1) / keep.sum(-1)


def _variance(values: Tensor, keep: Tensor) -> Tensor:
    """Of the last dim, where kept."""
    count = keep.sum(-1, keepdim=True)
    mean = masked_sum(values, keep).unsqueeze(-1) / count
    return masked_sum((values - mean).square(), keep) / count.squeeze(-1)


def numbers(value: Any) -> Any:
    """A tensor as a number, or as a list of one a run; all else as it is."""
    return value.tolist() if isinstance(value, Tensor) else value
