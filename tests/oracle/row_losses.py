"""Losses of the remaining rows, written from their papers and the contract, one method a row.

The minibatch is all data rows, or all given samples, where `Material.minibatch` takes no part.
Each method holds its wrong versions beside the right one, chosen by `flaw`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from losses import Oracle
from torch import Tensor
from torch.nn.functional import logsigmoid
from worlds import Ids, Pair, Response, grouped, ids_of, mean

WHITEN_EPSILON = 1e-8
LAMBDA = 0.95
GRPO_KL_WEIGHT = 0.04


@dataclass(frozen=True)
class Material:
    """What a row trains on."""

    rows: list[list[tuple[Response, bool]]] = field(default_factory=list)
    """The data's responses, row by row, each with whether it is good; first good, then bad."""
    rewards: list[list[float]] = field(default_factory=list)
    """Of the data's responses."""
    samples: list[Mapping] = field(default_factory=list)
    controls: dict[bool, Ids] = field(default_factory=dict)
    minibatch: tuple[int, ...] | None = None
    """Places of the rows, or of the samples' prompts, that the update takes; None: all."""

    @property
    def places(self) -> list[int]:
        everything = range(len(self.rows or grouped(self.samples)))
        return list(everything if self.minibatch is None else self.minibatch)

    @property
    def pairs(self) -> list[Pair]:
        return [(self.rows[n][0][0], self.rows[n][1][0]) for n in self.places]

    @property
    def labelled(self) -> list[tuple[Response, bool]]:
        return [response for n in self.places for response in self.rows[n]]

    @property
    def groups(self) -> list[list[Mapping]]:
        return [grouped(self.samples)[n] for n in self.places]


def flatten(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values))


def whiten(x: Tensor, flaw: str | None = None) -> Tensor:
    variance = x.var(correction=int(flaw == "unbiased_variance"))
    centre = 0 if flaw == "not_centred" else x.mean()
    return (x - centre) / (variance + WHITEN_EPSILON).sqrt()


