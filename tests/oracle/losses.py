"""Losses of the rows that have a test file of their own, written from the papers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from worlds import Forward, Pair, Response, grouped, ids_of, mean


class Oracle(Forward):
    """The loss of a minibatch as one number, by one forward a response."""

    def margin(self, pair: Pair) -> Tensor:
        chosen, rejected = pair[::-1] if self.flaw == "swapped" else pair
        return self.log_ratio(chosen) - self.log_ratio(rejected)

    def nll(self, responses: Sequence[Response]) -> Tensor:
        return mean([-self.log_prob(self.policy, response) for response in responses])

    def dpo(self, pairs: Sequence[Pair], count: int | None = None) -> Tensor:
        smoothing = self.settings.get("label_smoothing", 0.0)
        losses = []
        for pair in pairs:
            h = self.beta * self.margin(pair)
            losses.append(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h))
        return torch.stack(losses).sum() / (count or len(pairs))

    def ipo(self, pairs: Sequence[Pair]) -> Tensor:
        target = 1 / (2 * self.settings["tau"])
        return mean([(self.margin(pair) - target) ** 2 for pair in pairs])

    def reverse_kl(self, groups: Sequence[Sequence[Response]]) -> Tensor:
        """Score-function gradient of KL(policy || reference), leave-one-out baseline."""
        of_prompts = []
        for group in groups:
            ratios = [self.log_ratio(response) for response in group]
            if self.flaw != "gradient_not_stopped":
                ratios = [ratio.detach() for ratio in ratios]
            terms = []
            for j, response in enumerate(group):
                others = [ratio for i, ratio in enumerate(ratios) if i != j]
                baseline = mean(ratios if self.flaw == "baseline_includes_itself" else others)
                if self.flaw == "no_baseline":
                    baseline = torch.zeros(())
                terms.append((ratios[j] - baseline) * self.log_prob(self.policy, response))
            of_prompts.append(mean(terms))
        return mean(of_prompts)

    def rank(self, samples: Sequence[Mapping]) -> list[Pair]:
        """Best against worst of each prompt; a prompt whose rewards are all equal has no pair."""
        pairs = []
        for group in grouped(samples):
            best = max(group, key=lambda sample: sample["reward"])
            worst = min(group, key=lambda sample: sample["reward"])
            if best["reward"] > worst["reward"]:
                pairs.append((ids_of(best), ids_of(worst)))
        return pairs

    def loss(self, method: str, data: Any, samples: Sequence[Mapping]) -> Tensor:
        """The loss of one row; `data` are responses (sft), pairs, or unused (on-policy rows)."""
        if method == "sft":
            return self.nll(data)
        if method == "pref_ft":
            return self.nll([pair[self.flaw == "swapped"] for pair in data])
        if method == "dpo":
            return self.dpo(data)
        if method == "ipo":
            return self.ipo(data)
        if method == "on_policy_dpo":
            pairs = self.rank(samples)
            wrong_count = len(grouped(samples)) if self.flaw == "tied_pair_counted" else None
            return self.dpo(pairs, wrong_count)
        if method == "on_policy_best_of_n":
            pick = min if self.flaw == "swapped" else max
            groups = grouped(samples)
            return self.nll([ids_of(pick(g, key=lambda s: s["reward"])) for g in groups])
        assert method == "hypo"
        weight = self.settings.get("weight", 0.05 * self.beta)
        groups = [[ids_of(sample) for sample in group] for group in grouped(samples)]
        return self.dpo(data) + weight * self.reverse_kl(groups)
