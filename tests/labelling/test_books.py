"""What annotators said stays said: the journal, the training rows, agreement by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.data import load_examples
from preftune.errors import UserError
from preftune.labelling.agreement import alpha, share_alike, summary, win_rate
from preftune.labelling.book import Book, Judgement, Pair


def pair(number: int, row: int = 0, writers: tuple[str, str] = ("m", "m")) -> Pair:
    return Pair(
        id=number, row=row, prompt=f"p{row}", responses=(f"a{number}", f"b{number}"),
        finished=(True, False), writers=writers,
    )  # fmt: skip


def said(number: int, choice: Any, annotator: str = "ann", left: int = 0) -> Judgement:
    return Judgement(pair=number, annotator=annotator, choice=choice, left=left, seconds=1.5)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_what_training_takes(here: Path) -> None:
    book = Book(here / "labels.jsonl")
    for i, choice in enumerate(("first", "second", "tie", "skip")):
        book.add(pair(i))
        book.judge(said(i, choice))
    found = rows(book.path)
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [
        ("p0", "a0", "b0"), ("p0", "b1", "a1")
    ]  # fmt: skip
    assert found[0]["rejected_finished"] is False and found[1]["chosen_finished"] is False
    examples = load_examples(str(book.path), want="pairs").examples
    assert [e.responses for e in examples] == [("a0", "b0"), ("b1", "a1")]
    assert [e.finished for e in examples] == [(True, False), (False, True)]


def test_undone_and_resumed(here: Path) -> None:
    book = Book(here / "labels.jsonl")
    book.add(pair(0))
    book.add(pair(1))
    book.judge(said(0, "first"))
    book.judge(said(0, "second", "bob"))
    book.judge(said(1, "first"))
    assert book.undo("ann") == pair(1) and [r["pair"] for r in rows(book.path)] == [0, 0]
    assert book.undo("ann") == pair(0) and book.undo("ann") is None
    book.judge(said(0, "tie"))
    with pytest.raises(UserError, match="another `preftune label`"):
        Book(here / "labels.jsonl")
    book.close()
    again = Book(here / "labels.jsonl")
    assert again.pairs == book.pairs and list(again.judged.items()) == list(book.judged.items())
    assert [r["annotator"] for r in rows(again.path)] == ["bob"]


def test_a_crash_in_any_byte_loses_one_line_at_most(here: Path) -> None:
    book = Book(here / "a.jsonl")
    for i in range(3):
        book.add(pair(i))
        book.judge(said(i, "second"))
    book.close()
    journal = book.journal.read_bytes()
    lines = journal.splitlines(keepends=True)
    for cut in range(len(journal) - len(lines[-1]), len(journal)):
        (here / "b.jsonl.journal").write_bytes(journal[:cut])
        (here / "b.jsonl").write_bytes(b'{"prompt": "tor')
        other = Book(here / "b.jsonl")
        assert len(other.judged) == 2 and len(rows(other.path)) == 2
        other.add(pair(3))
        other.judge(said(3, "first"))
        other.close()
        assert [r["pair"] for r in rows(other.path)] == [0, 1, 3]


@pytest.mark.parametrize("line", [
    "nonsense", '["pair"]', '{"kind": "judgement", "pair": 9, "annotator": "a", "choice": "first", '
    '"left": 0, "seconds": 1}', '{"kind": "other"}', '{"kind": "pair"}',
])  # fmt: skip
def test_a_damaged_journal_is_refused(line: str, here: Path) -> None:
    (here / "labels.jsonl").touch()
    (here / "labels.jsonl.journal").write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1.*damaged"):
        Book(here / "labels.jsonl")


def test_a_file_of_someone_else_is_left_alone(here: Path) -> None:
    (here / "labels.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError, match="did not write"):
        Book(here / "labels.jsonl")
    assert (here / "labels.jsonl").read_text() == '{"prompt": "p"}\n'


def test_agreement_by_hand() -> None:
    # two annotators: two pairs alike, one not, one judged once, one skipped
    judged = [
        said(0, "first"), said(0, "first", "bob"), said(1, "second"), said(1, "second", "bob"),
        said(2, "first"), said(2, "tie", "bob"), said(3, "tie"), said(4, "skip"),
        said(4, "first", "bob"),
    ]  # fmt: skip
    share = share_alike(judged)
    assert share is not None and share["value"] == pytest.approx(2 / 3)
    # six labels: first 3, second 2, tie 1; unlike ordered pairs by chance 36 - 14 = 22 of 5 each,
    # found 2 of 1
    assert alpha(judged) == pytest.approx(1 - 5 * 2 / 22)
    assert alpha(judged[:2]) is None and share_alike(judged[:2]) is None
    one_each = [said(0, "first"), said(0, "second", "bob"), said(0, "first", "eve")]
    again = [said(1, "first"), said(1, "first", "bob")]
    found = share_alike(one_each + again)
    assert found is not None and found["value"] == pytest.approx((1 / 3 + 1) / 2)


def test_who_wins_by_hand() -> None:
    pairs = {
        0: pair(0, 0, ("A", "B")), 1: pair(1, 0, ("A", "B")), 2: pair(2, 1, ("A", "B")),
        3: pair(3, 2, ("A", "B")),
    }  # fmt: skip
    judged = [said(0, "first"), said(1, "second"), said(2, "tie"), said(3, "first", left=1)]
    found = win_rate(pairs, judged, "A")
    assert found is not None and found["value"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    other = win_rate(pairs, judged, "B")
    assert other is not None and other["value"] == pytest.approx(0.5 * 2 / 3)
    told = summary(pairs, judged, ["A", "B"])
    assert told["preferences"] == 3 and told["ties"] == 1
    # on the left: the first of 0 and 1, the second of 3, of which one was chosen
    assert told["left_chosen"]["value"] == pytest.approx(1 / 3)
    assert win_rate(pairs, [], "A") is None