class RowOracle(Oracle):
    # --- likelihood on data ---

    def binary_feedme(self, m: Material) -> Tensor:
        good = [response for response, label in m.labelled if label != (self.flaw == "bad_kept")]
        loss = self.nll(good)
        return loss * len(good) / len(m.labelled) if self.flaw == "dropped_counted" else loss

    def binary_reward_conditioning(self, m: Material) -> Tensor:
        conditioned = []
        for (prompt, tokens), label in m.labelled:
            control = m.controls[label != (self.flaw == "controls_swapped")]
            if self.flaw == "control_left_out":
                control = []
            in_front = self.flaw == "control_in_front"
            conditioned.append((control + prompt if in_front else prompt + control, tokens))
        return self.nll(conditioned)

    def offline_rwr(self, m: Material) -> Tensor:
        rewards = [reward for row in m.rewards for reward in row]
        return self.weighted([response for response, _ in m.labelled], rewards)

    def weighted(self, responses: Sequence[Response], rewards: Sequence[float]) -> Tensor:
        beta = 1.0 if self.flaw == "beta_left_out" else self.settings["beta"]
        weights = (torch.tensor(rewards, dtype=torch.float64) / beta).exp()
        if self.flaw != "not_clipped":
            weights = weights.clamp(max=self.settings["max_weight"])
        if self.flaw == "normalised":
            weights = weights / weights.mean()
        log_probs = [self.log_prob(self.policy, response) for response in responses]
        return -(weights * torch.stack(log_probs)).mean()

    # --- rewards on fresh samples ---

    def rwr(self, m: Material) -> Tensor:
        return self.weighted([ids_of(s) for s in m.samples], [s["reward"] for s in m.samples])

    def token_kl(self, response: Response) -> Tensor:
        """log pi - log pi_ref of each token: data."""
        with torch.no_grad():
            mine = self.of_tokens(self.policy, response)
            return mine - self.of_tokens(self.reference, response)

    def shaped(self, sample: Mapping) -> Tensor:
        """Reward of a response less the KL estimate of its tokens."""
        kl = self.settings["kl"] * self.token_kl(ids_of(sample)).sum()
        return sample["reward"] + (kl if self.flaw == "kl_sign" else -kl)

    def reinforce(self, m: Material) -> Tensor:
        """In the first round no reward is earlier: the baseline is 0."""
        rewards = torch.stack([self.shaped(sample) for sample in m.samples])
        if self.flaw == "kl_left_out":
            rewards = torch.tensor([sample["reward"] for sample in m.samples])
        if self.flaw == "baseline_of_this_round":
            rewards = rewards - rewards.mean()
        log_probs = [self.log_prob(self.policy, ids_of(sample)) for sample in m.samples]
        return -(rewards * torch.stack(log_probs)).mean()

    def rloo(self, m: Material) -> Tensor:
        terms = []
        for group in m.groups:
            rewards = torch.stack([self.shaped(sample) for sample in group])
            of_baseline = rewards
            if self.flaw == "baseline_without_kl":
                of_baseline = torch.tensor([sample["reward"] for sample in group])
            for k, sample in enumerate(group):
                others = (of_baseline.sum() - of_baseline[k]) / (len(group) - 1)
                if self.flaw == "baseline_includes_itself":
                    others = of_baseline.mean()
                advantage = rewards[k] - others
                terms.append(-advantage * self.log_prob(self.policy, ids_of(sample)))
        return mean(terms)

    def ppo(self, m: Material) -> Tensor:
        """Values are 0 at collection and now, so the value term moves the head alone."""
        advantages = []
        for sample in m.samples:
            rewards = -self.settings["kl"] * self.token_kl(ids_of(sample))
            rewards = -rewards if self.flaw == "kl_sign" else rewards
            if self.flaw == "reward_on_every_token":
                rewards = rewards + sample["reward"]
            else:
                rewards[-1] += sample["reward"]
            advantages.append(self.gae(rewards))
        if self.flaw == "whitened_a_sample":
            advantages = [whiten(advantage) for advantage in advantages]
        elif self.flaw != "not_whitened":
            lengths = [len(advantage) for advantage in advantages]
            advantages = list(whiten(flatten(advantages), self.flaw).split(lengths))
        of_samples = []
        taken = [sample for group in m.groups for sample in group]
        for sample, advantage in zip(m.samples, advantages, strict=True):
            if sample not in taken:
                continue
            log_probs = self.of_tokens(self.policy, ids_of(sample))
            ratio = (log_probs - log_probs.detach()).exp()
            of_samples.append(-(ratio * advantage))
        if self.flaw == "mean_over_all_tokens":
            return flatten(of_samples).mean()
        reduce = torch.mean if self.flaw == "mean_over_tokens" else torch.sum
        return mean([reduce(tokens) for tokens in of_samples])

    def gae(self, rewards: Tensor) -> Tensor:
        """Discount 1, values 0: a sum of later rewards that fades with lambda."""
        fade = 1.0 if self.flaw == "lambda_one" else LAMBDA
        advantage = torch.zeros_like(rewards)
        later = torch.zeros(())
        for t in reversed(range(len(rewards))):
            later = rewards[t] + fade * later
            advantage[t] = later
        return advantage

    def grpo(self, m: Material) -> Tensor:
        losses, divergences = [], []
        of_round = torch.tensor([sample["reward"] for sample in m.samples], dtype=torch.float64)
        for group in grouped(m.samples):
            rewards = torch.tensor([sample["reward"] for sample in group], dtype=torch.float64)
            advantages = whiten(rewards, self.flaw)
            if self.flaw == "not_scaled":
                advantages = rewards - rewards.mean()
            if self.flaw == "advantage_of_the_round":
                advantages = (rewards - of_round.mean()) / of_round.std(correction=0)
            for sample, advantage in zip(group, advantages, strict=True):
                log_probs = self.of_tokens(self.policy, ids_of(sample))
                losses.append(-advantage * (log_probs - log_probs.detach()).exp())
                divergences.append(self.k3(log_probs, ids_of(sample)))
        both = [a + GRPO_KL_WEIGHT * b for a, b in zip(losses, divergences, strict=True)]
        if self.flaw == "mean_of_means":
            return mean([tokens.mean() for tokens in both])
        if self.flaw == "summed_over_tokens":
            return mean([tokens.sum() for tokens in both])
        return flatten(both).mean()

    def k3(self, log_probs: Tensor, response: Response) -> Tensor:
        with torch.no_grad():
            reference = self.of_tokens(self.reference, response)
        log_ratio = log_probs - reference
        if self.flaw == "k2":
            return log_ratio**2 / 2
        log_ratio = -log_ratio if self.flaw == "kl_sign" else log_ratio
        return (-log_ratio).exp() - 1 + log_ratio

    # --- pairs of fresh samples ---

    def on_policy_ipo(self, m: Material) -> Tensor:
        pairs = self.rank(m.samples)
        loss = self.ipo(pairs)
        counted = len(grouped(m.samples)) if self.flaw == "tied_pair_counted" else len(pairs)
        return loss * len(pairs) / counted

    def half_and_half(self, m: Material) -> Tensor:
        own = self.rank(m.samples)
        share = 1.0 if self.flaw == "not_halved" else 0.5
        if self.flaw == "one_mean":
            return self.dpo(m.pairs + own)
        counted = len(grouped(m.samples)) if self.flaw == "tied_pair_counted" else None
        return share * (self.dpo(m.pairs) + self.dpo(own, counted))

    def auto(self, m: Material) -> Tensor:
        """Half and half, and a reverse KL whose weight follows the first round's KL: a factor
        exp(error + integral), error = (KL - budget) / budget within +-1, the integral a fiftieth
        of it far below the budget, else a tenth."""
        with torch.no_grad():
            kl = torch.stack([self.token_kl(ids_of(s)).sum() for s in m.samples]).mean()
        budget = self.settings["target_kl"]
        error = ((kl - budget) / budget).clamp(-1.0, 1.0)
        factor = (error * (1.02 if error < -0.5 else 1.1)).exp()
        if self.flaw == "not_steered":
            factor = torch.ones_like(factor)
        weight = 0.0 if self.flaw == "kl_left_out" else 0.05 * self.settings["beta"] * factor
        groups = [[ids_of(sample) for sample in group] for group in grouped(m.samples)]
        return self.half_and_half(m) + weight * self.reverse_kl(groups)

    def chosen_vs_own(self, m: Material) -> Tensor:
        own = {tuple(sample["prompt_ids"]): ids_of(sample) for sample in m.samples}
        pairs = [(row[0][0], own[tuple(row[0][0][0])]) for row in m.rows]
        if self.flaw == "samples_in_given_order":
            pairs = [(p[0], ids_of(s)) for p, s in zip(pairs, m.samples, strict=True)]
        return self.dpo(m.pairs if self.flaw == "rejected_of_the_data" else pairs)

    # --- pairs of the data ---

    def of_margins(self, m: Material, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return mean([loss(self.settings["beta"] * self.margin(pair)) for pair in m.pairs])

    def cdpo(self, m: Material) -> Tensor:
        smoothing = 0.0 if self.flaw == "not_smoothed" else self.settings["label_smoothing"]
        sign = -1 if self.flaw == "robust" else 1
        return self.of_margins(
            m, lambda h: -(1 - smoothing) * logsigmoid(h) - sign * smoothing * logsigmoid(-h)
        )

    def robust_dpo(self, m: Material) -> Tensor:
        smoothing = self.settings["label_smoothing"]
        sign = -1 if self.flaw == "conservative" else 1
        scale = 1.0 if self.flaw == "not_rescaled" else 1 - 2 * smoothing
        return self.of_margins(
            m,
            lambda h: (
                (-(1 - smoothing) * logsigmoid(h) + sign * smoothing * logsigmoid(-h)) / scale
            ),
        )

    def ln_dpo(self, m: Material) -> Tensor:
        losses = []
        for chosen, rejected in m.pairs:
            lengths = len(chosen[1]), len(rejected[1])
            if self.flaw == "summed":
                lengths = 1, 1
            if self.flaw == "lengths_without_end":
                lengths = lengths[0] - 1, lengths[1] - 1
            gap = self.log_ratio(chosen) / lengths[0] - self.log_ratio(rejected) / lengths[1]
            losses.append(-logsigmoid(self.settings["beta"] * gap))
        return mean(losses)

    def dpo_nll(self, m: Material) -> Tensor:
        of_chosen = [-self.of_tokens(self.policy, chosen) for chosen, _ in m.pairs]
        nll = flatten(of_chosen).mean()
        if self.flaw == "summed":
            nll = mean([tokens.sum() for tokens in of_chosen])
        if self.flaw == "mean_of_means":
            nll = mean([tokens.mean() for tokens in of_chosen])
        if self.flaw == "rejected_imitated":
            nll = flatten([-self.of_tokens(self.policy, rejected) for _, rejected in m.pairs])
            nll = nll.mean()
        return self.dpo(m.pairs) + nll

    def dpop(self, m: Material) -> Tensor:
        losses = []
        for chosen, rejected in m.pairs:
            penalised = rejected if self.flaw == "penalty_on_rejected" else chosen
            fall = torch.relu(-self.log_ratio(penalised))  # exactly at the reference its slope is 0
            if self.flaw == "penalty_not_clamped":
                fall = -self.log_ratio(penalised)
            weight = 0 if self.flaw == "penalty_left_out" else self.settings["penalty"]
            gap = self.margin((chosen, rejected)) - weight * fall
            losses.append(-logsigmoid(self.settings["beta"] * gap))
        return mean(losses)

    def wpo(self, m: Material) -> Tensor:
        losses = []
        for pair in m.pairs:
            weight = torch.stack([self.log_weight(response) for response in pair]).sum().exp()
            if self.flaw != "weights_not_stopped":
                weight = weight.detach()
            losses.append(-weight * logsigmoid(self.settings["beta"] * self.margin(pair)))
        return mean(losses)

    def log_weight(self, response: Response) -> Tensor:
        log_probs, tokens = self.predictions(self.policy, response)
        aligned = log_probs.gather(1, tokens[:, None])[:, 0] - (2 * log_probs).logsumexp(-1)
        if self.flaw == "not_aligned":
            aligned = log_probs.gather(1, tokens[:, None])[:, 0]
        return aligned.sum() if self.flaw == "weights_summed" else aligned.mean()

    def chi_po(self, m: Material) -> Tensor:
        losses = []
        for pair in m.pairs:
            ratios = torch.stack([self.log_ratio(response) for response in pair])
            links = ratios.exp() + ratios
            if self.flaw == "no_chi_square":
                links = ratios
            if self.flaw == "no_kl":
                links = ratios.exp()
            h = self.settings["beta"] * (links[0] - links[1])
            limit = float("inf") if self.flaw == "not_clipped" else self.settings["clip"]
            losses.append(-logsigmoid(h.clamp(-limit, limit)))
        return mean(losses)

    def simpo(self, m: Material) -> Tensor:
        gamma = {"gamma_added": -1, "gamma_scaled": self.settings["beta"]}.get(str(self.flaw), 1)
        losses = []
        for pair in m.pairs:
            means = [self.of_tokens(self.policy, response).mean() for response in pair]
            if self.flaw == "summed":
                means = [self.log_prob(self.policy, response) for response in pair]
            gap = self.settings["beta"] * (means[0] - means[1])
            losses.append(-logsigmoid(gap - gamma * self.settings["gamma"]))
        return mean(losses)

    def orpo(self, m: Material) -> Tensor:
        losses = []
        for pair in m.pairs:
            logs = [self.of_tokens(self.policy, response).mean() for response in pair]
            odds = [p - torch.log(-torch.expm1(p)) for p in logs]
            if self.flaw == "probabilities_for_odds":
                odds = logs
            likelihood = self.log_prob(self.policy, pair[0]) if self.flaw == "summed" else logs[0]
            weight = 0 if self.flaw == "odds_left_out" else self.settings["odds_weight"]
            losses.append(-likelihood - weight * logsigmoid(odds[0] - odds[1]))
        return mean(losses)

    def cpo(self, m: Material) -> Tensor:
        losses = []
        for pair in m.pairs:
            chosen, rejected = (self.log_prob(self.policy, response) for response in pair)
            contrast = -logsigmoid(self.settings["beta"] * (chosen - rejected))
            scale = 1 / len(pair[0][1]) if self.flaw == "nll_a_token" else 1.0
            scale = 0.0 if self.flaw == "nll_left_out" else scale
            losses.append(contrast - scale * self.settings["nll_weight"] * chosen)
        return mean(losses)

    # --- single responses of the data ---

    def mismatched(self, m: Material) -> Tensor:
        """Mean log-ratio of each prompt with the first response of the next row of the data."""
        step = -1 if self.flaw == "row_before" else 1
        step = 0 if self.flaw == "own_response" else step
        ratios = []
        for n in m.places:
            prompt, _ = m.rows[n][0][0]
            _, tokens = m.rows[(n + step) % len(m.rows)][0][0]
            ratios.append(self.log_ratio((prompt, tokens)))
        return mean(ratios)

    def kto(self, m: Material) -> Tensor:
        kl = self.mismatched(m) if self.flaw != "kl_left_out" else torch.zeros(())
        kl = kl if self.flaw == "kl_not_stopped" else kl.detach()
        kl = kl if self.flaw == "not_clamped" else kl.clamp(min=0)
        losses = []
        for response, label in m.labelled:
            gain = self.settings["beta"] * (self.log_ratio(response) - kl)
            losses.append(1 - torch.sigmoid(gain if label else -gain))
        if self.flaw == "mean_a_label":
            good = [loss for loss, (_, label) in zip(losses, m.labelled, strict=True) if label]
            bad = [loss for loss, (_, label) in zip(losses, m.labelled, strict=True) if not label]
            return mean(good) + mean(bad)
        return mean(losses)
