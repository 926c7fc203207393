"""What a run makes of its rows: room in the context, what is held out, prompts and rewards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byte_model import CONTEXT
from preftune.config import Config
from preftune.errors import UserError
from preftune.parts import Parts, make_world
from preftune.preparing import prepare
from preftune.rounds import group_terms, refill

Prepared = Callable[..., Parts]
SHORT, LONG = 20, 100
"""Characters of a prompt, each a token; there is a template of a few more."""


def pair(number: int, prompt: int = SHORT, response: int = 10, **more: Any) -> dict[str, Any]:
    text = f"{number:04d}" + "x" * (prompt - 4)
    return {"prompt": text, "chosen": "a" * response, "rejected": "b" * response, **more}


def prompts(count: int, length: int = SHORT) -> list[dict[str, Any]]:
    return [{"prompt": pair(n, length)["prompt"]} for n in range(count)]


@pytest.fixture
def prepared(here: Path, tiny_model: str) -> Prepared:
    """The parts of a run on these rows."""

    def make(rows: Any = None, **given: Any) -> Parts:
        files = {}
        for name in ("prompts", "eval_data"):
            if name in given:
                files[name] = str(here / f"{name}.jsonl")
                Path(files[name]).write_text("".join(map(_line, given.pop(name))))
        settings = {"model": tiny_model, "batch_size": 4, "max_new_tokens": 30, "bad_rows": 1.0}
        return prepare(Config(**(settings | given | files)), data=rows)

    return make


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


# --- room in the context


def test_a_mismatched_response_is_held_to_the_context(prepared: Prepared):
    """Long prompts with short responses in turn with the opposite: each row fits by itself."""
    rows = [pair(n, *((LONG, 4), (SHORT, 80))[n % 2]) for n in range(8)]
    parts = prepared(rows, method="kto")
    (group,) = group_terms(parts.method)
    refill(group, make_world(parts), 0)
    assert group.round is not None
    samples = group.round.samples
    each = samples.prompt_mask.sum(-1, keepdim=True) + samples.lengths()
    cut = samples.prompt_mask.sum(-1) > LONG
    assert each.max() == CONTEXT and (each[cut, -1] == CONTEXT).all()
    assert samples.finished[:, -1].tolist() == (~cut).tolist() and samples.finished[:, :2].all()


def test_a_control_is_held_to_the_context_with_the_response(prepared: Prepared):
    """What is left behind the control of seven tokens is for both."""
    most = CONTEXT - SHORT - 40
    rows = [pair(n, response=n) for n in range(most, most + 40)]
    parts = prepared(rows, method="binary_reward_conditioning", eval_data=rows[:1])
    (group,) = group_terms(parts.method)
    refill(group, make_world(parts), 0)
    assert group.round is not None and parts.data is not None
    longest = max(len(p) + len(r) for p, (r, _) in zip(parts.data.prompts, parts.data.responses,
                                                       strict=True))  # fmt: skip
    assert longest == CONTEXT - len("[good]\n")
    plain = prepared(rows, method="pref_ft")
    assert plain.data is not None and len(plain.data) == len(parts.data) + len("[good]\n")


def test_held_out_prompts_leave_room_for_an_answer(prepared: Prepared):
    rows = [pair(n, LONG if n % 2 else SHORT) for n in range(40)]
    parts = prepared(rows, method="dpo", eval_fraction=0.5)
    assert parts.held_out is not None and parts.data is not None and parts.prompts is not None
    assert 0 < len(parts.held_out) < 20 and len(parts.data) + len(parts.held_out) == 40
    room = CONTEXT - parts.config.max_new_tokens
    assert max(map(len, parts.held_out.prompts)) <= room < max(map(len, parts.data.prompts))
    assert max(map(len, parts.prompts.prompts)) <= room  # of which `length:mode` takes its measure
    left = 20 - len(parts.held_out)
    assert any(n.startswith(f"{left} rows are not held out, and trained on") for n in parts.notes)
    fits = prepared(rows, method="dpo", eval_fraction=0.5, max_new_tokens=4)
    assert fits.held_out is not None and len(fits.held_out) == 20
    none = prepared([pair(n, LONG) for n in range(8)], method="dpo", eval_fraction=0.5)
    assert none.held_out is None and none.data is not None and len(none.data) == 8
    assert "no held-out prompts: lower max_new_tokens" in none.notes


def test_the_length_that_a_reward_aims_at_is_measured_where_there_is_room(prepared: Prepared):
    rows = [pair(n, LONG if n % 2 else SHORT) for n in range(8)]
    parts = prepared(rows, method="dpo", reward="length:mode", eval_data=prompts(2))
    assert any(note.startswith("length:mode aims at") for note in parts.notes)


# --- what is held out of prompts alone


def test_prompts_are_held_out_where_they_are_asked_for(prepared: Prepared):
    given = {"method": "rloo", "reward": "length:min", "prompts": prompts(20)}
    parts = prepared(**given, eval_fraction=0.25)
    assert parts.held_out is not None and parts.prompts is not None
    assert (len(parts.held_out), len(parts.prompts)) == (5, 15)
    assert not set(map(tuple, parts.held_out.prompts)) & set(map(tuple, parts.prompts.prompts))
    whole = prepared(**given)
    assert whole.held_out is None and whole.prompts is not None and len(whole.prompts) == 20
    assert any(note.startswith("no held-out prompts") for note in whole.notes)


@pytest.mark.parametrize(("setting", "value"), [("best_by", "reward"), ("retention", "text.txt")])
def test_what_only_an_evaluation_uses_needs_one(prepared: Prepared, here: Path, setting, value):
    (here / "text.txt").write_text("Some text.\n")
    given = {"method": "rloo", "reward": "length:min", "prompts": prompts(8), setting: value}
    with pytest.raises(UserError, match=f"{setting}: .* give eval_data or eval_fraction"):
        prepared(**given)
    with pytest.raises(UserError, match=f"{setting}: .* give eval_data or eval_fraction"):
        prepared([pair(n) for n in range(8)], method="dpo", **{setting: value})
    assert prepared(**given, eval_fraction=0.5).held_out is not None
    assert prepared(**given, eval_data=prompts(2)).held_out is not None
    assert prepared(**given, eval_fraction=0.0).held_out is None  # none is wanted


# --- prompts and rewards of pools


def pool(*members: Any, labeller: str = "best_worst") -> dict[str, Any]:
    source = {"name": "pool", "members": list(members)}
    term = {"source": source, "labeller": labeller, "objective": "dpo", "settings": {"beta": 0.1}}
    return {"name": "mine", "terms": [term]}


CHOSEN = {"name": "offline", "take": "chosen"}


@pytest.mark.parametrize("method", ["dpo", "chosen_vs_own"])
def test_prompts_that_nothing_is_drawn_to_are_told_of(prepared: Prepared, method):
    rows, given = [pair(n) for n in range(8)], {"prompts": prompts(4)}
    notes = prepared(rows, method=method, **given).notes
    assert any(note.startswith("prompts are not used") for note in notes)
    used = prepared(rows, method="hypo", **given).notes
    assert not any(note.startswith("prompts are not used") for note in used)


def test_prompts_do_not_go_with_the_datas_responses_to_others(prepared: Prepared, here: Path):
    rows = [pair(n) for n in range(8)]
    method = pool({"name": "on_policy", "samples_per_prompt": 1}, CHOSEN)
    given = {"method": method, "reward": "length:min"}
    assert prepared(rows, **given).prompts is not None
    with pytest.raises(UserError, match="prompts: .* Leave prompts out"):
        prepared(rows, **given, prompts=prompts(4))


@pytest.mark.parametrize("other", [{"name": "on_policy", "samples_per_prompt": 1}, "reference"])
def test_scores_of_the_data_are_none_of_samples_beside_them(prepared: Prepared, here, other):
    rows = [pair(n, score_chosen=1.0, score_rejected=0.0) for n in range(8)]
    with pytest.raises(UserError, match="reward: the method 'mine' judges responses"):
        prepared(rows, method=pool(CHOSEN, other))
    assert prepared(rows, method=pool(CHOSEN, other), reward="length:min").reward
    assert prepared(rows, method="offline_rwr").reward is None


def test_samples_beside_the_data_have_room(prepared: Prepared, here: Path):
    """Also those of the reference, which a pool that begins with the data draws."""
    rows = [pair(n, LONG if n % 2 else SHORT) for n in range(8)]
    method = pool(CHOSEN, "reference")
    parts = prepared(rows, method=method, reward="length:min")
    assert parts.data is not None and len(parts.data) == 4
