"""Language problems: what is said, how pairs come about, who is right."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from preftune import config, rewards
from preftune.errors import UserError
from preftune.problems import arithmetic, length, preferences, sentences, small_models, story
from preftune.problems.answering import Said, answers
from preftune.problems.preferences import Pairs, Task, make_pairs
from preftune.problems.small_models import Shape

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    """The small language, its model hardly trained."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "UPDATES", 50)
        patch.setattr(length, "EARLY", 10)
        patch.setattr(length, "ASKED", 16)
        whole = length.small(tmp_path_factory.mktemp("small"), Shape(width=32, layers=1))
        yield replace(whole, prompts=whole.prompts[:16])


def test_lengths_are_as_stated() -> None:
    assert sentences.LENGTHS.sum() == pytest.approx(1)
    assert sentences.LENGTHS[0] == 0 and int(sentences.LENGTHS.argmax()) == 8
    # 1 + failures before the sixth success, by hand: P(1) = (6/15)^6, P(2) = 6 (9/15) P(1)
    assert sentences.LENGTHS[2] / sentences.LENGTHS[1] == pytest.approx(6 * 0.6)
    assert sentences.LENGTHS[1] == pytest.approx(0.4**6, rel=0.02)  # what is longer is left out
    rows = sentences.corpus(8000, 0)
    counts = np.bincount([len(r["completion"].split()) for r in rows], minlength=25) / len(rows)
    assert np.abs(counts - sentences.LENGTHS).sum() < 0.06
    known = set(sentences.words())
    assert len(known) == len(sentences.words())
    assert all(
        word in known for r in rows[:500] for word in (r["prompt"] + " " + r["completion"]).split()
    )


def test_answers_speak_of_their_prompt() -> None:
    rng = np.random.default_rng(0)
    said = " ".join(sentences.answer("sea king grim :", rng) for _ in range(50)).split()
    assert set(said) & set(sentences.NOUNS["sea"]) and not set(said) & set(sentences.NOUNS["farm"])
    assert not set(said) & set(sentences.TONES["glad"])


def test_prompts_are_held_out(task: Task) -> None:
    assert len(task.held_out) == 64 and not set(task.held_out) & set(task.prompts)
    assert len(length.split(range(10))[1]) == 5


def test_the_models_are_made_once(task: Task) -> None:
    before = Path(task.model, "model.safetensors").stat().st_mtime_ns
    again = small_models.chain(
        Path(task.model).parent.parent, [], {"older": [], "reference": []}, shape=Shape()
    )
    assert again["reference"] == task.model
    assert Path(task.model, "model.safetensors").stat().st_mtime_ns == before


