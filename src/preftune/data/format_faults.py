"""Faults of template and end token, in the tokens of prompts and responses."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from preftune.data.findings import Finding, bools, finding, unknown
from preftune.data.rows import Rows

Decode = Callable[[Sequence[int]], str]

PILE = 5
"""Responses of exactly the largest length, above which they look cut there."""
PILE_LENGTH = 32
"""Tokens; answers shorter than that often have equal lengths of themselves."""
_MARKS = r"<\|\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>"
_TEMPLATE_MARK = re.compile(_MARKS)
_ROLE_MARK = re.compile(rf"{_MARKS}|^(?:### ?)?(?:Human|Assistant|User|Instruction):", re.M)


def format_faults(
    rows: Rows, end_ids: Sequence[int], bos_id: int | None, decode: Decode | None
) -> list[Finding]:
    """Faults of template and end token."""
    twice = bools([p[:2] == [bos_id, bos_id] for p in rows.prompts])
    found = [unknown("doubled_bos") if bos_id is None else finding("doubled_bos", rows, twice)]
    ends = set(end_ids)
    done = [
        [f and (not ends or not ends.isdisjoint(ids[-1:])) for ids, f in zip(r, d, strict=True)]
        for r, d in zip(rows.responses, rows.finished, strict=True)
    ]
    bodies = [
        [ids[: len(ids) - e] for ids, e in zip(r, d, strict=True)]
        for r, d in zip(rows.responses, done, strict=True)
    ]
    texts = [[decode(ids) for ids in row] for row in bodies] if decode is not None else None
    marks = unknown("role_markers")
    if texts is not None and decode is not None:
        marks = finding("role_markers", rows, _marked(rows, texts, decode))
    found.append(marks)
    if rows.kind == "prompts":
        return found
    said = bodies if texts is None else [[text.strip() for text in row] for row in texts]
    inside = bools([[not ends.isdisjoint(ids) for ids in row] for row in bodies])
    return [
        *found,
        finding("unfinished", rows, ~bools(done)),
        finding("end_inside", rows, inside) if ends else unknown("end_inside"),
        finding("empty", rows, bools([[not x for x in row] for row in said])),
        finding("cut", rows, _cut(rows, bodies, bools(done))),
    ]


def _marked(rows: Rows, texts: Sequence[Sequence[str]], decode: Decode) -> Tensor:
    """Rows with a marker in a response, or a template's marker in the prompt as it was given.

    One that the template itself puts into the prompt is not in the given text; one that the
    tokenizer took as a special token is not in the decoded text.
    """
    found = []
    for prompt, given, row in zip(rows.prompts, rows.texts, texts, strict=True):
        text = given if isinstance(given, str) else "\n".join(t["content"] for t in given)
        asked = _TEMPLATE_MARK.search(text) and _TEMPLATE_MARK.search(decode(prompt))
        found.append(bool(asked) or any(_ROLE_MARK.search(text) for text in row))
    return bools(found)


def _cut(rows: Rows, bodies: Sequence[Sequence[Sequence[int]]], done: Tensor) -> Tensor:
    """Responses that were cut at a limit: theirs, or that of prompt and response together."""
    own = torch.tensor([[len(ids) for ids in row] for row in bodies]).reshape(done.shape)
    prompt = torch.tensor([len(p) for p in rows.prompts]).reshape(-1, 1)
    # Only what is unfinished was cut by us; what others cut may bear an end token by mistake.
    return _piled(own, torch.ones_like(done)) | _piled(own + prompt, ~done)


def _piled(lengths: Tensor, among: Tensor) -> Tensor:
    """Those of the very largest length, if far more have it than stand shortly below."""
    some = lengths[among]
    if not len(some) or (top := int(some.max())) < PILE_LENGTH:
        return torch.zeros_like(among)
    at = int((some == top).sum())
    below = int(((some < top) & (some >= 0.9 * top)).sum())
    # Where all are as long, that is the task.
    fits = at >= PILE and at > below and at < len(some)
    return among & (lengths == top) if fits else torch.zeros_like(among)
