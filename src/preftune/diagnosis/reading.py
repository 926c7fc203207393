"""From what was measured to figures by name: an estimate each, or why there is none."""

from collections.abc import Iterator

import torch
from torch import Tensor

from preftune.diagnosis.measure import Measured, Surveyed, same_prompts
from preftune.estimators import displacement, divergence, misalignment, ranks, surprisal, tilt
from preftune.estimators.ensemble import EnsembleCoverage, ensemble_coverage
from preftune.estimators.estimate import Estimate, cannot_tell, mean, share
from preftune.estimators.features import feature_ratio, feature_shift
from preftune.estimators.similarity import two_sample_auc
from preftune.figures import wins
from preftune.numerics import stream_key, uniform

DOCUMENTED = {
    "surprisal_SIDE": "mean z of the data's responses: 0 +- 1 if they were the reference's own, "
    "above 0 they are stranger to it, below 0 tamer",
    "surprisal_own": "the same of the reference's own samples: a check, about 0",
    "surprisal_spread_SIDE": "standard deviation of z; 1 if they were the reference's own",
    "surprisal_first_SIDE": "excess surprise of the first token alone: far above the others where "
    "template, BOS or a blank is wrong",
    "reference_accuracy": "share of pairs whose chosen response the reference finds likelier",
    "reference_margin": "mean of log p(chosen) - log p(rejected) under the reference, nats",
    "ln_ches_Q": "quantile of ln-CHES: pairs above lower their own chosen response's probability",
    "rank_low_SIDE": "share of responses stranger than all of the reference's samples "
    "(1 / (m + 1) if they were its own); confounded by length",
    "rank_low_matched_SIDE": "the same among samples of about their length",
    "rank_high_SIDE": "share likelier than all of them: greedy or low-temperature text",
    "told_apart": "AUC of a linear classifier of hidden states: the data's responses against the "
    "reference's; 0.5 where they are alike",
    "feature_ratio": "how much larger the reference's own differences are than the pairs', in "
    "directions where the pairs are thin (hidden states); about 1 where the pairs are its own",
    "ensemble_accuracy": "share of pairs that rewards fitted on hidden states of other pairs order "
    "as labelled; 0.5: they have learnt nothing",
    "ensemble_ratio": "how much more such rewards disagree on the reference's own answers than on "
    "the pairs: above 1 where the labels leave open what its answers differ in",
    "reward_accuracy": "share of pairs that the reward orders as the data do",
    "reached_SIDE": "share of the reference's samples whose reward is at least the response's",
    "reach_of_N": "share of prompts in which the best of N samples reaches the chosen's reward",
    "spearman": "within prompts, rank correlation of the reference's log-prob and the reward",
    "spearman_at_length": "the same at equal length",
    "peak_depth": "how far below the mean log-prob the best of the samples lies, in standard "
    "deviations",
    "optimum_kl_B": "KL of the optimum from the reference at beta = B standard deviations of the "
    "reward, nats",
    "optimum_log_c_B": "log of its mean density ratio to the reference, nats",
    "kl": "KL of the policy from the reference on its own samples, nats",
    "kl_by_tokens": "the same by the KL of each next token",
    "left_N": "share of the policy's samples that the reference finds N times less likely",
    "log_c": "log of the policy's mean density ratio to the reference, nats",
    "gap": "log-ratio of the policy's own samples less that of the data's responses, nats: mass "
    "that has left the data",
    "log_ratio_chosen": "log(policy / reference) of chosen responses, nats",
    "log_ratio_rejected": "the same of rejected ones",
    "implicit_accuracy": "share of pairs that the log-ratios order as the data do",
    "feature_ratio_policy": "feature_ratio of the policy's samples",
    "probe_kl": "KL from the reference of the probe, which is the beginning of a run on the pairs, "
    "on its own samples, nats",
    "probe_kl_by_tokens": "the same by the KL of each next token",
    "probe_gap": "log-ratio of the probe's own samples less that of the data's responses, nats; so "
    "early its level does not tell how the run ends",
    "probe_feature_ratio": "feature_ratio of the probe's samples: whether training leads where the "
    "pairs say little",
    "probe_feature_shift": "how much larger, by the same measure, the probe's own differences are "
    "than the reference's; 1: training has not widened or narrowed them yet",
    "probe_ensemble_ratio": "ensemble_ratio of the probe's samples",
}
"""SIDE: chosen or rejected (response, where a row has one); Q, N, B: numbers."""
BETAS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Standard deviations of the reward within prompts."""
LEVELS = (2.0**4, 2.0**10, 2.0**20)
QUANTILES = (0.5, 0.95)
SIDES = ("chosen", "rejected")
LEAST_KL = 0.01
"""Nats from the reference that a probe must have gone: nearer, its samples are the reference's."""
_WHERE = ("probe_gap", "probe_feature_ratio", "probe_feature_shift", "probe_ensemble_ratio")

