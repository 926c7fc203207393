"""What a policy does on held-out prompts: reward, KL to the reference, win rate, length.

Samples of different policies use the same random numbers, so their differences are paired.
Intervals are bootstrapped over prompts; from one training run they say nothing about another seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from preftune.collecting import Data
from preftune.figures import (
    Figures,
    agreement,
    best_of_curve,
    best_of_kl,
    best_of_share,
    distinct,
    interval,
    length_controlled,
    paired,
    ratio,
    wins,
)
from preftune.numerics import masked_sum, stream_key, uniform
from preftune.policies.base import Policy
from preftune.policies.scoring import micro_batches, score_all
from preftune.samples import Samples, join
from preftune.team import current

DOCUMENTED = {
    "reward": "mean reward of samples; a proxy where it is the reward trained on",
    "reward:NAME": "the same by the gold reward NAME, which nothing was trained or chosen by",
    "reward_gain": "reward less the reference's on the same prompts (reward_gain:NAME: by gold)",
    "agreement:NAME": "share of pairs of an answer and the reference's in which the reward and the "
    "gold reward NAME prefer the same one (pairs that tie by NAME left out)",
    "agreement_near:NAME": "the same of the half of the answers nearer to the reference, by KL",
    "agreement_far:NAME": "the same of the half further from it",
    "reward_spread": "standard deviation over an ensemble's members of a sample's reward",
    "win_rate": "share of samples with a higher reward than the reference's (ties half)",
    "win_rate_length_controlled": "win_rate at equal length, by a logistic fit on the difference",
    "judge_win_rate": "share won against the reference's samples by a judge, asked in both orders",
    "judge_win_rate_length_controlled": "judge_win_rate at equal length, fitted as above",
    "judge_malformed": "share of the judge's answers that named no winner; they count as ties",
    "kl": "KL(policy || reference), nats a response: exact at each step of the policy's samples",
    "kl_k1": "the same by the plain mean of log(policy / reference); k3 is not reported",
    "forward_kl": "KL(reference || policy), nats a response: exact at each step of its samples",
    "entropy": "mean -log-prob of the policy's own samples, nats a response",
    "entropy_per_token": "the same a token, the end token included",
    "distinct_1": "share of distinct tokens among all; compare at equal numbers of samples",
    "distinct_2": "share of distinct pairs of neighbouring tokens",
    "length": "mean response tokens, the end token not counted",
    "no_end": "share of samples cut before an end token",
    "implicit_accuracy": "share of pairs whose chosen response has the larger log-ratio",
    "implicit_margin": "log_ratio_chosen - log_ratio_rejected, nats (times beta: DPO's reward)",
    "log_ratio_chosen": "mean log(policy / reference) of held-out chosen responses, nats",
    "log_ratio_rejected": "the same of rejected responses, nats",
    "retention_nll": "-log-prob of held-out plain text, nats a token",
    "retention_nll_reference": "the same of the reference",
    "retention_change": "retention_nll less the reference's on the same text, nats a token",
    "best_of_N": "reward of the best of N samples of the reference (best_of_N:NAME: by gold)",
    "best_of_n_share": "reward gain as a share of best-of-n's at the same KL (or at the last n)",
}
"""What each figure is."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A policy's samples on held-out prompts, judged."""

    samples: Samples
    rewards: Mapping[str, Tensor]
    """[N, K] by name; the first is the one that counts for the win rate."""
    kl: Tensor | None
    """[N, K], nats: KL to the reference summed over the steps of each sample."""
    log_ratio: Tensor | None = None
    """[N, K], nats: log(policy / reference) of each sample."""
    own: bool = True
    """Drawn from the policy's own distribution: temperature 1, top-p 1, top-k off."""

    def lengths(self) -> Tensor:
        """Response tokens, the end token not counted, [N, K]."""
        return self.samples.lengths() - self.samples.finished.long()

    def tokens(self) -> list[list[list[int]]]:
        """Ids of [N][K] responses without their end tokens."""
        return [
            [ids[:n] for ids, n in zip(group, lengths, strict=True)]
            for group, lengths in zip(
                self.samples.tokens.tolist(), self.lengths().tolist(), strict=True
            )
        ]

    def first(self, count: int) -> "Answers":
        """Those to the first `count` prompts."""
        return replace(
            self,
            samples=self.samples.take(torch.arange(min(count, len(self.samples.row)))),
            rewards={name: values[:count] for name, values in self.rewards.items()},
            kl=None if self.kl is None else self.kl[:count],
            log_ratio=None if self.log_ratio is None else self.log_ratio[:count],
        )


