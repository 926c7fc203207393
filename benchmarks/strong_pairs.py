"""Pairs of known character: one strong writer's answer against the model's own sample.

DATA is a preference file that names the writers of its responses, in the columns `chosen_model`
and `rejected_model` (as alpaca_judged.jsonl.xz does). One of them is the strong writer: by default
the one that answered most prompts, and of equal ones the one preferred most often. What it wrote
is `chosen`, wherever it stands in DATA and with nothing cut off; `rejected` is one sample of the
model at temperature 1 with nothing filtered, `rejected_finished` false where it met the limit.

    python benchmarks/strong_pairs.py DATA OUTPUT.jsonl [--model smollm2-135m] [--writer NAME]
        [--count 300] [--seed 0] [--max-new-tokens 48]
    python benchmarks/strong_pairs.py DATA OUTPUT.jsonl --own length:within=20

With --own both responses are the model's samples, the better by that reward chosen; pairs that it
ties are left out. OUTPUT is a data file as every command takes it. Samples that are empty or equal
to the chosen response make no pair.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preftune import building, judges, loading
from preftune.config import Config, load
from preftune.data import Renderer, Rows
from preftune.data.files import read_file
from preftune.errors import UserError
from preftune.evaluate import Answers, answer
from preftune.numerics import permutation, stream_key

SIDES = ("chosen", "rejected")
Row = dict[str, Any]


def written(rows: Iterable[Any]) -> tuple[dict[str, dict[str, str]], Counter[str]]:
    """Of each writer the first response to each prompt, and how often it was preferred."""
    found: dict[str, dict[str, str]] = {}
    won: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            continue
        for side in SIDES:
            writer, text = row.get(f"{side}_model"), row.get(side)
            if isinstance(writer, str) and isinstance(text, str) and text.strip():
                found.setdefault(writer, {}).setdefault(row["prompt"], text)
                won[writer] += side == "chosen"
    return found, won


def strongest(found: dict[str, dict[str, str]], won: Counter[str], given: str | None) -> str:
    """The writer whose responses are taken.

    Raises:
        UserError: nobody is named, or not the one who was asked for.
    """
    if not found:
        raise UserError("data: no row names its writers in chosen_model and rejected_model.")
    if given is not None and given not in found:
        most = ", ".join(sorted(found, key=lambda w: -len(found[w]))[:5])
        raise UserError(f"writer '{given}': wrote nothing there. Those who wrote most: {most}.")
    return given or max(found, key=lambda w: (len(found[w]), won[w], w))


def asked(answers: dict[str, str], count: int, seed: int) -> list[Row]:
    """Rows of prompt and answer, `count` of them drawn by the seed."""
    prompts = sorted(answers)
    order = permutation(stream_key(seed, "strong pairs"), 0, len(prompts))[:count]
    return [{"prompt": p, "answer": answers[p]} for p in (prompts[i] for i in order.tolist())]


def against(rows: Rows, drawn: Answers, renderer: Renderer, writer: str) -> Iterator[Row]:
    """The writer's answer chosen, the model's one sample rejected."""
    for i, ids in enumerate(drawn.tokens()):
        text, chosen = renderer.decode(ids[0]), rows.columns["answer"][i]
        if text.strip() and text != chosen:
            yield {
                "prompt": rows.texts[i], "chosen": chosen, "rejected": text,
                "rejected_finished": bool(drawn.samples.finished[i, 0]),
                "chosen_model": writer, "rejected_model": "own",
            }  # fmt: skip


def ranked(rows: Rows, drawn: Answers, renderer: Renderer) -> Iterator[Row]:
    """Two samples of the model, the better by the one reward chosen."""
    (scores,) = drawn.rewards.values()
    for i, ids in enumerate(drawn.tokens()):
        best = int(scores[i].argmax())
        texts = [renderer.decode(ids[k]) for k in (best, 1 - best)]
        score, done = scores[i].tolist(), drawn.samples.finished[i].tolist()
        if all(t.strip() for t in texts) and score[0] != score[1]:
            yield {
                "prompt": rows.texts[i], "chosen": texts[0], "rejected": texts[1],
                "chosen_finished": done[best], "rejected_finished": done[1 - best],
                "score_chosen": score[best], "score_rejected": score[1 - best],
            }  # fmt: skip


def sampled(
    settings: Config, prompts: list[Row], reward: str | None
) -> tuple[Rows, Answers, Renderer]:
    """One sample to each prompt, or two judged ones."""
    judge = judges.make_reward(reward, None)
    policy, tokenizer = loading.model_of(settings, settings.model)
    renderer = building.make_renderer(settings, tokenizer, policy)
    rows, report, refused = loading.load_rows(
        prompts, settings, renderer, want="prompts", context=building.context_of(policy.model),
        reserve=settings.max_new_tokens,
    )  # fmt: skip
    print(loading.describe(rows, report, len(refused)), file=sys.stderr)
    named = {} if judge is None else {judge.name: judges.judge_of(judge, rows, renderer)}
    drawn = answer(
        policy, None, rows, named, samples_per_prompt=1 if judge is None else 2,
        seed=settings.seed,
        progress=lambda done, total: print(f"{done} of {total} prompts", file=sys.stderr),
    )  # fmt: skip
    return rows, drawn, renderer


def make(given: argparse.Namespace) -> None:
    """Read, sample and write.

    Raises:
        UserError: something given cannot be used.
    """
    settings = load(
        {"model": given.model, "seed": given.seed, "max_new_tokens": given.max_new_tokens}
    )
    if given.count < 1:
        raise UserError(f"count: is {given.count}. Give 1 or more.")
    found, won = written(row for _, row in read_file(given.data))
    writer = strongest(found, won, given.writer)
    prompts = asked(found[writer], given.count, given.seed)
    print(f"{writer} answered {len(found[writer])} prompts, {len(prompts)} taken", file=sys.stderr)
    rows, drawn, renderer = sampled(settings, prompts, given.own)
    pairs = ranked(rows, drawn, renderer) if given.own else against(rows, drawn, renderer, writer)
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("".join(lines), encoding="utf-8")
    ended = float(drawn.samples.finished.double().mean())
    print(f"{given.output}: {len(lines)} pairs; {ended:.0%} of the samples ended", file=sys.stderr)


def main() -> int:
    """Make the pairs.

    Returns:
        2 for what cannot be used, with one message.
    """
    parser = argparse.ArgumentParser(description="Strong answers against the model's own samples.")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--writer", help="whose answers are chosen; default: who wrote most")
    parser.add_argument("--count", type=int, default=300, help="prompts at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--own", metavar="REWARD", help="two own samples, ranked by this reward")
    try:
        make(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
