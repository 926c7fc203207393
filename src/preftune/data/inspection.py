"""What training will see of the data, as facts that JSON can hold."""

from collections.abc import Sequence
from typing import Any

import torch

from preftune.data.chat import Renderer
from preftune.data.rows import Report, Rows
from preftune.errors import UserError

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_NAMES = {"pairs": ("chosen", "rejected"), "completions": ("completion",), "prompts": ()}
_CHUNK = 256  # rows padded together


def inspect_rows(
    rows: Rows,
    renderer: Renderer,
    *,
    report: Report | None = None,
    count: int = 3,
    reference_scores: Sequence[tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """The facts that `preftune inspect` prints.

    Args:
        report: of `build_rows`: adds what was dropped, cut and refused.
        count: how many rows are shown token by token.
        reference_scores: a (chosen, rejected) pair a row, higher for the response that the rule
            "higher reference log-prob" would choose.

    Returns:
        rows (prompt text and tokens, each with id, text, part = prompt | response | end, and
        whether it is in the loss mask), bos, end, lengths, rules, and truncation with a report.
    """
    names = _NAMES[rows.kind]
    lengths = {"prompt": quantiles([len(p) for p in rows.prompts])}
    for k, name in enumerate(names):
        lengths[name] = quantiles([len(r[k]) for r in rows.responses])
    facts: dict[str, Any] = {
        "kind": rows.kind,
        "count": len(rows),
        "columns": list(rows.columns),
        "template": "chat" if renderer.chat else "none",
        "rows": [_shown(rows, renderer, i) for i in range(min(count, len(rows)))],
        "bos": _bos(rows, renderer),
        "end": _end(rows, renderer.end_ids),
        "lengths": lengths,
        "rules": trivial_rules(rows, reference_scores=reference_scores),
    }
    if report is not None:
        facts["truncation"] = {
            "kept": report.kept,
            "dropped": report.dropped,
            "cut": report.cut,
            "boundary_merged": report.boundary_merged,
            "longest": report.longest,
            "limit": report.limit,
            "refused": len(report.rejected),
        }
    return facts


def _shown(rows: Rows, renderer: Renderer, index: int) -> dict[str, Any]:
    """One row, token by token, in the order in which the model sees it."""
    prompt, responses = rows.prompts[index], []
    for k, name in enumerate(_NAMES[rows.kind]):
        ids = rows.responses[index][k]
        ended = rows.finished[index][k]
        tokens = _tokens(renderer, ids, "response", in_loss=True)
        if ended and ids[-1] in renderer.end_ids:
            tokens[-1]["part"] = "end"
        responses.append(
            {"name": name, "text": renderer.decode(ids), "finished": ended, "tokens": tokens}
        )
    return {
        "where": rows.where[index],
        "text": "".join(renderer.pieces(prompt)),
        "prompt": _tokens(renderer, prompt, "prompt", in_loss=False),
        "responses": responses,
    }


def _tokens(
    renderer: Renderer, ids: Sequence[int], part: str, *, in_loss: bool
) -> list[dict[str, Any]]:
    return [
        {"id": i, "text": text, "part": part, "loss": in_loss}
        for i, text in zip(ids, renderer.pieces(ids), strict=True)
    ]


def _bos(rows: Rows, renderer: Renderer) -> dict[str, Any]:
    """How many prompts begin with no, one or more BOS tokens."""
    counts: dict[str, int] = {}
    for prompt in rows.prompts:
        leading = 0
        while leading < len(prompt) and prompt[leading] == renderer.bos_id:
            leading += 1
        counts[str(leading)] = counts.get(str(leading), 0) + 1
    return {"id": renderer.bos_id, "rows_by_leading_bos": counts}


def _end(rows: Rows, end_ids: Sequence[int]) -> dict[str, Any]:
    present, missing = _end_tokens(rows, end_ids)
    total = sum(map(len, rows.finished))
    return {
        "ids": list(end_ids),
        "responses": total,
        "finished": present + len(missing),
        "in_loss_mask": present,
    }


def _end_tokens(rows: Rows, end_ids: Sequence[int]) -> tuple[int, list[str]]:
    """Finished responses whose last trained token is an end token, and where the others stand.

    The mask asked is that of the padded samples, as training gets it.
    """
    present, missing = 0, []
    if rows.kind == "prompts":
        return present, missing
    ends = torch.tensor(sorted(end_ids), dtype=torch.long)
    for start in range(0, len(rows), _CHUNK):
        index = range(start, min(start + _CHUNK, len(rows)))
        samples = rows.samples(index)
        last = (samples.lengths() - 1).clamp(min=0).unsqueeze(-1)
        good = torch.isin(samples.tokens.gather(-1, last), ends) & samples.mask.gather(-1, last)
        good = good.squeeze(-1)
        present += int((good & samples.finished).sum())
        bad = (samples.finished & ~good).any(-1)
        missing += [rows.where[i] for i, b in zip(index, bad.tolist(), strict=True) if b]
    return present, missing


def check_end_token(rows: Rows, end_ids: Sequence[int]) -> None:
    """Refuse data whose finished responses do not teach the model to end.

    Raises:
        UserError: a finished response has no end token in the trained mask.
    """
    _, missing = _end_tokens(rows, end_ids)
    if missing:
        raise UserError(
            f"data: the end token is not in the loss mask of {len(missing)} of {len(rows)} rows "
            f"({', '.join(missing[:3])}{', ...' if missing[3:] else ''}): the model would not "
            f"learn to end. End tokens looked for: {sorted(end_ids)}. Check the chat template "
            "and eos_token, or mark the responses as not finished."
        )


def trivial_rules(
    rows: Rows, *, reference_scores: Sequence[tuple[float, float]] | None = None
) -> dict[str, float]:
    """In which share of the pairs a rule without judgement predicts the preference.

    "longer" and "shorter" compare response tokens, the end token not counted. A tie counts half.

    Args:
        reference_scores: as in `inspect_rows`: adds "higher_reference_logp".
    """
    if rows.kind != "pairs" or not len(rows):
        return {}
    lengths = [
        tuple(len(ids) - done for ids, done in zip(r, f, strict=True))
        for r, f in zip(rows.responses, rows.finished, strict=True)
    ]
    longer = _share([(float(a), float(b)) for a, b in lengths])
    rules = {"longer": longer, "shorter": 1 - longer}
    if reference_scores is not None:
        if len(reference_scores) != len(rows):
            raise ValueError(f"{len(reference_scores)} reference scores for {len(rows)} rows")
        rules["higher_reference_logp"] = _share(reference_scores)
    return rules


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Smallest, median, 90 %, 99 % and largest of some lengths, and their mean."""
    x = torch.tensor(values, dtype=torch.float64)
    cuts = torch.quantile(x, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    names = ("min", "p50", "p90", "p99", "max")
    return {**dict(zip(names, cuts, strict=True)), "mean": float(x.mean())}
