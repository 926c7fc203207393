"""The texts that both sides of a benchmark are given, of exact lengths in tokens.

Both sides tokenise the same text themselves, as a user's data would be; that they see the same
token ids is checked by a fingerprint.
"""

import json
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from results import Failed, Skipped

# One token each with a blank before it, in the vocabularies of GPT-2's kind.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city community name president team minute idea body information back parent face others "
    "level office door health person art war history party result change morning reason research"
).split()
LONGEST = 1800
"""Characters of a real pair's prompt with its longer response: about 420 tokens. Neither side has
to cut, and both fit 23 GB beside each other (of 700 tokens, TRL took 18 GB alone)."""


def made_pairs(
    tokenizer: Any, count: int, prompt: int, response: int, seed: int = 0
) -> list[dict[str, str]]:
    """Pairs of plain words: `prompt` tokens, and `response` tokens with the end token."""
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(f" {word}" for word in draw.choices(_WORDS, k=tokens))

    rows = []
    for _ in range(count):
        row = {"prompt": text(prompt)}
        row |= {name: text(response - 1) for name in ("chosen", "rejected")}
        for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
            ended = row[name] + ("" if name == "prompt" else tokenizer.eos_token)
            found = _length(tokenizer, ended)
            if found != length:
                raise Failed(f"a made {name} has {found} tokens, not {length}")
        rows.append(row)
    return rows


def real_pairs(tokenizer: Any, folder: Path, count: int) -> list[dict[str, str]]:
    """Human preferences of all lengths, from all over the file, through the chat template.

    The template is applied here: libraries differ in what they count to a response behind its end
    token, and both sides are to have the same tokens.

    Raises:
        Skipped: the file is not there.
    """
    from preftune.data import load_examples

    path = folder / "hh_helpful.jsonl.gz"
    if not path.is_file():
        raise Skipped(f"{path.name} is not in the repository, nor in ../shared/data beside it")
    rows = []
    for example in load_examples(str(path), want="pairs").examples:
        prompt = _rendered(tokenizer, example.prompt)
        chosen, rejected = example.responses
        if chosen != rejected and len(prompt) + max(len(chosen), len(rejected)) <= LONGEST:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows[:: len(rows) // count][:count]


def prompts(tokenizer: Any, count: int, tokens: int | None = None) -> list[str]:
    """Prompts that ask for short answers, through the chat template, as text; some of the answers
    end early.

    Args:
        tokens: fill each up to exactly so many.
    """
    file = resources.files("preftune.data") / "default" / "heldout.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    draw, found = random.Random(0), []
    for row in rows[:: len(rows) // count][:count]:
        system, *turns = row["prompt"]
        text = _rendered(tokenizer, [system, *turns])
        while tokens and (lacking := tokens - _length(tokenizer, text)) > 0:
            more = "".join(f" {word}" for word in draw.choices(_WORDS, k=lacking))
            system = {**system, "content": system["content"] + more}
            text = _rendered(tokenizer, [system, *turns])
        if tokens and _length(tokenizer, text) != tokens:
            raise Failed(f"a prompt has {_length(tokenizer, text)} tokens, not {tokens}")
        found.append(text)
    return found


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> str:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """A JSONL file; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
