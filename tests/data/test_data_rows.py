"""Lengths, truncation, and rows as padded samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.data import (
    Example,
    Renderer,
    Report,
    Rows,
    build_rows,
    check_bad_rows,
    load_examples,
)
from preftune.errors import UserError
from preftune.samples import DATA

BOS, END = 0, 1


def ids(text: str) -> list[int]:
    return [ord(c) - 32 + 2 for c in text]


@pytest.fixture
def plain(tiny: Callable[..., Any]) -> Renderer:
    """A token a character, with BOS and an end token, which is the padding token too."""
    return Renderer(tiny(bos=True))


def pair(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def build(renderer: Renderer, rows: list[dict[str, Any]], **options: Any) -> tuple[Rows, Report]:
    options = {"max_length": None, **options}
    return build_rows(load_examples(rows).examples, renderer, **options)


def test_rows_hold_ids_and_what_reward_functions_get(plain: Renderer):
    rows, report = build(plain, [pair("ab", "c", "de", topic="x"), pair("a", "b", "c", margin=2)])
    assert rows.prompts == [[BOS, *ids("ab")], [BOS, *ids("a")]]
    assert rows.responses[0] == ([*ids("c"), END], [*ids("de"), END])
    assert rows.columns == {"topic": ["x", None], "margin": [None, 2.0]}
    assert (rows.texts, rows.where, rows.kind) == (["ab", "a"], ["data:1", "data:2"], "pairs")
    assert (report.kept, report.longest, report.limit) == (2, 6, None)
    assert (report.dropped, report.cut, report.boundary_merged, report.rejected) == (0, 0, 0, [])


def test_whether_a_column_holds_numbers_is_looked_up_once(plain: Renderer):
    """Not at every minibatch; rows that are added may tell otherwise."""

    class Watched(list[Any]):
        read = 0

        def __iter__(self) -> Any:
            self.read += 1
            return super().__iter__()

    rows, _ = build(plain, [pair("a", "b", "c", margin=2.0), pair("a", "b", "c", margin=1.0)])
    margin = rows.columns["margin"] = Watched(rows.columns["margin"])
    assert [rows.samples([i]).extra["margin"].tolist() for i in (0, 1, 0)] == [[2.0], [1.0], [2.0]]
    assert margin.read == 1
    rows.extend(build(plain, [pair("a", "b", "c", probability=0.75)])[0])
    assert rows.samples([2]).extra["probability"].tolist() == [0.75] and margin.read == 2


def test_samples_are_padded_by_length_and_masked(plain: Renderer):
    row = pair("b", "e", "f", chosen_finished=False)
    rows, _ = build(plain, [pair("abc", "de", "f"), row])
    s = rows.samples(torch.tensor([1, 0]))
    assert s.prompt.tolist() == [[0, 0, BOS, *ids("b")], [BOS, *ids("abc")]]
    assert s.prompt_mask.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert s.tokens.tolist() == [
        [[*ids("e"), 0, 0], [*ids("f"), END, 0]],
        [[*ids("de"), END], [*ids("f"), END, 0]],
    ]
    # The end token is in the mask, nothing behind it is; a cut response has none.
    assert s.mask.int().tolist() == [[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 0]]]
    assert s.finished.tolist() == [[False, True], [True, True]]
    assert s.lengths().tolist() == [[1, 2], [3, 2]]
    assert (s.origin == DATA).all() and s.origin.shape == (2, 2) and s.row.tolist() == [1, 0]
    assert s.mask.dtype == s.prompt_mask.dtype == s.finished.dtype == torch.bool
    assert s.tokens.dtype == s.prompt.dtype == s.origin.dtype == torch.long


def test_some_of_the_responses(plain: Renderer):
    rows, _ = build(plain, [pair("a", "b", "cde"), pair("a", "fg", "h")])
    chosen = rows.samples([0, 1], responses=[0])
    assert chosen.tokens.tolist() == [[[*ids("b"), END, 0]], [[*ids("fg"), END]]]
    swapped = rows.samples([0], responses=[1, 0])
    assert swapped.lengths().tolist() == [[4, 2]]


def test_numeric_labels_become_extra(plain: Renderer):
    given = {"margin": 0.1, "probability": 0.7, "score_chosen": 2, "label": "words"}
    rows, _ = build(plain, [pair("a", "b", "c", **given), pair("a", "b", "c", margin=-1.5)])
    extra = rows.samples([1, 0]).extra
    assert sorted(extra) == ["margin", "probability", "score_chosen"]
    assert extra["margin"].tolist() == [-1.5, 0.1]  # float64: 0.1 is exact
    assert extra["probability"].isnan().tolist() == [True, False]
    # A minibatch of rows without the column has the field all the same.
    assert sorted(rows.samples([1]).extra) == sorted(extra)
    rows, _ = build(plain, [{"prompt": "a", "completion": "b", "label": False}])
    assert rows.samples([0]).extra["label"].tolist() == [0.0]
    assert (rows.kind, rows.samples([0]).tokens.shape) == ("completions", (1, 1, 2))


def test_prompts_only(plain: Renderer):
    rows, _ = build(plain, [{"prompt": "abc"}, {"prompt": "d"}])
    prompt, mask = rows.prompts_only([1, 0])
    assert prompt.tolist() == [[0, 0, BOS, *ids("d")], [BOS, *ids("abc")]]
    assert mask.sum(-1).tolist() == [2, 4] and rows.kind == "prompts" and rows.responses == [(), ()]
    with pytest.raises(ValueError, match="prompts_only"):
        rows.samples([0])


def test_select_narrows_every_list(plain: Renderer):
    rows, _ = build(plain, [pair("a", "b", "c", n=1), pair("d", "e", "f", n=2)])
    some = rows.select([1])
    assert len(some) == 1 and some.prompts == [rows.prompts[1]] and some.columns == {"n": [2]}
    assert (some.texts, some.where) == (["d"], ["data:2"])
    assert some.responses == [rows.responses[1]] and some.finished == [rows.finished[1]]


LONG = pair("abcd", "ef", "ghij")  # 5 with BOS + 5 with the end token = 10
SHORT = pair("a", "b", "c")


def test_drop_is_the_default_and_counted(plain: Renderer):
    rows, report = build(plain, [SHORT, LONG, SHORT], max_length=9)
    assert (len(rows), report.kept, report.dropped, report.longest) == (2, 2, 1, 10)
    assert rows.where == ["data:1", "data:3"] and report.limit == 9
    assert len(build(plain, [LONG], max_length=10)[0]) == 1


def test_left_cuts_the_prompt_and_keeps_bos(plain: Renderer):
    rows, report = build(plain, [SHORT, LONG], max_length=7, truncation="left")
    assert rows.prompts[1] == [BOS, *ids("d")] and report.cut == 1 and report.dropped == 0
    assert rows.responses[1] == ([*ids("ef"), END], [*ids("ghij"), END])
    # No room for any of the prompt besides BOS: dropped.
    _, report = build(plain, [SHORT, LONG], max_length=6, truncation="left")
    assert report.dropped == 1


def test_left_without_bos(tiny: Callable[..., Any]):
    rows, _ = build(Renderer(tiny()), [LONG], max_length=7, truncation="left")
    assert rows.prompts == [ids("cd")]


def test_right_cuts_the_responses_which_are_unfinished_then(plain: Renderer):
    rows, report = build(plain, [LONG, SHORT], max_length=8, truncation="right")
    assert rows.responses[0] == ([*ids("ef"), END], ids("ghi"))
    assert rows.finished == [(True, False), (True, True)] and report.cut == 1
    assert rows.samples([0]).mask.sum(-1).tolist() == [[3, 3]]
    assert rows.prompts[0] == [BOS, *ids("abcd")]
    _, report = build(plain, [LONG, SHORT], max_length=5, truncation="right")
    assert report.dropped == 1  # the prompt alone fills it
    single = {"prompt": "abcd", "completion": "efghi"}
    for limit in (4, 5):
        with pytest.raises(UserError, match="1 too long"):
            build(plain, [single], max_length=limit, truncation="right")


def test_right_drops_a_pair_that_would_be_left_without_a_difference(plain: Renderer):
    same = pair("a", "bcde", "bcdf")
    rows, report = build(plain, [same, SHORT], max_length=5, truncation="right")
    assert (len(rows), report.dropped) == (1, 1)


def test_error_names_the_row(plain: Renderer):
    with pytest.raises(UserError, match=r"data data:2: 10 tokens, above max_length: 9\."):
        build(plain, [SHORT, LONG], max_length=9, truncation="error")


def test_a_prompt_longer_than_the_context_counts_as_bad(plain: Renderer):
    loaded = load_examples([SHORT, LONG])
    rows, report = build_rows(loaded.examples, plain, max_length=None, context=5)
    assert len(rows) == 1 and report.dropped == 0 and report.limit == 5
    assert [(r.where, r.reason) for r in report.rejected] == [
        ("data:2", "prompt longer than the context")
    ]
    with pytest.raises(UserError, match=r"1 of 2 rows.*longer than the context: 1 \(data:2\)"):
        check_bad_rows(loaded, 0.05, later=report.rejected)
    # One token more, and the prompt fits, but the row does not.
    _, report = build_rows(loaded.examples, plain, max_length=None, context=6)
    assert report.dropped == 1 and not report.rejected
    # With left truncation it is cut.
    rows, report = build(plain, [LONG], context=7, truncation="left")
    assert rows.prompts == [[BOS, *ids("d")]] and report.cut == 1


def test_reserve_is_room_for_sampling(plain: Renderer):
    prompts = [{"prompt": "a"}, {"prompt": "abcdef"}]
    rows, report = build(plain, prompts, context=8, reserve=4)
    assert len(rows) == 1 and report.rejected[0].reason == "prompt longer than the context"
    rows, report = build(plain, prompts, context=8, reserve=4, truncation="left")
    assert rows.prompts[1] == [BOS, *ids("def")] and report.cut == 1
    assert len(build(plain, prompts, context=8)[0]) == 2
    with pytest.raises(UserError, match="max_new_tokens: 8 leaves no room"):
        build(plain, prompts, context=8, reserve=8)


def test_max_length_none_is_the_context(plain: Renderer):
    assert build(plain, [SHORT, LONG], context=9)[1].dropped == 1
    assert build(plain, [SHORT, LONG], context=10)[1].dropped == 0


def test_contradictory_settings(plain: Renderer):
    for options, message in (
        ({"max_length": 20, "context": 10}, "max_length: 20 is above the model's context of 10"),
        ({"max_length": 1}, "max_length: 1 holds no prompt"),
        ({"truncation": "dorp"}, "'dorp' is none of drop.* Did you mean 'drop'"),
    ):
        with pytest.raises(UserError, match=message):
            build(plain, [SHORT], **options)


def test_nothing_left_says_why(plain: Renderer):
    with pytest.raises(UserError, match=r"no row is left: 1 too long \(limit 4 .*longest 10\)"):
        build(plain, [LONG], max_length=4)
    with pytest.raises(UserError, match="no row is left: prompt longer than the context: 1"):
        build(plain, [LONG], context=4)
    with pytest.raises(UserError, match="no example"):
        build_rows([], plain, max_length=None)


def test_rows_that_cannot_be_encoded_are_put_aside(plain: Renderer, tiny: Callable[..., Any]):
    # The tokenizer knows no such character and drops it: a response without a token.
    rows, report = build(plain, [SHORT, pair("a", "é", "c")])
    assert len(rows) == 1
    assert [(r.where, r.reason) for r in report.rejected] == [("data:2", "a response has no token")]
    assert report.rejected[0].row == {"prompt": "a", "responses": ["é", "c"]}
    merging = Renderer(tiny(merges=((" ", "b"),)))
    _, report = build(merging, [pair("a ", "b", "c"), SHORT])
    assert report.boundary_merged == 1


def test_responses_of_end_tokens_alone_have_no_token(plain: Renderer):
    row = Example(prompt="a", responses=("</s>", "b"), finished=(True,) * 2, columns={}, where="x")
    with pytest.raises(UserError, match="a response has no token: 1"):
        build_rows([row], plain, max_length=None)


def test_real_file_within_the_default_model(smollm: Any, shared_file: Callable[[str], Path]):
    loaded = load_examples(shared_file("hh_helpful.jsonl.gz"), max_rows=256)
    rows, report = build_rows(loaded.examples, Renderer(smollm), max_length=256, context=8192)
    assert report.kept + report.dropped == len(loaded.examples) and not report.rejected
    assert 0 < report.dropped < report.kept and report.longest > 256
    samples = rows.samples(range(len(rows)))
    total = samples.prompt_mask.sum(-1) + samples.lengths().amax(-1)
    assert int(total.max()) <= 256
    # The end token stands once in each mask, though the padding has the same id.
    ends = (samples.tokens == smollm.eos_token_id) & samples.mask
    assert (ends.sum(-1) == 1).all()
