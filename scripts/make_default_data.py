"""Make the embedded preference data: src/preftune/data/default/pairs.jsonl and heldout.jsonl.

    PYTHONPATH=src .venv/bin/python scripts/make_default_data.py

For each training instruction of prompts.jsonl it samples 8 answers from SmolLM2-135M-Instruct
(temperature 1, top-p 1, at most 48 new tokens, float32, seeded), keeps those that ended by
themselves, leaves out what should not be shipped (UNFIT), scores the rest with the saturating
reward `length:within=20`, that is -max(0, tokens - 20) with the end token not counted, and pairs
the best with the worst and, where there are enough distinct rewards, the second best with the
second worst.

Raw samples are cached in runs/default-data/, one file a batch, so that a rerun resumes there.
`--limit 40` samples 40 instructions spread over the kinds and prints the counts without
writing the data files. Two idle CPU cores need about a quarter of an hour for everything.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from preftune.huggingface import DEFAULT_MODEL, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "src" / "preftune" / "data" / "default"
CACHE = ROOT / "runs" / "default-data"

SYSTEM = "Answer in one or two short sentences."
SAMPLES = 8
BATCH = 64
MAX_NEW_TOKENS = 48
WITHIN = 20
MIN_GAP = 4
SEED = 20250

# Answers that are not shipped, whatever their length: links, handles and hashtags, coarse, sexual
# and violent words, talk of groups of people, and what reading the pairs showed to be about a real
# person or dangerous to follow. The list was written for these samples and is no general filter.
UNFIT = re.compile(
    r"https?:|www\.|\.com\b|@\w|#\w"
    r"|\b(?:sex\w*|teenlove|porn\w*|nude|naked|penis|vagina\w*|breasts?|ass|fuck\w*|shit\w*|bitch\w*"
    r"|damn|kill\w*|murder\w*|suicid\w*|corpses?|bodies|severed|drugs?|cocaine|terroris\w*|bombs?"
    r"|nazis?|jewish|jews?|muslims?|mosque|christians?|immigrants?|\w*ethnic\w*|islam\w*|nigeration"
    r"|amanda knox|robert blake|john maher|oliver cromwell|uganda|dried puppies|venomous"
    r"|balls out|bollocks|dirty touch|human suffering|lick the spot|indigenous)\b",
    re.IGNORECASE,
)


def reward(tokens: int) -> float:
    """The saturating reward `length:within=20`: 0 up to 20 tokens, then minus one a token."""
    return float(min(0, WITHIN - tokens))


def conversation(instruction: str) -> list[dict[str, str]]:
    """The system turn and the user turn of one instruction."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]