def test_an_answer_is_cut(task: Task) -> None:
    settings = config.load(task.settings())
    said = answers(settings, task.prompts[:2], 3, seed=0)
    assert [len(own) for own in said] == [3, 3]
    one = said[0][0]
    assert one.text.split()[: len(one.ids) // 2] == one.cut(len(one.ids) // 2).text.split()
    assert one.cut(1).finished and one.cut(10**9) is one
    assert (
        answers(config.load(task.settings()), task.prompts[:2], 3, seed=0)[1][2].ids
        == said[1][2].ids
    )


@pytest.mark.parametrize("compose", ["two", "extremes", "near", "expert", "mixed", "alike"])
def test_the_better_is_chosen(task: Task, compose: preferences.Compose) -> None:
    writer = "older" if compose == "mixed" else None
    rows = make_pairs(task, Pairs(compose=compose, count=48, writer=writer), seed=1)
    assert len(rows) == 48
    for row in rows:
        # special tokens count, and stand in no text
        assert -len(row["chosen"].split()) >= row["score_chosen"] > row["score_rejected"]
        if compose == "alike":
            assert row["rejected"].startswith(row["chosen"])
    assert rows == make_pairs(task, Pairs(compose=compose, count=48, writer=writer), seed=1)
    assert rows != make_pairs(task, Pairs(compose=compose, count=48, writer=writer), seed=2)


def test_who_judges_is_told_which_answers_ended(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model reads an end token after those alone."""
    told: list[bool] = []

    def judge(_: object, judged: rewards.Judged) -> list[float]:
        told.extend(judged.finished)
        assert len(judged.finished) == len(judged.completions)
        return [float(-n) for n in judged.tokens]

    monkeypatch.setattr(preferences.rewards, "judge", judge)
    make_pairs(replace(task, max_new_tokens=6), Pairs(count=16), seed=6)
    assert {True, False} == set(told)


def test_compositions_differ_as_their_names_say(task: Task) -> None:
    def of(compose: preferences.Compose) -> np.ndarray:
        rows = make_pairs(task, Pairs(compose=compose, count=64), seed=3)
        return np.array([[r["score_chosen"], r["score_rejected"]] for r in rows]).mean(0)

    far, near, expert = of("extremes"), of("near"), of("expert")
    assert far[0] - far[1] > 2 * (near[0] - near[1])
    assert expert[1] > near[1] + 1


def test_labels_are_turned(task: Task) -> None:
    rows = make_pairs(task, Pairs(count=120, noise=0.3), seed=4)
    wrong = np.mean([r["score_chosen"] < r["score_rejected"] for r in rows])
    assert 0.15 < wrong < 0.45


def test_skewed_data_are_short_and_end(task: Task) -> None:
    skew, spec = length.problem(task, "skew", {"mean": 10.0, "mode": 8})
    assert spec.shortened == pytest.approx(3.5) and skew.reward == "length:min"
    rows = make_pairs(skew, Pairs(count=100, shortened=3.5), seed=5)
    lengths = [len(r[side].split()) for r in rows for side in ("chosen", "rejected")]
    assert np.mean(lengths) < 5 and max(lengths) < 22
    cut = [r for r in rows if len(r["rejected"].split()) < 20]
    assert not any("rejected_finished" in r for r in cut)


def test_a_reward_that_tells_nothing_apart(task: Task) -> None:
    with pytest.raises(UserError, match=r"0 of .* pairs of answers differ by length:within=99"):
        make_pairs(replace(task, reward="length:within=99"), Pairs(count=16), seed=0)


def test_the_mode_is_measured_and_kept(task: Task, tmp_path: Path) -> None:
    found = length.measured(task, tmp_path)
    assert json.loads((tmp_path / "lengths.json").read_text()) == found
    assert 1 <= found["mode"] <= 24 and found["mean"] > 1 and 0 < found["finished"] <= 1
    (tmp_path / "lengths.json").write_text('{"mean": 3.0, "mode": 2, "finished": 1.0}')
    assert length.measured(task, tmp_path)["mode"] == 2
    (tmp_path / "lengths.json").write_text('{"mean": 3.0, "mode": 2}')
    assert length.measured(task, tmp_path) == found, "as it was measured before ends counted"
    assert length.problem(task, "mode", found)[0].reward == f"length:mode={found['mode']}"
    assert length.problem(task, "mode", found, target=5)[0].reward == "length:mode=5"


def test_answers_that_are_cut_have_no_common_length(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They all have the limit's length, which is nobody's habit."""

    def said(
        config: object, prompts: Sequence[object], count: int, **_: object
    ) -> list[list[Said]]:
        lengths = [3, 3, 4, 4, 4, 5, 9] + 7 * [24]
        own = [Said(ids=(1,) * k, finished=k < share, tokenizer=None) for k in lengths]
        return [own for _ in prompts]

    short, share = replace(task, max_new_tokens=24), 24
    monkeypatch.setattr(length, "answers", said)
    found = length.measured(short, tmp_path / "a")
    assert found == {"mean": 200 / 14, "mode": 4, "finished": 0.5}
    share = 4
    found = length.measured(short, tmp_path / "b")
    assert found["mode"] in (2, 3) and found["finished"] == 2 / 14
    with pytest.raises(UserError, match=r"14% of the answers of .* end within 24 tokens"):
        length.problem(short, "mode", found)
    assert length.problem(short, "mode", found, target=4)[0].reward == "length:mode=4"
    assert length.problem(short, "min", found)[0].reward == "length:min"


def test_any_model_has_prompts() -> None:
    of = length.of_model("smollm2-135m")
    assert len(of.held_out) == 64 and len(of.prompts) > 200
    assert not {json.dumps(p) for p in of.held_out} & {json.dumps(p) for p in of.prompts}


def test_the_verifier() -> None:
    said = ["8", "that makes 8", "8 so it is 9", "", "it is", "i think it is 08"]
    assert arithmetic.correct(["3 + 5 ="] * 6, said) == [1, 1, 0, 0, 0, 1]


def test_sums_are_right_as_often_as_asked() -> None:
    for right in (1.0, 0.5):
        rows = arithmetic.corpus(2000, 0, right)
        judged = arithmetic.correct([r["prompt"] for r in rows], [r["completion"] for r in rows])
        assert np.mean(judged) == pytest.approx(right, abs=0.03)
    known = set(arithmetic.words())
    assert all(w in known for r in rows for w in f"{r['prompt']} {r['completion']}".split())


def test_a_tone_gains_nothing_by_length() -> None:
    once, twice = "the kind cow runs .", "the kind cow runs . a sweet hen sings ."
    assert story.tone([once, twice, "the sour cow runs .", "bright"]) == [2.0, 2.0, -2.0, 2.5]
    assert story.either_tone(["the sour cow runs ."]) == [2.0]
    glad = story.corpus(400, 0, always="glad")
    tones = story.tone([r["completion"] for r in glad])
    assert (
        np.mean(tones) > np.mean(story.tone([r["completion"] for r in story.corpus(400, 0)])) + 0.3
    )
