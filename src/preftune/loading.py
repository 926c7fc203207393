"""From settings to rows of token ids, and what a method wants of them. Nothing is written here."""

from dataclasses import replace
from typing import Any

import torch

from preftune import building, huggingface
from preftune.config import Config
from preftune.data import (
    Rejected,
    Renderer,
    Report,
    Rows,
    build_rows,
    check_bad_rows,
    load_examples,
)  # fmt: skip
from preftune.errors import UserError
from preftune.method import Method
from preftune.policies.transformer import Transformer
from preftune.sources import Offline, Pool, Reference

DEFAULT_MAX_LENGTH = 1024


def load_rows(
    source: Any,
    config: Config,
    renderer: Renderer,
    *,
    want: str,
    context: int | None,
    reserve: int = 0,
) -> tuple[Rows, Report, list[Rejected]]:
    """A data source as token ids; refused rows are returned, too many of them are an error."""
    called = _called(source, config)
    try:
        return _load_rows(source, config, renderer, want, context, reserve)
    except UserError as error:
        error.args = (_placed(str(error), source, called),)
        raise


def _called(source: Any, config: Config) -> str:
    """The setting that the source was given by."""
    names = ("data", "prompts", "eval_data")
    return next((n for n in names if source is not None and getattr(config, n) == source), "data")


def _placed(message: str, source: Any, called: str) -> str:
    """The message with the name of the file and of the setting."""
    if message.startswith("data: "):
        return f"{called} '{_named(source)}': {message.removeprefix('data: ')}"
    return called + message.removeprefix("data") if message.startswith("data ") else message


def _load_rows(
    source: Any, config: Config, renderer: Renderer, want: str, context: int | None, reserve: int
) -> tuple[Rows, Report, list[Rejected]]:
    loaded = load_examples(source, want=want, max_rows=config.max_rows)
    limits = [n for n in (config.max_length or DEFAULT_MAX_LENGTH, context) if n is not None]
    limit = config.max_length or min(limits)
    try:
        rows, report = build_rows(
            loaded.examples, renderer, max_length=limit, truncation=config.truncation,
            context=context, reserve=reserve,
        )  # fmt: skip
    except UserError:
        check_bad_rows(loaded, config.bad_rows)
        raise
    check_bad_rows(loaded, config.bad_rows, later=report.rejected)
    return rows, report, [*loaded.rejected, *report.rejected]


def describe(rows: Rows, report: Report, refused: int) -> str:
    """What became of the data, in one line."""
    counts = {
        "refused": refused,
        "dropped as too long": report.dropped,
        "cut": report.cut,
        "with a token across the boundary": report.boundary_merged,
    }
    return ", ".join(
        [f"data: {len(rows)} {rows.kind}", *(f"{n} {what}" for what, n in counts.items() if n)]
    )


def _named(source: Any) -> str:
    return source if isinstance(source, str) else str(getattr(source, "path", "in memory"))


def want_of(method: Method) -> str:
    """What the row's sources need of the data."""
    most = max((min(max(1, t.labeller.given), t.source.reads) for t in method.terms), default=0)
    return ("prompts", "completions", "pairs")[most]


def draws_from_reference(source: Any) -> bool:
    """Whether the source, or a member of it, samples the reference."""
    if isinstance(source, Pool):
        return any(draws_from_reference(m) for m in source.members)
    return isinstance(source, Reference)


def has_scores(rows: Rows) -> bool:
    """Whether the data score both responses of every pair."""
    columns = [rows.columns.get(n) for n in ("score_chosen", "score_rejected")]
    return all(c is not None and None not in c for c in columns)


def fitted(method: Method, rows: Rows, *, scored: bool) -> Method:
    """The row with its sources told how many responses a row of the data holds, and whether the
    data's own scores are the rewards."""
    held = len(rows.responses[0])

    def fit(source: Any) -> Any:
        if isinstance(source, Offline) and held:
            return replace(source, responses=held, scored=scored)
        if isinstance(source, Pool):
            return replace(source, members=tuple(fit(m) for m in source.members))
        return source

    return replace(method, terms=tuple(replace(t, source=fit(t.source)) for t in method.terms))


def unused(method: Method, rows: Rows) -> list[str]:
    """Columns of labels that an objective of the method cannot take, each as a note."""
    notes = []
    for column, setting in (("probability", "label_smoothing"), ("margin", "margin")):
        given = [t for t in method.terms if t.labeller.given > 1 and t.source.reads > 1]
        if column in rows.columns and given and not any(t.takes(setting) for t in given):
            names = ", ".join(sorted({t.objective.__name__ for t in given}))
            notes.append(f"the column '{column}' is not used: {names} takes no {setting}")
    return notes


def split_off(rows: Rows, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and about `count` others, by whole prompts: one that is trained on tells
    about its other rows."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(rows.prompts):
        by_prompt.setdefault(tuple(ids), []).append(i)
    groups = list(by_prompt.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    held: list[int] = []
    for place in order.tolist():
        if len(held) >= count or len(held) + len(groups[place]) == len(rows):
            break
        held.extend(groups[place])
    return sorted(set(range(len(rows))) - set(held)), held


def model_of(config: Config, name: str) -> tuple[Transformer, Any]:
    """A model by name, and its tokenizer."""
    tokenizer = huggingface.load_tokenizer(name)
    return building.make_policy(
        config.model_copy(update={"model": name}), None, tokenizer
    ), tokenizer


def prompts_of(config: Config, policy: Transformer, tokenizer: Any) -> tuple[Rows, Renderer]:
    """The rows that are answered, and their renderer."""
    source = config.prompts or config.data
    if source is None:
        raise UserError("prompts: give --prompts a file or a Hub id.")
    renderer = building.make_renderer(config, tokenizer, policy)
    rows, _, _ = load_rows(
        source, config, renderer, want="prompts", context=building.context_of(policy.model),
        reserve=config.max_new_tokens,
    )  # fmt: skip
    return rows, renderer