def answer(
    policy: Policy,
    reference: Policy | None,
    prompts: Data,
    judges: Mapping[str, Callable[[Samples], Tensor]],
    *,
    samples_per_prompt: int,
    seed: int,
    micro_batch_tokens: int | None = None,
    num_prompts: int | None = None,
    batch_prompts: int = 48,
    log_ratio: bool = False,
    own: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Sample, judge and measure.

    Args:
        reference: None leaves the KL out.
        log_ratio: the KL by log-ratios too, for one more pass of the reference.
        own: False where the policy's decoding is not its own distribution: a KL of such samples
            would be of another policy, and is left out.
    """
    total = min(num_prompts or len(prompts), len(prompts))
    key, team = stream_key(seed, "evaluate"), current()
    parts: list[Samples] = []
    kls: list[Tensor] = []
    ratios: list[Tensor] = []
    for start in range(0, total, batch_prompts):
        rows = torch.arange(start, min(start + batch_prompts, total))

        def draw(own: Tensor, rows: Tensor = rows) -> Samples:
            own = rows[own]

            def stream(t: int, shape: tuple[int, ...]) -> Tensor:
                return uniform(key, t, own[:, None], torch.arange(shape[-1]))

            drawn = policy.sample(*prompts.prompts_only(own), samples_per_prompt, stream, 0)
            return replace(drawn, row=own)

        parts.append(team.rows(len(rows), draw))
        if reference is not None and own:
            kls.append(_sequence_kl(policy, reference, parts[-1], micro_batch_tokens))
            if log_ratio:
                ratios.append(_log_ratio(policy, reference, parts[-1], micro_batch_tokens))
        progress(int(rows[-1]) + 1, total)
    samples = join(parts)
    return Answers(
        samples=samples,
        rewards={name: team.judged(judge, samples) for name, judge in judges.items()},
        kl=torch.cat(kls) if kls else None,
        log_ratio=torch.cat(ratios) if ratios else None,
        own=own,
    )


def _sequence_kl(policy: Policy, reference: Policy, samples: Samples, budget: int | None) -> Tensor:
    team = current()
    own = [
        (index, policy.step_kl(reference, samples.take(index)).sum(-1).double())
        for index in micro_batches(samples, budget)[team.rank :: team.size]
    ]
    out = torch.zeros(samples.finished.shape, dtype=torch.float64)
    for index, kl in (x for part in team.gather(own) for x in part):
        out[index] = kl
    return out


def _log_ratio(policy: Policy, reference: Policy, samples: Samples, budget: int | None) -> Tensor:
    """log(policy / reference) of each response, [N, K]."""
    logp = samples.logp if policy.exact_sampler else None
    logp = score_all(policy, samples, budget) if logp is None else logp
    ref_logp = score_all(reference, samples, budget)
    return (masked_sum(logp, samples.mask) - masked_sum(ref_logp, samples.mask)).double()


def forward_kl(
    policy: Policy, reference: Policy, against: Answers, budget: int | None, seed: int = 0
) -> Figures:
    """KL(reference || policy) on the reference's own answers, exact at each of their steps."""
    if not against.own:
        return {}
    return {"forward_kl": interval(_sequence_kl(reference, policy, against.samples, budget), seed)}


def figures(answers: Answers, against: Answers | None = None, seed: int = 0) -> Figures:
    """Means with 95 % intervals of all that the answers show, by the names of `DOCUMENTED`.

    Args:
        against: another policy's answers to the same prompts: the win rate is against them.
    """
    out: Figures = {}
    names = list(answers.rewards)
    for i, name in enumerate(names):
        suffix = f":{name}" if i else ""
        out[f"reward{suffix}"] = interval(answers.rewards[name], seed)
        if against is not None and name in against.rewards:
            gain = paired(answers.rewards[name], against.rewards[name], seed)
            out[f"reward_gain{suffix}"] = gain
            if i and answers.kl is not None:
                by, true = ((answers.rewards[n], against.rewards[n]) for n in (names[0], name))
                found = agreement(by, true, answers.kl, seed)
                out |= {f"{figure}{suffix}": x for figure, x in found.items()}
    if answers.kl is not None:
        out["kl"] = interval(answers.kl, seed)
    if answers.log_ratio is not None:
        out["kl_k1"] = interval(answers.log_ratio, seed)
    if against is not None and names:
        won = wins(answers.rewards[names[0]], against.rewards[names[0]])
        out |= win_figures("win_rate", won, answers, against, seed)
    out |= _variety(answers, seed)
    out["length"] = interval(answers.lengths(), seed)
    out["no_end"] = interval(~answers.samples.finished, seed)
    return out


def win_figures(
    name: str, won: Tensor, answers: Answers, against: Answers, seed: int = 0
) -> Figures:
    """A win rate [N, K], and what it would be at equal lengths where that can be told."""
    out = {name: interval(won, seed)}
    difference = answers.lengths() - against.lengths()
    controlled = length_controlled(won, difference, seed)
    return out if controlled is None else out | {f"{name}_length_controlled": controlled}


def _variety(answers: Answers, seed: int) -> Figures:
    """Entropy and distinct n-grams."""
    out: Figures = {}
    samples = answers.samples
    if answers.own and samples.logp is not None:
        surprise = -masked_sum(samples.logp, samples.mask).double()
        out["entropy"] = interval(surprise, seed)
        out["entropy_per_token"] = ratio(surprise.sum(-1), samples.lengths().sum(-1), seed)
    for n in (1, 2):
        share = distinct(answers.tokens(), n)
        if share is not None:
            out[f"distinct_{n}"] = share
    return out


def best_of_n(drawn: Answers, mine: Answers | None, seed: int = 0) -> tuple[Figures, list[str]]:
    """Inference-time best-of-n from the reference: the baseline of every reward at every KL.

    The best is chosen by the first reward; others (gold) are what it is then worth by them.

    Args:
        drawn: m answers of the reference to each prompt.
        mine: the policy's answers to the same prompts, for its share of best-of-n's gain.

    Returns:
        best_of_1, best_of_2, ... and best_of_n_share, by each reward; and notes for the user.
    """
    if not drawn.rewards or not drawn.own:
        return {}, []
    out: Figures = {}
    notes: list[str] = []
    names = list(drawn.rewards)
    m = drawn.samples.tokens.shape[-2]
    for i, name in enumerate(names):
        suffix = f":{name}" if i else ""
        values, by = drawn.rewards[name], drawn.rewards[names[0]]
        out |= {f"best_of_{n}{suffix}": f for n, f in best_of_curve(values, by, seed).items()}
        if mine is not None and mine.kl is not None:
            share = best_of_share(mine.rewards[name], mine.kl, values, by, seed)
            if share is not None:
                out[f"best_of_n_share{suffix}"] = share
    if mine is not None and mine.kl is not None:
        kl, last = float(mine.kl.mean()), best_of_kl(m)
        if kl > last and "best_of_n_share" in out:
            notes.append(
                f"best_of_n_share: the KL of {kl:.3g} nats is beyond best-of-{m}'s (at most "
                f"{last:.3g}), so the gain is compared with that of best-of-{m}"
            )
    return out, notes
