"""What `preftune inspect` says of rows, and the data that it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preftune.data import (
    Renderer,
    build_rows,
    check_end_token,
    inspect_rows,
    load_examples,
    trivial_rules,
)
from preftune.data.inspection import quantiles
from preftune.errors import UserError

PAIRS = [
    {"prompt": "ab", "chosen": "cde", "rejected": "f"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_finished": False},
    {"prompt": "a", "chosen": "x", "rejected": "y"},
    {"prompt": "abcd", "chosen": "longest", "rejected": "not"},
]


@pytest.fixture
def plain(tiny: Callable[..., Any]) -> Renderer:
    return Renderer(tiny(bos=True))


def rows_of(renderer: Renderer, rows: list[dict[str, Any]] = PAIRS):
    return build_rows(load_examples(rows).examples, renderer, max_length=None)


def test_tokens_carry_their_part_and_the_mask(plain: Renderer):
    rows, _ = rows_of(plain)
    shown = inspect_rows(rows, plain, count=2)["rows"]
    assert len(shown) == 2 and shown[0]["where"] == "data:1" and shown[0]["text"] == "<s>ab"
    prompt = [(t["text"], t["part"], t["loss"]) for t in shown[0]["prompt"]]
    assert prompt == [(t, "prompt", False) for t in ("<s>", "a", "b")]
    chosen, rejected = shown[0]["responses"]
    assert (chosen["name"], chosen["text"], rejected["name"]) == ("chosen", "cde", "rejected")
    assert [(t["text"], t["part"], t["loss"]) for t in rejected["tokens"]] == [
        ("f", "response", True),
        ("</s>", "end", True),
    ]
    cut = shown[1]["responses"][0]
    assert not cut["finished"] and [t["part"] for t in cut["tokens"]] == ["response"]


def test_facts_are_json_and_count(plain: Renderer):
    rows, report = rows_of(plain)
    facts = json.loads(json.dumps(inspect_rows(rows, plain, report=report)))
    assert facts["bos"] == {"id": 0, "rows_by_leading_bos": {"1": 4}}
    assert facts["end"] == {"ids": [1], "responses": 8, "finished": 7, "in_loss_mask": 7}
    assert facts["truncation"]["kept"] == 4 and facts["truncation"]["limit"] is None
    assert facts["lengths"]["prompt"]["max"] == 5 and facts["lengths"]["chosen"]["max"] == 8
    assert sorted(facts["lengths"]) == ["chosen", "prompt", "rejected"]


def test_doubled_bos_is_seen(plain: Renderer):
    rows, _ = rows_of(plain)
    doubled = replace(rows, prompts=[[0, *rows.prompts[0]], *rows.prompts[1:]])
    assert inspect_rows(doubled, plain)["bos"]["rows_by_leading_bos"] == {"2": 1, "1": 3}


def test_missing_end_token_is_refused(plain: Renderer):
    rows, _ = rows_of(plain)
    check_end_token(rows, plain.end_ids)
    cut = [(a[:-1], b) if i == 2 else (a, b) for i, (a, b) in enumerate(rows.responses)]
    with pytest.raises(UserError, match=r"not in the loss mask of 1 of 4 rows \(data:3\)"):
        check_end_token(replace(rows, responses=cut), plain.end_ids)
    with pytest.raises(UserError, match=r"of 4 of 4 rows \(data:1, data:2, data:3, \.\.\.\)"):
        check_end_token(rows, [77])


def test_padding_is_no_end_token(plain: Renderer):
    rows, _ = rows_of(plain)
    empty = replace(rows, responses=[(a, []) for a, _ in rows.responses])
    with pytest.raises(UserError, match="of 4 of 4 rows"):
        check_end_token(empty, [0, 1])  # 0 is what padding holds


def test_end_tokens_are_looked_for_in_every_chunk(plain: Renderer):
    rows, _ = rows_of(plain, PAIRS[:1] * 600)
    rows.responses[599] = (rows.responses[599][0], rows.responses[599][1][:-1])
    with pytest.raises(UserError, match=r"1 of 600 rows \(data:600\)"):
        check_end_token(rows, plain.end_ids)


def test_trivial_rules(plain: Renderer):
    rows, _ = rows_of(plain)
    # 3 > 1; 1 = 1, though only the rejected one has an end token; 1 = 1; 7 > 3.
    assert trivial_rules(rows) == {"longer": 3 / 4, "shorter": 1 / 4}
    scores = [(-1.0, -2.0), (-1.0, -1.0), (-3.0, -2.0), (-3.0, -2.0)]
    assert trivial_rules(rows, reference_scores=scores)["higher_reference_logp"] == 1.5 / 4
    with pytest.raises(ValueError, match="1 reference scores for 4 rows"):
        trivial_rules(rows, reference_scores=scores[:1])


def test_kinds_without_pairs(plain: Renderer):
    rows, _ = rows_of(plain, [{"prompt": "ab"}])
    facts = inspect_rows(rows, plain)
    assert facts["rules"] == {} and facts["rows"][0]["responses"] == []
    assert facts["end"]["responses"] == 0
    check_end_token(rows, plain.end_ids)
    rows, _ = rows_of(plain, [{"prompt": "ab", "completion": "c"}])
    assert sorted(inspect_rows(rows, plain)["lengths"]) == ["completion", "prompt"]


def test_quantiles():
    assert quantiles([1, 2, 3, 4, 10]) == pytest.approx(
        {"min": 1, "p50": 3, "p90": 7.6, "p99": 9.76, "max": 10, "mean": 4}
    )


@pytest.mark.parametrize(
    ("name", "share"), [("alpaca_judged.jsonl.xz", 0.73), ("hh_helpful.jsonl.gz", 0.60)]
)
def test_longer_wins_on_real_files(
    smollm: Any, shared_file: Callable[[str], Path], name: str, share: float
):
    examples = load_examples(shared_file(name)).examples[::10]
    renderer = Renderer(smollm, template="auto")
    rows, _ = build_rows(examples, renderer, max_length=None)
    assert trivial_rules(rows)["longer"] == pytest.approx(share, abs=0.06)
    check_end_token(rows, renderer.end_ids)