def read_prompts() -> list[dict[str, str]]:
    """The instructions of prompts.jsonl, in the order of the file."""
    lines = (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def batches(prompts: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Batches of at most BATCH / SAMPLES instructions, each batch spread over the whole file."""
    count = math.ceil(len(prompts) / (BATCH // SAMPLES))
    return [prompts[start::count] for start in range(count)]


def sample_batch(model: Any, tokenizer: Any, texts: list[str], seed: int) -> list[list[list[int]]]:
    """SAMPLES responses for each rendered prompt, as token ids up to and with the end token."""
    tokenizer.padding_side = "left"
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            **encoded,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=SAMPLES,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    rows = output[:, encoded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    cut = [row[: row.index(end) + 1] if end in row else row for row in rows]
    return [cut[i * SAMPLES : (i + 1) * SAMPLES] for i in range(len(texts))]


def sample_all(
    groups: list[list[dict[str, str]]], chosen: int, tokenizer: Any
) -> dict[str, list[list[int]]]:
    """Responses by instruction for the first `chosen` batches, read from the cache if there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    model: Any = None
    found: dict[str, list[list[int]]] = {}
    began = time.monotonic()
    done = 0
    for index, group in enumerate(groups[:chosen]):
        texts = [
            tokenizer.apply_chat_template(
                conversation(p["instruction"]), tokenize=False, add_generation_prompt=True
            )
            for p in group
        ]
        settings = [DEFAULT_MODEL, SEED + index, SAMPLES, MAX_NEW_TOKENS, texts]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = CACHE / f"{index:03d}-{digest}.json"
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            model = model or load_model(DEFAULT_MODEL, torch.float32)
            rows = sample_batch(model, tokenizer, texts, SEED + index)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(rows), encoding="utf-8")
            os.replace(part, path)
            done += 1
            seconds = time.monotonic() - began
            left = seconds / done * (chosen - index - 1)
            print(
                f"batch {index + 1} of {chosen}: {seconds:.0f} s, about {left:.0f} s left",
                flush=True,
            )
        found.update({p["instruction"]: row for p, row in zip(group, rows, strict=True)})
    return found


def kept_answers(
    rows: list[list[int]], tokenizer: Any, tally: Counter[str]
) -> list[tuple[str, int]]:
    """(text, tokens) of the answers that ended by themselves, are not empty and not a repeat."""
    kept: list[tuple[str, int]] = []
    seen: set[str] = set()
    for row in rows:
        tally["sampled"] += 1
        if row[-1] != tokenizer.eos_token_id:
            tally["cut at the limit"] += 1
            continue
        tally["ended"] += 1
        body = row[:-1]
        text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text.strip():
            tally["empty"] += 1
        elif any(i in tokenizer.all_special_ids for i in body) or "\ufffd" in text:
            tally["special token or broken character"] += 1
        elif UNFIT.search(text):
            tally["unfit to ship"] += 1
        elif text.strip() in seen:
            tally["repeat"] += 1
        else:
            seen.add(text.strip())
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            tally["tokenised to another count"] += tokens != len(body)
            kept.append((text, tokens))
    tally["kept"] += len(kept)
    return kept


def make_pairs(
    answers: list[tuple[str, int]], rng: random.Random
) -> list[tuple[str, str, float, float]]:
    """(chosen, rejected, score_chosen, score_rejected): best v worst, and 2nd best v 2nd worst.

    The second pair needs four distinct rewards. Among answers of equal reward one is drawn.
    """
    by_reward: dict[float, list[str]] = {}
    for text, tokens in answers:
        by_reward.setdefault(reward(tokens), []).append(text)
    levels = sorted(by_reward, reverse=True)
    wanted = [(levels[0], levels[-1])] if len(levels) >= 2 else []
    if len(levels) >= 4:
        wanted.append((levels[1], levels[-2]))
    return [
        (rng.choice(by_reward[high]), rng.choice(by_reward[low]), high, low)
        for high, low in wanted
        if high - low >= MIN_GAP
    ]


def quantiles(values: list[int]) -> str:
    """0, 5, 25, 50, 75, 95 and 100 % quantiles as one line."""
    ordered = sorted(values)
    shares = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    return " ".join(str(ordered[round(q * (len(ordered) - 1))]) for q in shares)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines through a temporary file."""
    part = path.with_suffix(".part")
    part.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(part, path)


def main() -> None:
    """Sample, pair, write and count."""
    parser = argparse.ArgumentParser(description="Make the embedded preference data.")
    parser.add_argument(
        "--limit", type=int, help="sample about this many instructions only; write no data file"
    )
    limit = parser.parse_args().limit
    prompts = read_prompts()
    train = [p for p in prompts if p["split"] == "train"]
    heldout = [p for p in prompts if p["split"] == "heldout"]
    groups = batches(train)
    chosen = (
        len(groups) if limit is None else min(len(groups), math.ceil(limit / (BATCH // SAMPLES)))
    )
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    sampled = sample_all(groups, chosen, tokenizer)

    tally: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    lengths: list[int] = []
    pairs: list[dict[str, Any]] = []
    for entry in train:
        if entry["instruction"] not in sampled:
            continue
        answers = kept_answers(sampled[entry["instruction"]], tokenizer, tally)
        lengths += [tokens for _, tokens in answers]
        rng = random.Random(f"{SEED} {entry['instruction']}")
        made = make_pairs(answers, rng)
        tally["prompts"] += 1
        tally["prompts with a pair"] += bool(made)
        kinds[entry["kind"]] += len(made)
        for best, worst, high, low in made:
            pairs.append(
                {
                    "prompt": conversation(entry["instruction"]),
                    "chosen": best,
                    "rejected": worst,
                    "score_chosen": high,
                    "score_rejected": low,
                    "kind": entry["kind"],
                }
            )
    for name, count in tally.items():
        print(f"{name}: {count}")
    print(f"pairs: {len(pairs)}; share that ended: {tally['ended'] / tally['sampled']:.3f}")
    for name, texts in (
        ("chosen", [p["chosen"] for p in pairs]),
        ("rejected", [p["rejected"] for p in pairs]),
    ):
        counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        print(f"tokens of {name}, quantiles 0 5 25 50 75 95 100: {quantiles(counts)}")
    print(f"tokens of all kept answers: {quantiles(lengths)}")
    print("pairs by kind: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    if limit is None:
        write_lines(DATA / "pairs.jsonl", pairs)
        write_lines(
            DATA / "heldout.jsonl",
            [{"prompt": conversation(p["instruction"]), "kind": p["kind"]} for p in heldout],
        )


if __name__ == "__main__":
    main()
