"""The embedded preference data: what its README promises, checked on the shipped files."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

DATA = Path(str(resources.files("preftune.data") / "default"))
SYSTEM = {"role": "system", "content": "Answer in one or two short sentences."}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return read("prompts.jsonl")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read("pairs.jsonl")


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, Any]]:
    return read("heldout.jsonl")


def template(instruction: str) -> str:
    """The first four words: instructions of one template share them."""
    return " ".join(instruction.lower().split()[:4])


def test_there_are_enough_instructions_of_enough_kinds(prompts: list[dict[str, Any]]) -> None:
    texts = [p["instruction"] for p in prompts]
    assert len(texts) >= 400
    assert len({t.lower() for t in texts}) == len(texts)
    assert len({p["kind"] for p in prompts}) >= 32
    assert max(Counter(template(t) for t in texts).values()) <= 10
    assert all(t == t.strip() and t for t in texts)


def test_every_kind_is_in_both_splits(prompts: list[dict[str, Any]]) -> None:
    split = {s: [p for p in prompts if p["split"] == s] for s in ("train", "heldout")}
    assert len(split["train"]) + len(split["heldout"]) == len(prompts)
    assert len(split["train"]) >= 336 and len(split["heldout"]) >= 60
    assert {p["kind"] for p in split["train"]} == {p["kind"] for p in split["heldout"]}


def test_heldout_prompts_are_those_marked_and_in_no_pair(
    prompts: list[dict[str, Any]], pairs: list[dict[str, Any]], heldout: list[dict[str, Any]]
) -> None:
    marked = [(p["instruction"], p["kind"]) for p in prompts if p["split"] == "heldout"]
    assert [(h["prompt"][1]["content"], h["kind"]) for h in heldout] == marked
    train = {(p["instruction"], p["kind"]) for p in prompts if p["split"] == "train"}
    used = {(p["prompt"][1]["content"], p["kind"]) for p in pairs}
    assert used <= train
    assert not {text.lower() for text, _ in used} & {text.lower() for text, _ in marked}


def test_every_prompt_is_a_system_turn_and_a_user_turn(
    pairs: list[dict[str, Any]], heldout: list[dict[str, Any]]
) -> None:
    for row in [*pairs, *heldout]:
        system, user = row["prompt"]
        assert system == SYSTEM
        assert user == {"role": "user", "content": user["content"]}


def test_there_are_enough_pairs_and_few_bytes(pairs: list[dict[str, Any]]) -> None:
    per_prompt = Counter(p["prompt"][1]["content"] for p in pairs)
    assert len(pairs) >= 300
    assert len(per_prompt) >= 200
    assert max(per_prompt.values()) <= 2
    assert len({p["kind"] for p in pairs}) >= 30
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2_000_000


def test_pairs_are_labelled_by_the_saturating_reward(
    pairs: list[dict[str, Any]], smollm: Any
) -> None:
    lengths: list[int] = []
    for row in pairs:
        for side in ("chosen", "rejected"):
            text = row[side]
            tokens = smollm(text, add_special_tokens=False)["input_ids"]
            assert text.strip()
            assert not set(tokens) & set(smollm.all_special_ids)
            assert row[f"score_{side}"] == -max(0, len(tokens) - 20)
            lengths.append(len(tokens))
        assert row["chosen"].strip() != row["rejected"].strip()
        assert row["score_chosen"] - row["score_rejected"] >= 4
    assert min(lengths) <= 5 and max(lengths) >= 45
    # Re-tokenising may differ from the sampled ids by a few tokens, not by many.
    assert max(lengths) <= 52
    # No part of the range from 5 to 45 is bare.
    assert all(any(low <= n < low + 5 for n in lengths) for low in range(5, 45, 5))
