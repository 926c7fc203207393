"""Rows of any accepted shape, turned into one: a prompt and its responses.

Accepted, by columns (further columns are kept for reward functions and labels):

    prompt, chosen, rejected     text or role/content lists; the prompt may be implicit
    prompt, completion[, label]  text or role/content lists
    messages                     the last assistant turn trains
    prompt                       for methods that sample

Of several turns the last assistant turn trains and all before it is the prompt. "Human:/Assistant:"
dialogues of HH-RLHF become role/content lists. An implicit prompt is never guessed from text:
chosen and rejected must be dialogues whose turns before the last are equal, or the row is
refused ("chosen and rejected do not share a prompt").
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from preftune.data.files import Malformed
from preftune.errors import nearest

Message = dict[str, str]
Prompt = list[Message] | str

KINDS = ("pairs", "completions", "prompts")
COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")
LABELS = ("label", "margin", "probability", "score_chosen", "score_rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_OPEN: Message = {"role": "assistant", "content": ""}
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row in canonical form."""

    prompt: Prompt
    """Turns with role and content, or plain text."""
    responses: tuple[str, ...]
    """(chosen, rejected), (completion,) or ()."""
    finished: tuple[bool, ...]
    """One a response: it ended by itself, so an end token follows it."""
    columns: dict[str, Any]
    """All other columns of the row."""
    where: str
    """File and 1-based row or line, as "hh.jsonl.gz:12"."""

    def as_row(self) -> dict[str, Any]:
        """The row as a file may hold it: what is read of it is this example again."""
        sides = ("chosen", "rejected") if len(self.responses) == 2 else ("completion",)
        flags = tuple(f"{s}_finished" for s in sides) if len(sides) == 2 else ("finished",)
        out: dict[str, Any] = {"prompt": self.prompt}
        for at, said in enumerate(self.responses):
            out |= {sides[at]: said} | ({} if self.finished[at] else {flags[at]: False})
        return out | self.columns


class Refused(Exception):
    """A row cannot be used; the message is the reason."""


def allowed(want: str) -> tuple[str, ...]:
    """The kinds of rows that serve where `want` is asked for."""
    return {"pairs": KINDS[:1], "completions": KINDS[:2]}.get(want, KINDS)


def kind_of(row: dict[str, Any]) -> str | None:
    """What the filled columns of a row make of it; None if they make nothing."""
    filled = {c for c in COLUMNS if row.get(c) is not None}
    if {"chosen", "rejected"} <= row.keys() and filled & {"chosen", "rejected"}:
        return "pairs"
    if filled & {"completion", "messages"}:
        return "completions"
    # Half a pair is a misspelt column, not a prompt that happens to have company.
    return "prompts" if "prompt" in filled and not filled & {"chosen", "rejected"} else None


def canonical(row: Any, want: str, where: str) -> tuple[str, Example]:
    """The kind of a row and its canonical form."""
    if isinstance(row, Malformed):
        raise Refused(row.reason)
    if not isinstance(row, dict):
        raise Refused(f"not an object: {type(row).__name__}")
    kind = kind_of(row)
    if kind is None:
        raise Refused(f"no usable column: {', '.join(map(str, row)) or 'none at all'}")
    if kind not in allowed(want):
        raise Refused(f"not what is wanted here: {kind}, not {want}")
    used: tuple[str, ...]
    if kind == "pairs":
        used = ("prompt", "chosen", "rejected")
        flags = ("chosen_finished", "rejected_finished")
        prompt, responses = _pair(row, want)
    elif kind == "completions":
        own = "completion" if row.get("completion") is not None else "messages"
        used, flags = ("prompt", own) if own == "completion" else (own,), ("finished",)
        prompt, responses = _single(row, own, want)
    else:
        used, flags, responses = ("prompt",), (), ()
        prompt, _ = _prompt(row["prompt"])
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Refused("the prompt ends in an assistant turn")
    finished = tuple(_flag(row, name) for name in flags)
    if want == "prompts":
        kind, responses, finished = "prompts", (), ()
    columns = {k: v for k, v in row.items() if k not in (*used, *flags)}
    columns.update(_labels(kind, columns))
    example = Example(
        prompt=prompt, responses=responses, finished=finished, columns=columns, where=where
    )
    return kind, example


def _pair(row: dict[str, Any], want: str) -> tuple[Prompt, tuple[str, ...]]:
    prompts, responses = [], []
    for name in ("chosen", "rejected"):
        prompt, response = _split(row.get("prompt"), row.get(name), name)
        prompts.append(prompt)
        responses.append(response)
    if any(isinstance(p, list) for p in prompts):  # one side may be text, the other turns
        prompts = [[_user(p)] if isinstance(p, str) else p for p in prompts]
    if prompts[0] != prompts[1]:
        raise Refused("chosen and rejected do not share a prompt")
    if want != "prompts":
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            _check_text(response, name)
        if responses[0] == responses[1]:
            raise Refused("chosen and rejected are identical")
    return prompts[0], tuple(responses)


