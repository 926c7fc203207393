"""Faults of the data: each is found in rows built for it, and not in sound ones."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import near
from preftune.data.findings import LIMITS, MEANINGS, Health, warnings
from preftune.data.health import health
from preftune.data.rows import Rows

END, BOS = 1, 2
Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]


def pairs(rows: Sequence[Pair], *, name: str = "d", **columns: list[Any]) -> Rows:
    """Finished pairs (prompt, chosen, rejected); the end token is added."""
    return Rows(
        prompts=[list(p) for p, _, _ in rows],
        responses=[([*a, END], [*b, END]) for _, a, b in rows],
        finished=[(True, True)] * len(rows),
        columns=columns,
        texts=["".join(map(chr, p)) for p, _, _ in rows],
        where=[f"{name}:{i}" for i in range(1, len(rows) + 1)],
        kind="pairs",
    )


def completions(rows: Sequence[tuple[Sequence[int], Sequence[int]]], **columns: list[Any]) -> Rows:
    base = pairs([(p, a, a) for p, a in rows], **columns)
    return replace(
        base,
        responses=[r[:1] for r in base.responses],
        finished=[(True,)] * len(rows),
        kind="completions",
    )


def text(size: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 50000), k=size)


def sound(count: int = 8, size: int = 20, **columns: list[Any]) -> Rows:
    """Random pairs, each side the longer in turn: no finding, no rule."""
    return pairs(
        [
            (text(size, 3 * i), text(size + i % 2, 3 * i + 1), text(size + 1 - i % 2, 3 * i + 2))
            for i in range(count)
        ],
        **columns,
    )


def decode(ids: Sequence[int]) -> str:
    """As characters; end and BOS are special."""
    return "".join(chr(i) for i in ids if i not in (END, BOS))


def codes(words: str) -> list[int]:
    return list(map(ord, words))


def count(found: Health, name: str) -> tuple[int | None, int]:
    return found.findings[name].count, found.findings[name].of


def hits(found: Health, name: str) -> list[int]:
    mask = found.findings[name].mask
    assert mask is not None
    return mask.nonzero().flatten().tolist()


def test_sound_pairs_have_no_finding():
    columns: dict[str, list[Any]] = {
        "margin": [1.0] * 8,
        "chosen_model": ["a", "b"] * 4,
        "rejected_model": ["b", "a"] * 4,
    }
    found = health(
        sound(**columns),
        held_out=sound(12).select([8, 9]),
        reference_logp=torch.tensor([[1.0, 2.0], [2.0, 1.0]] * 4),
        decode=decode,
        end_ids=[END],
        bos_id=BOS,
    )
    # Nothing is compared twice, so noise cannot be told; everything else is counted, and is 0.
    assert {name: f.count for name, f in found.findings.items() if f.count != 0} == {"noise": None}
    assert found.findings.keys() == MEANINGS.keys() - {"disagreement"}
    assert (found.rows, found.distinct_rows, found.distinct_prompts) == (8, 8, 8)
    assert found.rules.pop("source").mean() <= 0.5  # as its docstring says of equal writers
    assert {name: float(v.mean()) for name, v in found.rules.items()} == dict.fromkeys(
        ("longer", "shorter", "finished", "reference_logp", "reference_logp_per_token"), 0.5
    )
    assert warnings(found) == [] and not found.held_out_seen.any()  # type: ignore[union-attr]


def test_every_finding_has_a_meaning_a_cure_and_a_limit():
    assert MEANINGS.keys() - LIMITS.keys() == {"repeated_prompts"}
    assert LIMITS.keys() <= MEANINGS.keys()
    assert all(a.endswith(".") and b.endswith(".") for a, b in MEANINGS.values())


def test_duplicates_and_prompts():
    a, b = ([10], [11], [12]), ([10], [11], [13])
    found = health(pairs([a, b, a, a, ([20], [11], [12])]))
    assert count(found, "duplicates") == (2, 5) and hits(found, "duplicates") == [2, 3]
    assert found.findings["duplicates"].where == ("d:3 like d:1", "d:4 like d:1")
    assert found.findings["duplicates"].share == 0.4
    assert count(found, "repeated_prompts") == (3, 5)
    assert (found.distinct_rows, found.distinct_prompts) == (3, 2)


def test_equal_tokens_divided_otherwise_are_no_duplicate():
    found = health(pairs([([10, 11], [12], [13]), ([10], [11, 12], [13])]))
    assert count(found, "duplicates") == (0, 2)


def test_near_duplicates_need_every_part_to_be_near():
    p, a, b = text(100, 1), text(100, 2), text(100, 3)
    changed = [*a[:50], 7, *a[51:]]  # 98 shingles, 3 lost, 3 gained: 95 / 101
    assert near.jaccard(a, changed) == pytest.approx(95 / 101)
    rows = [(p, a, b), (p, changed, b), (p, text(100, 4), b), (text(100, 5), a, b), (p, b, a)]
    found = health(pairs(rows))
    assert hits(found, "near_duplicates") == [1]
    assert found.findings["near_duplicates"].where == ("d:2 like d:1",)
    far = a.copy()
    far[10], far[50], far[90] = 7, 8, 9  # 9 lost, 9 gained of 99 with the end token: 90 / 108
    assert hits(health(pairs([(p, a, b), (p, far, b)])), "near_duplicates") == []


def test_a_shared_system_prompt_makes_no_prompts_near():
    system = text(400, 0)
    a, b = text(30, 1), text(30, 2)
    rows = [([*system, *text(6, 10 + i)], a, b) for i in range(30)]
    assert near.jaccard(rows[0][0], rows[1][0]) > 0.9
    assert count(health(pairs(rows)), "near_duplicates") == (0, 30)
    twice = [*rows, (rows[4][0], a, [*b, 7])]  # a real one among them: the same question
    assert hits(health(pairs(twice)), "near_duplicates") == [30]


def test_prompts_that_a_grid_of_words_makes_are_not_near():
    grid = [[*text(50, 0), 10 + i, 99, 10 + j, *text(50, 1)] for i in range(25) for j in range(25)]
    assert len(set(map(tuple, near.trimmed(grid)))) == 625
    assert set(near.near_earlier([near.trimmed(grid)])) == {-1}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 3))
def test_planted_near_texts_are_found_and_random_ones_are_not(seed: int, parts: int, edits: int):
    """300 texts of 200 tokens in 1 to 3 parts, and each again with up to 3 tokens changed.

    Their index is at least 189 / 207 = 0.913, so by the docstring one of 30,000 is missed: of 300
    three or more once in ten million.
    """
    draw = random.Random(seed)
    base = [[draw.choices(range(5000), k=200) for _ in range(300)] for _ in range(parts)]
    planted = [[t.copy() for t in part] for part in base]
    for part in planted:
        for t in part:
            for at in draw.sample(range(200), edits):
                t[at] = 6000 + at
    assert set(near.near_earlier(base)) == {-1}
    both = [a + b for a, b in zip(base, planted, strict=True)]
    earlier = near.near_earlier(both)
    assert set(earlier[:300]) == {-1}
    for found in (near.near_other(planted, base), earlier[300:]):
        assert all(j in (i, -1) for i, j in enumerate(found)), "a text that is not near"
        assert found.count(-1) <= 2 * (edits > 0)


def test_minima_agree_as_often_as_the_index_says():
    """720 minima of texts with an index near 1/2 (one standard error is 0.019)."""
    a = text(400, 1)
    b = [*a[:267], *text(133, 2)]  # 265 of 398 shingles shared: 265 / 531
    assert near.jaccard(a, b) == pytest.approx(265 / 531)
    equal = [near._minima([a], s, 6) == near._minima([b], s, 6) for s in range(10)]
    assert sum(e.mean() for e in equal) / 10 == pytest.approx(265 / 531, abs=0.08)


def test_many_texts_in_one_bucket_stay_linear(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = near.jaccard
    monkeypatch.setattr(near, "jaccard", lambda a, b: calls.append(1) or real(a, b))
    same = text(100, 1)
    found = near.near_earlier([[[*same, i] for i in range(500)]])
    assert found[0] == -1 and min(found[1:]) >= 0
    assert len(calls) <= 500 * near.BANDS * near.LOOK_BACK / 10


def test_short_and_empty_texts():
    texts = [[], [5], [5, 6], [5, 6, 7], [], [5, 6]]
    assert near.near_earlier([texts]) == [-1, -1, -1, -1, 0, 2]
    assert near.near_earlier([[]]) == [] and near.near_other([[[5]]], [[]]) == [-1]
    with pytest.raises(ValueError, match="4 parts"):
        near.near_earlier([[[5]]] * 4)


def test_contradictions_and_the_least_noise():
    p, a, b, c = [10], [11], [12], [13]
    # Three say a > b and one b > a; a > c is said once, and b > a at another prompt is no answer.
    rows = [(p, a, b), (p, b, a), (p, a, b), (p, a, b), (p, a, c), ([20], b, a)]
    found = health(pairs(rows, who=list("uvwxyz")))
    assert hits(found, "contradictions") == [0, 1, 2, 3]
    assert count(found, "contradictions") == (4, 6)
    assert hits(found, "noise") == [1] and count(found, "noise") == (1, 4)
    assert found.findings["noise"].share == 0.25


def test_the_majority_may_come_later_and_a_tie_blames_the_later():
    p, a, b = [10], [11], [12]
    found = health(pairs([(p, a, b), (p, b, a), (p, b, a)], who=["u", "v", "w"]))
    assert hits(found, "noise") == [0]
    assert hits(health(pairs([(p, b, a), (p, a, b)])), "noise") == [1]


def test_copies_alone_do_not_tell_of_noise():
    p, a, b = [10], [11], [12]
    copied, judged = [(p, a, b), (p, a, b)], health(pairs([(p, a, b)] * 2, who=["u", "v"]))
    assert count(health(pairs(copied)), "noise") == (None, 0)
    assert health(pairs(copied)).findings["noise"].share is None
    assert count(judged, "noise") == (0, 2)


def test_completions_with_both_labels_contradict():
    rows = [([10], [11]), ([10], [11]), ([10], [12])]
    found = health(completions(rows, label=[True, False, True]))
    assert hits(found, "contradictions") == [0, 1] and count(found, "noise") == (1, 2)
    assert count(found, "duplicates") == (0, 3) and count(found, "near_duplicates") == (0, 3)
    assert found.rules == {} and "identical" not in found.findings
    unlabelled = health(completions(rows))
    assert "noise" not in unlabelled.findings and hits(unlabelled, "duplicates") == [1]


def test_circles_of_three_but_not_of_two_nor_across_prompts():
    p, a, b, c, d = [10], [11], [12], [13], [14]
    circle = [(p, a, b), (p, b, c), (p, c, a)]
    found = health(pairs([*circle, (p, a, d)]))
    assert hits(found, "cycles") == [0, 1, 2] and count(found, "contradictions") == (0, 4)
    other = health(pairs([(p, a, b), (p, b, c), ([20], c, a)]))
    assert hits(other, "cycles") == []
    two = health(pairs([(p, a, b), (p, b, a), (p, b, c), (p, a, c)]))
    assert hits(two, "cycles") == [] and hits(two, "contradictions") == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_cycles_as_by_brute_force(edges: list[tuple[int, int]]):
    reach = {(a, b) for a, b in edges}
    for k, i, j in itertools.product(range(6), repeat=3):  # Warshall
        if (i, k) in reach and (k, j) in reach:
            reach.add((i, j))
    assert near.cyclic(edges).tolist() == [a != b and (b, a) in reach for a, b in edges]


def test_disagreement_of_annotators():
    p, a, b = [10], [11], [12]
    rows = [(p, a, b), (p, b, a), (p, a, b), ([20], a, b), (p, b, a)]
    found = health(pairs(rows, annotator=["x", "y", "z", "x", None]))
    assert hits(found, "disagreement") == [1] and count(found, "disagreement") == (1, 2)
    alone = health(pairs(rows, annotator=["x"] * 5))
    assert count(alone, "disagreement") == (None, 0)
    assert "disagreement" not in health(pairs(rows)).findings


def test_identical_responses_and_same_beginnings():
    a = text(40, 1)
    rows = [
        ([10], a, a),
        ([20], a, [*a[:39], 7]),  # 39 of 41 with the end token: 95.1 %
        ([30], a, [*a[:38], 7, 8]),  # 38 of 41
        ([40], a, [*a, 7, 8, 9]),  # 40 of 44
    ]
    found = health(pairs(rows))
    assert hits(found, "identical") == [0] and hits(found, "same_beginning") == [1]


@pytest.mark.parametrize(
    ("columns", "ties", "inverted", "of"),
    [
        ({"margin": [0.0, -1.0, 2.0, None]}, [0], [1], 3),
        ({"probability": [0.5, 0.4, 0.9, 1]}, [0], [1], 4),
        ({"score_chosen": [3, 1, 2, None], "score_rejected": [3, 2, 1, 4]}, [0], [1], 3),
        ({"margin": [1.0, 1.0, None, None], "probability": [None, 0.1, 0.5, None]}, [2], [1], 3),
    ],
)
def test_ties_and_inverted(columns: dict[str, list[Any]], ties: list, inverted: list, of: int):
    found = health(sound(4, **columns))
    assert (hits(found, "ties"), hits(found, "inverted")) == (ties, inverted)
    assert count(found, "ties") == (len(ties), of)


def test_without_numbers_ties_cannot_be_told():
    for rows in (sound(4), sound(4, score_chosen=[1, 2, 3, 4]), sound(4, margin=["a"] * 4)):
        found = health(rows)
        assert count(found, "ties") == (None, 0) and count(found, "inverted") == (None, 0)


def test_rules_by_hand():
    rows = pairs([([10], [1, 2, 3], [4]), ([20], [5], [6, 7]), ([30], [8], [9])])
    rows = replace(rows, finished=[(True, True), (False, True), (True, False)])
    # Without end tokens: 3 and 1; 2 (unfinished: all is text) and 2; 1 and 2.
    logp = torch.tensor([[-8.0, -3.0], [-1.0, -6.0], [-2.0, -2.0]])  # tokens 4, 2; 2, 3; 2, 2
    rules = health(rows, reference_logp=logp).rules
    assert rules["longer"].tolist() == [1, 0.5, 0] and rules["shorter"].tolist() == [0, 0.5, 1]
    assert rules["finished"].tolist() == [0.5, 0, 1]
    assert rules["reference_logp"].tolist() == [0, 1, 0.5]
    # -2 against -1.5; -0.5 against -2.
    assert rules["reference_logp_per_token"].tolist() == [0, 1, 0.5]
    other = health(rows, reference_logp=logp * torch.tensor([1.0, 2.0])).rules
    assert other["reference_logp"].tolist() == [0, 1, 1]  # -8 and -6
    assert other["reference_logp_per_token"].tolist() == [1, 1, 1]  # -2 and -3


def test_a_bad_reference_is_refused():
    for bad in (torch.zeros(3, 2), torch.full((4, 2), float("nan"))):
        with pytest.raises(ValueError, match="reference_logp"):
            health(sound(4), reference_logp=bad)
    with pytest.raises(ValueError, match="completions"):
        health(completions([([10], [11])]), reference_logp=torch.zeros(1, 2))


def test_a_rule_that_predicts_is_warned_of_on_either_side():
    longer = pairs([(text(9, i), text(8, i + 100), text(5, i + 200)) for i in range(40)])
    logp = torch.tensor([[-5.0, -1.0]] * 40)
    (one, two, three) = warnings(health(longer, reference_logp=logp))
    assert "'longer' predicts 100%" in one and "gets wrong" in one
    assert "'reference_logp' predicts 0%" in two and "gets right" in two
    assert "'reference_logp_per_token'" in three
    assert warnings(health(longer.select(range(4)))) == []  # four coins may fall alike


def test_source_rule_and_single_source():
    names = {"chosen_model": ["human"] * 30, "rejected_model": ["weak", "weaker", "old"] * 10}
    found = health(sound(30, **names))
    assert count(found, "single_source") == (30, 30)
    assert found.rules["source"].tolist() == [1.0] * 30
    said = warnings(found)
    assert any("single_source: 30 of 30 (100.0%; d:1, d:2, d:3, ...)" in line for line in said)
    mixed = {"chosen_model": ["a", "b", "a"] * 10, "rejected_model": ["b", "a", "b"] * 10}
    control = health(sound(30, **mixed))
    assert count(control, "single_source") == (0, 30)
    # One prompt of three prefers b: a wins more often in both halves.
    assert float(control.rules["source"].mean()) == pytest.approx(2 / 3)


def test_source_of_few_rows_or_ids_says_nothing():
    few = {"chosen_model": ["human"] * 4, "rejected_model": ["weak"] * 4}
    assert count(health(sound(4, **few)), "single_source") == (0, 4)
    ids = {
        "chosen_id": [f"c{i}" for i in range(30)],
        "rejected_id": [f"r{i}" for i in range(30)],
    }
    found = health(sound(30, **ids))
    assert count(found, "single_source") == (0, 30)
    assert found.rules["source"].tolist() == [0.5] * 30  # never seen in the other half
    # Of several columns that with fewest names is asked.
    names = {"chosen_model": ["human"] * 30, "rejected_model": ["weak"] * 30}
    assert count(health(sound(30, **ids, **names)), "single_source") == (30, 30)


@pytest.mark.parametrize("value", [{"chosen": "human", "rejected": "weak"}, ["human", "weak"]])
def test_one_column_with_both_sources(value: Any):
    assert count(health(sound(8, source=[value] * 8)), "single_source") == (8, 8)


def test_a_column_that_does_not_tell_the_sides_apart_is_no_source():
    for columns in (
        {"source": ["hh"] * 8},
        {"chosen_model": ["a"] * 8, "rejected_model": ["a"] * 8},
    ):
        found = health(sound(8, **columns))
        assert count(found, "single_source") == (None, 0) and "source" not in found.rules


def test_unfinished_and_ends_that_tell_the_sides_apart():
    rows = sound(4)
    rows = replace(rows, finished=[(True, False), (True, False), (False, False), (True, True)])
    found = health(rows)
    assert count(found, "unfinished") == (4, 8)
    mask = found.findings["unfinished"].mask
    assert mask is not None and mask.sum(0).tolist() == [1, 3]
    assert found.findings["unfinished"].where == ("d:1", "d:2", "d:3")
    assert hits(found, "unlike_ends") == [0, 1]
    assert found.rules["finished"].tolist() == [1, 1, 0.5, 0.5]
    # A finished response that lacks the end token is unfinished, too.
    assert count(health(sound(4), end_ids=[99]), "unfinished") == (8, 8)


def test_end_tokens_inside_and_doubled_bos():
    rows = pairs([([BOS, BOS, 10], [11, END, 12], [13]), ([BOS, 20, BOS], [21], [22])])
    found = health(rows, end_ids=[END], bos_id=BOS)
    assert count(found, "end_inside") == (1, 4) and hits(found, "doubled_bos") == [0]
    mask = found.findings["end_inside"].mask
    assert mask is not None and mask.tolist() == [[True, False], [False, False]]
    silent = health(rows)
    assert count(silent, "end_inside") == (None, 0) and count(silent, "doubled_bos") == (None, 0)


def test_role_markers_in_text():
    fine = codes("What a Human: is, one may ask")
    rows = [
        (codes("Why?"), codes("So.\n\nHuman: and then?"), fine),
        (codes("<|im_start|>user\nWhy?"), fine, codes("no")),
        (codes("Human: why?"), fine, codes("no")),  # a prompt may talk so
        (codes("Why?"), fine, codes("yes<|im_end|>")),
    ]
    assert hits(health(pairs(rows), decode=decode), "role_markers") == [0, 1, 3]
    # What the template puts there is not in the text as it was given.
    rendered = replace(pairs(rows), texts=["Why?"] * 4)
    assert hits(health(rendered, decode=decode), "role_markers") == [0, 3]
    # What the tokenizer takes as a special token is not in the decoded text.
    special = replace(pairs(rows), prompts=[[BOS, *codes("Why?")]] * 4)
    assert hits(health(special, decode=decode), "role_markers") == [0, 3]
    assert count(health(pairs(rows)), "role_markers") == (None, 0)
    turns = replace(pairs(rows[1:2]), texts=[[{"role": "user", "content": "[INST] <|user|>"}]])
    assert hits(health(turns, decode=decode), "role_markers") == [0]


def test_empty_responses():
    rows = pairs([([10], [], codes("y")), ([20], codes(" \n"), codes("x"))])
    assert count(health(rows), "empty") == (1, 4)
    assert count(health(rows, decode=decode), "empty") == (2, 4)


def test_responses_cut_at_one_length():
    def of(sizes: Sequence[int]) -> Rows:
        return pairs([(text(5, i), text(n, i), text(30, -i - 1)) for i, n in enumerate(sizes)])

    assert hits(health(of([10, 20, 50, 64, 64, 64, 64, 64])), "cut")[::2] == [3, 4, 5, 6, 7]
    assert count(health(of([10, 20, 50, 64, 64, 64, 64])), "cut") == (0, 14)  # four may be chance
    shortly = [60, 61, 62, 63, 59, 64, 64, 64, 64, 64]
    assert count(health(of(shortly)), "cut") == (0, 20)
    assert count(health(of([20] * 5)), "cut") == (0, 10)  # short answers
    task = [(text(5, i), text(40, i), text(40, -i - 1)) for i in range(9)]
    assert count(health(pairs(task)), "cut") == (0, 18)


def test_rows_cut_at_one_length_of_prompt_and_response():
    """Cut at 100 tokens in all, so that the responses themselves differ in length."""
    rows = pairs([(text(20 + i, i), text(79 - i, i + 50), text(9, i + 90)) for i in range(8)])
    assert count(health(rows), "cut") == (0, 16)  # they say that they are finished
    # Unfinished they keep the last token: 100 in all.
    rows = replace(rows, finished=[(False, True)] * 8)
    assert {len(p) + len(r[0]) for p, r in zip(rows.prompts, rows.responses, strict=True)} == {100}
    rows = replace(rows, finished=[*rows.finished[:6], (True, True), (True, True)])
    assert count(health(rows), "cut") == (0, 16)  # all that are unfinished have one length
    short = replace(rows, finished=[*rows.finished[:7], (True, False)])
    found = health(short)
    assert count(found, "cut") == (6, 16) and found.findings["cut"].where == ("d:1", "d:2", "d:3")


def test_overlap_with_held_out_prompts():
    rows = sound(6, size=100)
    close = [*rows.prompts[2][:99], 7]
    held = pairs(
        [(rows.prompts[0], [5], [6]), (close, [5], [6]), (text(100, 999), [5], [6])], name="e"
    )
    found = health(rows, held_out=held)
    assert hits(found, "overlap") == [0] and hits(found, "near_overlap") == [2]
    assert found.findings["overlap"].where == ("d:1 like e:1",)
    assert found.findings["near_overlap"].where == ("d:3 like e:2",)
    assert found.held_out_seen is not None and found.held_out_seen.tolist() == [True, True, False]
    said = warnings(found)
    assert len(said) == 2 and said[0].startswith("data: overlap: 1 of 6 (16.7%; d:1 like e:1). The")
    alone = health(rows)
    assert alone.held_out_seen is None and "overlap" not in alone.findings


def test_prompts_alone_and_no_rows():
    rows = replace(sound(3), responses=[()] * 3, finished=[()] * 3, kind="prompts")
    found = health(rows, bos_id=BOS, decode=decode, held_out=rows.select([1]))
    assert found.findings.keys() == {
        *("duplicates", "repeated_prompts", "near_duplicates", "doubled_bos", "role_markers"),
        *("overlap", "near_overlap"),
    }
    assert hits(found, "overlap") == [1]
    for kind in (sound(3), rows):
        none = health(kind.select([]), held_out=rows, end_ids=[END], decode=decode)
        assert none.rows == 0 and warnings(none) == []
        assert none.held_out_seen is not None and none.held_out_seen.tolist() == [False] * 3


def test_equal_prompts_overlap_whatever_minhash_finds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near, "near_other", lambda parts, others: [-1] * len(parts[0]))
    found = health(sound(4), held_out=sound(6).select([3, 5]))
    assert hits(found, "overlap") == [3] and count(found, "near_overlap") == (0, 4)
    assert found.held_out_seen is not None and found.held_out_seen.tolist() == [True, False]