Figures = dict[str, Estimate]


def figures(measured: Measured, seed: int = 0) -> Figures:
    """All that can be read off, in the order of `DOCUMENTED`."""
    data, drawn, own = measured.data, measured.drawn, measured.own
    found: Figures = {}
    if data is not None:
        found |= _of_data(data, seed)
    if drawn is not None:
        found["surprisal_own"] = _surprisal(drawn, slice(None), seed).mean
    if data is not None and drawn is not None:
        found |= _against_samples(*same_prompts(data, drawn), seed)
        heard = _ensemble(data, drawn, seed)
        if heard is not None:
            found |= {"ensemble_accuracy": heard.accuracy, "ensemble_ratio": heard.ratio}
    if drawn is not None and drawn.reward is not None:
        found |= _of_reward(data, drawn, seed)
    if own is not None:
        found |= _of_policy(data, own, seed)
    if measured.probe is not None and measured.probe_data is not None:
        found |= _of_probe(measured, measured.probe, measured.probe_data, seed)
    return found


def _sides(data: Surveyed) -> Iterator[tuple[int, str]]:
    pairs = data.tokens.shape[1] == 2
    yield from enumerate(SIDES if pairs else ("response",))


def _surprisal(of: Surveyed, responses: slice, seed: int) -> surprisal.Surprisal:
    parts = (of.ref_logp, of.entropy, of.variance, of.mask)
    logp, entropy, variance, mask = (x[:, responses] for x in parts)
    return surprisal.surprisal(logp, entropy, variance, mask, positions=1, seed=seed)


def _of_data(data: Surveyed, seed: int) -> Figures:
    """Tier 0: one pass of the reference over the data."""
    found: Figures = {}
    for k, side in _sides(data):
        seen = _surprisal(data, slice(k, k + 1), seed)
        found[f"surprisal_{side}"] = seen.mean
        found[f"surprisal_spread_{side}"] = seen.sd
        found[f"surprisal_first_{side}"] = seen.by_position[0]
    if len(list(_sides(data))) == 1:
        return found
    chosen, rejected = data.ref_logps().unbind(1)
    ordered = ranks.reference_pair_accuracy(chosen, rejected, seed)
    found |= {"reference_accuracy": ordered.accuracy, "reference_margin": ordered.margin}
    sums, lengths = data.hidden, data.lengths()
    similar = displacement.ches(
        sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1], quantiles=QUANTILES, seed=seed
    )
    found |= {f"ln_ches_{q:g}": x for q, x in similar.quantiles.items()}
    if data.reward is not None:
        won = wins(data.reward[:, 0], data.reward[:, 1])
        found["reward_accuracy"] = share(won[:, None], seed)
    return found