def _single(row: dict[str, Any], name: str, want: str) -> tuple[Prompt, tuple[str, ...]]:
    value = row[name]
    if name == "messages":
        turns = _turns(value, name)
        if turns[-1]["role"] != "assistant":
            if want != "prompts":
                raise Refused("messages do not end in an assistant turn")
            return _prompt(turns)[0], ()
        prompt, response = _split(None, value, name)
    else:
        prompt, response = _split(row.get("prompt"), value, name)
    if want != "prompts":
        _check_text(response, name)
    return prompt, (response,)


def _split(given: Any, value: Any, name: str) -> tuple[Prompt, str]:
    """The prompt and the response of a text, of turns, or of a whole dialogue."""
    value = _dialogue(value)
    if isinstance(value, str):
        if given is None:
            raise Refused(
                f"no prompt: {name} is plain text that is no dialogue; add a column 'prompt'"
            )
        prompt, was_dialogue = _prompt(given)
        return prompt, value.strip() if was_dialogue else value
    turns = _turns(value, name)
    if turns[-1]["role"] != "assistant":
        raise Refused(f"{name} does not end in an assistant turn")
    earlier, response = turns[:-1], turns[-1]["content"]
    if given is None:
        if not earlier:
            raise Refused("empty prompt")
        return _prompt(earlier)[0], response
    prompt, _ = _prompt(given)
    return _joined(prompt, earlier, name), response


def _joined(prompt: Prompt, earlier: list[Message], name: str) -> Prompt:
    """The prompt of turns that come with a prompt column: they may repeat it, or go on from it."""
    if isinstance(prompt, str):
        repeated = any(
            t["role"] == "user" and t["content"].strip() == prompt.strip() for t in earlier
        )
        prompt = [_user(prompt)]
    else:
        repeated = prompt in (earlier[: len(prompt)], earlier[-len(prompt) :])
    if repeated:
        return _prompt(earlier)[0]
    if earlier and earlier[0]["role"] != "assistant":
        raise Refused(f"the prompt is no part of the turns of {name}")
    return prompt + earlier


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _dialogue(value: Any) -> Any:
    """Turns of a "Human: ... Assistant: ..." text; any other value as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    marks = list(_TURN.finditer(text))
    if len(marks) < 2 or marks[0].start() != 0 or marks[0][1] != "Human":
        return value
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [
        {
            "role": "user" if mark[1] == "Human" else "assistant",
            "content": text[mark.end() : end].strip(),
        }
        for mark, end in zip(marks, ends, strict=True)
    ]


def _prompt(value: Any) -> tuple[Prompt, bool]:
    """A checked prompt, and whether it was a dialogue left open for the assistant's answer."""
    turns = _dialogue(value)
    if isinstance(value, str) and isinstance(turns, list) and turns[-1] == _OPEN:
        return _prompt(turns[:-1])[0], True
    if isinstance(value, str):
        _check_text(value, "prompt")
        return value, False
    if isinstance(value, list) and not value:
        raise Refused("empty prompt")
    checked = _turns(value, "prompt")
    _check_text(checked[-1]["content"], "prompt")
    return checked, False


def _turns(value: Any, name: str) -> list[Message]:
    """Role/content lists, checked; further keys of a turn are left out."""
    if isinstance(value, dict):
        value = [value]
    if value is None:
        raise Refused(f"empty {name}")
    if not isinstance(value, list):
        raise Refused(f"{name} is not text: {type(value).__name__}")
    if not value:
        raise Refused(f"empty {name}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise Refused(f"{name} has a turn without role and content")
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise Refused(f"unknown role: {role!r} in {name}.{nearest(str(role), ROLES)}")
        if not isinstance(content, str):
            raise Refused(f"{name} is not text: a turn's content is {type(content).__name__}")
        _check_unicode(content, name)
        turns.append({"role": role, "content": content})
    return turns


def _check_text(value: Any, name: str) -> None:
    if not value.strip():
        raise Refused(f"empty {name}")
    _check_unicode(value, name)


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: JSON allows it, tokenizers do not
        raise Refused(f"{name} is not valid Unicode") from error


def _flag(row: dict[str, Any], name: str) -> bool:
    value = row.get(name)
    if value is None:
        return True
    word = str(value).strip().lower().removesuffix(".0")
    if word not in _WORDS:
        raise Refused(f"{name} is neither true nor false: {value!r}")
    return _WORDS[word]


def _labels(kind: str, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that teach, as numbers (a CSV holds them as text)."""
    taught = {"pairs": LABELS[1:], "completions": LABELS[:1]}.get(kind, ())
    out: dict[str, Any] = {}
    for name in taught:
        value = columns.get(name)
        if value is None:
            continue
        if name == "label":
            out[name] = _flag(columns, name)
            continue
        number = _number(value)
        if number is None:
            raise Refused(f"{name} is not a finite number: {value!r}")
        if name == "probability" and not 0 <= number <= 1:
            raise Refused(f"probability is outside 0 to 1: {value!r}")
        out[name] = number
    return out


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
