"""Write the papers' data sets as JSON lines in preftune's columns.

    python recipes/prepare.py alpacafarm-sft tatsu-lab/alpaca_farm --split sft OUT.jsonl

SOURCE is a Hub id, or a local JSON, JSONL or Parquet file of the same columns (then `--split` is
not looked at). Each function below takes one row as the source has it and gives rows as preftune
takes them; rows without a prompt, or without an answer, are left out and counted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PROMPTER, ASSISTANT, END = "<|prompter|>", "<|assistant|>", "<|endoftext|>"
"""Of arXiv 2404.14367's prompts for Pythia; the end token is the only one the tokenizer knows."""


def alpacafarm_sft(row: Row) -> Iterator[Row]:
    """instruction, input, output (split `sft`)."""
    yield {"prompt": _instruction(row), "completion": row["output"]}


def alpacafarm_prompts(row: Row) -> Iterator[Row]:
    """instruction, input (splits `unlabeled`, `val`)."""
    yield {"prompt": _instruction(row)}


def alpacafarm_pairs(row: Row) -> Iterator[Row]:
    """prompt, y_w, y_l, the last two with the prompt before them."""
    (prompt, chosen), (other, rejected) = (_answer(row, name) for name in ("y_w", "y_l"))
    if prompt == other:
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def ultrachat(row: Row) -> Iterator[Row]:
    """messages; one row an answer, since of several turns preftune trains the last."""
    turns = row["messages"]
    for end, turn in enumerate(turns, 1):
        if turn["role"] == "assistant" and end > 1:
            yield {"messages": turns[:end]}


def ultrafeedback(row: Row) -> Iterator[Row]:
    """chosen, rejected as turns, or as text behind `prompt`; the scores are left out, which
    preftune would take for rewards."""
    turns = isinstance(row["chosen"], list)
    prompt = {} if turns else {"prompt": row["prompt"]}
    yield {**prompt, "chosen": row["chosen"], "rejected": row["rejected"]}


def tldr_sft(row: Row) -> Iterator[Row]:
    """query, reference_response (which begins with a blank)."""
    yield {"prompt": row["query"].strip(), "completion": _ended(row["reference_response"])}


def tldr_pairs(row: Row) -> Iterator[Row]:
    """query, chosen, rejected (which begin with a blank)."""
    chosen, rejected = _ended(row["chosen"]), _ended(row["rejected"])
    yield {"prompt": row["query"].strip(), "chosen": chosen, "rejected": rejected}


KINDS: dict[str, Callable[[Row], Iterator[Row]]] = {
    "alpacafarm-sft": alpacafarm_sft,
    "alpacafarm-prompts": alpacafarm_prompts,
    "alpacafarm-pairs": alpacafarm_pairs,
    "ultrachat": ultrachat,
    "ultrafeedback": ultrafeedback,
    "tldr-sft": tldr_sft,
    "tldr-pairs": tldr_pairs,
}


def _instruction(row: Row) -> str:
    text = row["instruction"]
    if row.get("input"):
        text = f"{text}\n{row['input']}"
    return f"{PROMPTER}{text}{END}{ASSISTANT}"


def _ended(text: str) -> str:
    """Without the end token, which preftune adds."""
    return text.removesuffix(END)


def _answer(row: Row, name: str) -> tuple[str, str]:
    """A prompt and its answer, wherever the prompt stands."""
    prompt, tag, answer = row[name].rpartition(ASSISTANT)
    return (prompt + tag, _ended(answer)) if tag else (row["prompt"], _ended(answer))


def _filled(row: Row) -> bool:
    """No part of a row is empty."""
    parts = [v[-1]["content"] if isinstance(v, list) and v else v for v in row.values()]
    return all(isinstance(part, str) and part.strip() for part in parts)


def convert(rows: Iterable[Row], kind: str) -> Iterator[Row | None]:
    """Rows in preftune's columns; None for each that cannot be used.

    Raises:
        SystemExit: a column is missing.
    """
    for row in rows:
        try:
            found = list(KINDS[kind](row))
        except KeyError as error:
            raise SystemExit(
                f"{kind}: no {error} in a row that has {', '.join(row)}. Is it another data set?"
            ) from error
        yield from (new if _filled(new) else None for new in found or [{"": ""}])


def read(source: str, split: str, config: str | None) -> Iterable[Row]:
    """Rows of a local file or of a Hub data set, one after another."""
    from datasets import load_dataset

    if Path(source).exists():
        kind = "parquet" if source.endswith(".parquet") else "json"
        return load_dataset(kind, data_files=source, split="train", streaming=True)
    return load_dataset(source, config, split=split, streaming=True)


def main(args: list[str] | None = None) -> None:
    """Read, convert, write, and say how much."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", help="a Hub id, or a local JSON, JSONL or Parquet file")
    parser.add_argument("output", type=Path, help="a JSONL file, written anew")
    parser.add_argument("--split", default="train", help="of a Hub data set")
    parser.add_argument("--config", help="of a Hub data set that has several")
    given = parser.parse_args(args)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    written = left_out = 0
    with given.output.open("w", encoding="utf-8") as out:
        for row in convert(read(given.source, given.split, given.config), given.kind):
            if row is None:
                left_out += 1
                continue
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print(f"{given.output}: {written} rows, {left_out} left out", file=sys.stderr)


if __name__ == "__main__":
    main()