def _against_samples(data: Surveyed, drawn: Surveyed, seed: int) -> Figures:
    """Tier 1: the data's responses among the reference's own samples to the same prompts."""
    found: Figures = {}
    if not len(data.row):
        return found
    s, lengths = drawn.ref_logps(), drawn.lengths()
    for k, side in _sides(data):
        u = uniform(stream_key(seed, "rank", side), data.row)
        logp, length = data.ref_logps()[:, k], data.lengths()[:, k]
        same = _same_tokens(data, k, drawn)
        plain = ranks.pit_ranks(logp, s, u, seed, same)
        matched = ranks.length_matched_ranks(logp, length, s, lengths, u, seed=seed, same=same)
        found[f"rank_low_{side}"], found[f"rank_high_{side}"] = plain.lowest, plain.highest
        found[f"rank_low_matched_{side}"] = matched.lowest
    features, mine = data.features().double(), drawn.features().double()
    found["told_apart"] = two_sample_auc(mine, features, seed=seed)
    if features.shape[1] == 2 and mine.shape[1] >= 2:
        found["feature_ratio"] = feature_ratio(mine, features[:, 0], features[:, 1], seed=seed)
    return found


def _same_tokens(data: Surveyed, response: int, drawn: Surveyed) -> Tensor:
    """Which answers are, token for token, this response of the data to their prompt: [N, m]."""
    width = min(data.mask.shape[-1], drawn.mask.shape[-1])
    mine, theirs = data.tokens[:, response, None, :width], drawn.tokens[..., :width]
    alike = ((mine == theirs) | ~drawn.mask[..., :width]).all(-1)
    return alike & (data.lengths()[:, response, None] == drawn.lengths())


def _ensemble(data: Surveyed, answers: Surveyed, seed: int) -> EnsembleCoverage | None:
    """Of heads that are fitted to all pairs; None without pairs, or two answers to a prompt."""
    places = {int(row): i for i, row in enumerate(data.row)}
    shared = [j for j, row in enumerate(answers.row) if int(row) in places]
    if data.tokens.shape[1] != 2 or answers.tokens.shape[1] < 2 or not shared:
        return None
    chosen, rejected = data.features().double().unbind(1)
    index = torch.tensor(shared)
    place = torch.tensor([places[int(row)] for row in answers.row[index]])
    own = answers.features().double()[index]
    return ensemble_coverage(own, chosen - rejected, place, seed=seed)


def _of_reward(data: Surveyed | None, drawn: Surveyed, seed: int) -> Figures:
    """Tier 2: where the reward stands against the reference's likelihood."""
    assert drawn.reward is not None, "asked for"
    found: Figures = {}
    if data is not None and data.reward is not None and data.reward.shape[1] == 2:
        mine, theirs = same_prompts(data, drawn)
        assert mine.reward is not None and theirs.reward is not None, "judged alike"
        if len(mine.row):
            chosen, rejected = mine.reward.unbind(1)
            level = ranks.reward_quantiles(theirs.reward, chosen, rejected, seed)
            found |= {"reached_chosen": level.chosen, "reached_rejected": level.rejected}
            reach = ranks.best_of_n_reach(theirs.reward, chosen, seed)
            found |= {f"reach_of_{n}": reach[n - 1] for n in (1, 2, 4, 8, 16) if n <= len(reach)}
    tied = misalignment.misalignment(drawn.ref_logps(), drawn.reward, drawn.lengths(), seed)
    found |= {"spearman": tied.spearman, "spearman_at_length": tied.partial}
    found["peak_depth"] = tied.peak_depth
    spread = reward_spread(drawn.reward)
    if spread == 0:
        return found
    curve = tilt.tilt_curve(drawn.reward, [beta * spread for beta in BETAS], seed)
    for beta, optimum in zip(BETAS, curve, strict=True):
        found[f"optimum_kl_{beta:g}"] = optimum.kl
        found[f"optimum_log_c_{beta:g}"] = optimum.log_c
    return found


def reward_spread(reward: Tensor) -> float:
    """Standard deviation of the reward within prompts: what a beta is measured in."""
    return float(reward.var(-1).mean().sqrt()) if reward.shape[-1] > 1 else 0.0


