"""What a reward model does on held-out pairs, beside rules that read nothing.

A reward model that does not beat "longer wins" has learnt length. Pairs of equal prompts are
resampled together.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune import building
from preftune.adapters import is_classifier
from preftune.data import Rows
from preftune.figures import Figure, Figures, clustered, wins
from preftune.held_out import eval_metrics
from preftune.likelihoods import pair_batches, pair_logp
from preftune.parts import Parts
from preftune.policies.base import Trainable
from preftune.policies.scoring import outputs_all
from preftune.runs import RunFolder

MATCHED = 0.1
"""Lengths count as equal up to this share of the longer."""
BINS = 10

DOCUMENTED = {
    "accuracy": "share of held-out pairs whose chosen response has the larger score (ties half)",
    "accuracy_gain": "accuracy less that of the best rule that reads nothing, on the same pairs",
    "gain_over_RULE": "accuracy less that of one such rule: longer, shorter, writer, ref_logp",
    "accuracy_longer": "share of pairs whose chosen response is the longer, in tokens (ties half)",
    "accuracy_shorter": "the same of the shorter",
    "accuracy_writer": "the same of the one whose writer wins more often in the training pairs",
    "accuracy_ref_logp": "the same of the one with the higher log-prob under the model as it was",
    "accuracy_length_matched": "accuracy on pairs whose lengths differ by at most a tenth",
    "length_matched": "share of such pairs",
    "nll": "mean -log sigmoid(score chosen - score rejected), nats; ln 2 is chance",
    "calibration_error": "mean |confidence - accuracy| over ten bins of equal size",
    "score_margin": "mean score of chosen less rejected, nats of log-odds",
}
"""What each figure is."""


def scores_of(model: Trainable, rows: Rows, budget: int | None) -> Tensor:
    """Scores of both responses of each pair, [N, 2], float64."""
    names = frozenset({"score"})
    parts = [outputs_all(model, part, budget, names)["score"] for part in pair_batches(rows)]
    return torch.cat(parts).double()


def figures(
    scores: Tensor, rules: Mapping[str, Tensor], lengths: Tensor, cluster: Sequence[int]
) -> Figures:
    """Accuracy, calibration and the trivial rules' accuracies with 95 % intervals.

    Args:
        scores: [N, 2] of the chosen and the rejected response.
        rules: by name, [N]: 1 where the rule prefers the chosen response, 0, or 1/2.
        lengths: [N, 2] tokens.
        cluster: of each pair, what is resampled together: its prompt.
    """
    margin = scores[:, 0] - scores[:, 1]
    right = wins(scores[:, 0], scores[:, 1])
    place = torch.tensor(cluster)

    def mean(values: Tensor, keep: Tensor | None = None) -> Figure:
        return clustered(values, place, keep)

    matched = (lengths[:, 0] - lengths[:, 1]).abs() <= MATCHED * lengths.amax(-1)
    best = max(rules, key=lambda name: float(rules[name].mean()))
    out = {
        "accuracy": mean(right),
        "accuracy_gain": mean(right - rules[best]),
        **{f"accuracy_{name}": mean(values) for name, values in rules.items()},
        **{f"gain_over_{name}": mean(right - values) for name, values in rules.items()},
        "length_matched": mean(matched.double()),
        "nll": mean(-F.logsigmoid(margin)),
        "calibration_error": {"value": calibration_error(margin), "low": None, "high": None},
        "score_margin": mean(margin),
    }
    if matched.any():
        out["accuracy_length_matched"] = mean(right, matched)
    return out


def calibration_error(margin: Tensor) -> float:
    """Mean |confidence - accuracy| over bins of equal size, of margins [N] of chosen - rejected.

    The confidence in the preferred response is sigmoid(|margin|); it is right if that is the chosen
    one.
    """
    confidence, order = margin.abs().sigmoid().sort()
    right = wins(margin, torch.zeros_like(margin))[order]
    bins = min(BINS, len(margin))
    gaps = [
        len(c) * float((c.mean() - r.mean()).abs())
        for c, r in zip(confidence.chunk(bins), right.chunk(bins), strict=True)
    ]
    return sum(gaps) / len(margin)


def trivial_rules(rows: Rows, training: Rows | None) -> dict[str, Tensor]:
    """Rules that read nothing, each [N] of 1 (prefers the chosen), 0 or 1/2."""
    lengths = torch.tensor([[len(r) for r in pair] for pair in rows.responses]).double()
    longer = wins(lengths[:, 0], lengths[:, 1])
    rules = {"longer": longer, "shorter": 1 - longer}
    writers = [rows.columns.get(f"{role}_model") for role in ("chosen", "rejected")]
    if training is not None and None not in writers:
        rate = win_rates(training)
        known = torch.tensor(
            [[rate.get(c, 0.5), rate.get(r, 0.5)] for c, r in zip(*writers, strict=True)]  # type: ignore[arg-type]
        )
        rules["writer"] = wins(known[:, 0], known[:, 1])
    return rules


def likelier(parts: Parts, rows: Rows) -> dict[str, Tensor]:
    """The rule that prefers what the model was likelier to say as it was; where it is at hand."""
    if "model" not in parts.config.model_fields_set or is_classifier(parts.config.model):
        return {}
    policy = building.make_policy(parts.config, None, parts.tokenizer)
    budget = parts.micro_batch_tokens
    logp = pair_logp(policy, rows, budget)
    return {"ref_logp": wins(logp[:, 0], logp[:, 1])}


def win_rates(rows: Rows) -> dict[Any, float]:
    """How often each writer (columns chosen_model, rejected_model) wins, by writer."""
    wins: dict[Any, list[int]] = defaultdict(list)
    for name, won in (("chosen_model", 1), ("rejected_model", 0)):
        for writer in rows.columns[name]:
            wins[writer].append(won)
    return {writer: sum(x) / len(x) for writer, x in wins.items()}


def evaluator(parts: Parts, folder: RunFolder) -> Callable[[int, bool], dict[str, Any]]:
    """Evaluation on the held-out pairs, as the loop calls it."""
    rows = parts.held_out
    assert rows is not None, "there are held-out pairs"
    rules = trivial_rules(rows, parts.data) | likelier(parts, rows)
    lengths = torch.tensor([[len(r) for r in pair] for pair in rows.responses])
    clusters: dict[tuple[int, ...], int] = {}
    cluster = [clusters.setdefault(tuple(p), len(clusters)) for p in rows.prompts]

    def evaluate(step: int, last: bool) -> dict[str, Any]:
        scores = scores_of(parts.model, rows, parts.micro_batch_tokens)
        found = figures(scores, rules, lengths, cluster)
        folder.write_json("evaluation.json", found)
        return eval_metrics(found)

    return evaluate