def _of_policy(data: Surveyed | None, own: Surveyed, seed: int) -> Figures:
    """What a finished policy did, and whether it left what the data cover."""
    assert own.logp is not None and own.step_kl is not None, "measured with the policy"
    ratio, ref = own.log_ratio(), own.ref_logps()
    logp = ratio + ref
    found: Figures = {
        "kl": divergence.reverse_kl(logp, ref, seed),
        "kl_by_tokens": divergence.reverse_kl_by_tokens(own.step_kl, own.mask, seed),
        "log_c": divergence.log_concentrability(logp, ref, seed).log_c,
    }
    profile = divergence.coverage_profile(logp, ref, LEVELS, seed)
    found |= {f"left_{n:g}": x for n, x in zip(LEVELS, profile.shares, strict=True)}
    if data is None or data.logp is None or data.tokens.shape[1] != 2:
        return found
    chosen, rejected = data.log_ratio().unbind(1)
    found |= {
        "log_ratio_chosen": mean(chosen[:, None], seed),
        "log_ratio_rejected": mean(rejected[:, None], seed),
        "implicit_accuracy": share(wins(chosen, rejected)[:, None], seed),
    }
    mine, theirs = same_prompts(data, own)
    if len(mine.row):
        chosen, rejected = mine.log_ratio().unbind(1)
        ref = theirs.ref_logps()
        found["gap"] = divergence.offline_gap(theirs.log_ratio() + ref, ref, chosen, rejected, seed)
        if theirs.tokens.shape[1] >= 2:
            policy, pairs = theirs.features().double(), mine.features().double()
            found["feature_ratio_policy"] = feature_ratio(
                policy, pairs[:, 0], pairs[:, 1], seed=seed
            )
    return found


def _of_probe(measured: Measured, probe: Surveyed, scored: Surveyed, seed: int) -> Figures:
    """Tier 3: where a run on the pairs begins to go."""
    assert measured.data is not None and measured.drawn is not None, "measured first"
    assert probe.step_kl is not None, "measured with the probe"
    ref = probe.ref_logps()
    logp = probe.log_ratio() + ref
    by_tokens = divergence.reverse_kl_by_tokens(probe.step_kl, probe.mask, seed)
    found: Figures = {
        "probe_kl": divergence.reverse_kl(logp, ref, seed), "probe_kl_by_tokens": by_tokens,
    }  # fmt: skip
    mine, theirs = same_prompts(scored, probe)
    if by_tokens.value is None or by_tokens.value < LEAST_KL or not len(mine.row):
        far = "nan" if by_tokens.value is None else f"{by_tokens.value:.2g}"
        why = f"the probe has hardly moved: {far} nats, at least {LEAST_KL} are needed; more steps"
        return found | dict.fromkeys(_WHERE, cannot_tell(f"{why} or a higher learning rate"))
    ref, (chosen, rejected) = theirs.ref_logps(), mine.log_ratio().unbind(1)
    found["probe_gap"] = divergence.offline_gap(
        theirs.log_ratio() + ref, ref, chosen, rejected, seed
    )
    _, before = same_prompts(scored, measured.drawn)
    first, after, pairs = (x.features().double() for x in (before, theirs, mine))
    found["probe_feature_ratio"] = feature_ratio(after, pairs[:, 0], pairs[:, 1], seed=seed)
    found["probe_feature_shift"] = feature_shift(first, after, pairs[:, 0], pairs[:, 1], seed=seed)
    heard = _ensemble(measured.data, probe, seed)
    if heard is not None:
        found["probe_ensemble_ratio"] = heard.ratio
    return found


def no_probe(why: str) -> Figures:
    """Of a probe that did not come to its end."""
    return dict.fromkeys(("probe_kl", "probe_kl_by_tokens", *_WHERE), cannot_tell(why))
