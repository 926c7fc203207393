"""Problems whose reference is a model folder: files, drawing, runs, and a study of both kinds."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import counting, loop
from preftune.advising import (
    candidates,
    drawing,
    files,
    looking,
    problem,
    regret,
    report,
    running,
    scene,
    stated,
    study,
    text_drawing,
    text_judges,
    text_looking,
    text_models,
    text_scene,
    texts,
)
from preftune.advising.looking import Seen
from preftune.advising.rule import Racing
from preftune.advising.stated import FORMAT, Prices
from preftune.advising.text_scene import TRUE, TextScene, controlled
from preftune.advising.texts import TextLabels, TextProblem
from preftune.cells import Cell, advance
from preftune.data import Renderer, Rows
from preftune.errors import UserError
from preftune.problems import story
from preftune.samples import REFERENCE, Samples

FEW = 64
"""Pairs of a drawn problem."""


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """Everything small."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (text_models, "UPDATES", {text_models.OLDER: 5, text_models.REFERENCE: 30}),
            (text_models, "SHAPE", replace(text_models.SHAPE, width=32, layers=1)),
            (text_drawing, "PAIRS", (FEW,)), (text_drawing, "TOKENS", 16),
            (text_scene, "SAMPLES", 8), (text_scene, "REFERENCE_SAMPLES", 32),
            (running, "TEXT_POINTS", 2),
            (text_judges, "EPOCHS", 8),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def folder(few: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and no problem."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("texts")
    text_models.make(path, 0)
    return path


Draw = Callable[..., TextProblem]


@pytest.fixture(scope="module")
def drawn(folder: Path) -> Draw:
    """Draw a problem by its pairs' policy, and change it."""

    once = cache(text_drawing.draw)

    def make(number: int, **changes: Any) -> TextProblem:
        found = replace(once(number, folder), **changes)
        texts.save(found)
        files.load.cache_clear()
        again = files.load(folder / f"{found.name}.json")
        assert isinstance(again, TextProblem)
        return again

    return make


@pytest.fixture(scope="module")
def expert(drawn: Draw) -> TextProblem:
    """Pairs of an expert in loud words, where humans label."""
    return drawn(36, labels=TextLabels(source="human"), beta=0.05, budget=64.0 * 24)


def place(p: TextProblem) -> TextScene:
    path = str(p.folder / f"{p.name}.json")
    return TextScene(path, p.digest, str(p.folder / "rm"))


def started(p: TextProblem, row: str, seed: int = 0) -> loop.State:
    setting = candidates.settings_of(row, "text")[0]
    world = place(p).world(setting.method(p.beta), (seed,), setting.batch_size)
    return loop.start(setting.method(p.beta), world, SETTINGS)


SETTINGS = loop.Settings(max_steps=4, learning_rate=1e-3, warmup_ratio=0.0)


# Files.


def plain(model: str, **changes: object) -> dict[str, Any]:
    pairs = [{"prompt": "say", "chosen": "no", "rejected": "yes yes"}] * 3
    return {
        "format": FORMAT, "name": "small", "family": "hand", "reference": {"model": model},
        "reward": "length:within=4", "pairs": pairs, "labels": {"source": "human"},
        "held_out": [{"prompt": "tell"}, {"prompt": "ask"}],
        "prices": {"label": 3.0, "sample": 1.0}, "beta": 0.1, "budget": 500.0,
    } | changes  # fmt: skip


def written(path: Path, model: str, **changes: object) -> Path:
    (path / "small.json").write_text(json.dumps(plain(model, **changes)))
    return path / "small.json"


def test_a_problem_comes_back_as_it_was_drawn(folder: Path, drawn: Draw) -> None:
    one = text_drawing.draw(0, folder)
    again = files.load(texts.save(one))
    assert isinstance(again, TextProblem)
    assert texts.plain(again) == json.loads(json.dumps(texts.plain(one)))
    assert again.digest == one.digest
    assert again.labels.source == one.labels.source and len(again.pairs) == FEW
    assert drawn(0).pairs == one.pairs, "by number alone"
    other = replace(one, beta=one.beta / 2)
    assert other.digest != one.digest


def test_a_file_by_hand(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "cc", "rejected_finished": false}\n'
    )
    (tmp_path / "own.py").write_text(
        "def length(completions, **_):\n    return [len(x) for x in completions]\n"
    )
    found = files.load(written(tmp_path, tiny_model, pairs="p.jsonl", reward="own.py:length"))
    assert isinstance(found, TextProblem)
    assert found.kind == "text" and found.pairs[0]["rejected_finished"] is False
    assert found.prices == Prices(label=3.0, sample=1.0) and found.shape == ("small", 1, 0.1)
    before = found.digest
    (tmp_path / "own.py").write_text("def length(completions, **_):\n    return completions\n")
    assert replace(found).digest != before, "it is another reward"


@pytest.mark.parametrize(("changes", "words"), [
    ({"format": "other"}, "'format'"),
    ({"reference": {"model": "nowhere"}}, "reference.model 'nowhere' is no folder"),
    ({"reference": {"model": "."}}, "config.json"),
    ({"reference": {"folder": "x"}}, '{"model": FOLDER}'),
    ({"pairs": "none.jsonl"}, "none.jsonl"),
    ({"pairs": [{"prompt": "a", "chosen": "b"}]}, "rejected"),
    ({"pairs": []}, "'pairs'"),
    ({"pairs": [*[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9, {"prompt": "a"}]},
     "data:10 cannot be used"),
    ({"held_out": [{"prompt": "a"}]}, "fewer than 2 prompts"),
    ({"reward": "lenght:min"}, "lenght:min"),
    ({"reward": "length:mode"}, "length:mode=L"),
    ({"labels": {"source": "crowd"}}, "labels.source 'crowd'"),
    ({"labels": {"source": "rm_other"}}, "'labels.reward' is missing"),
    ({"prices": {"label": -1.0, "sample": 1.0}}, "price"),
    ({"beta": 0}, "'beta'"),
    ({"max_new_tokens": 0}, "'max_new_tokens'"),
    ({"unknown": 1}, "unknown"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, tiny_model: str, changes: dict[str, Any], words: str
) -> None:
    path = written(tmp_path, tiny_model, **changes)
    with pytest.raises(UserError) as error:
        files.load(path)
    assert words in str(error.value) and "small.json" in str(error.value)
    assert "docs/advise.md" in str(error.value)


# What is drawn.


def test_the_language_and_its_rewards() -> None:
    rows = story.corpus(960, 0)
    loud = [sum(story.loud([r["completion"] for r in rows if mood in r["prompt"]]))
            for mood in ("wild", "even")]  # fmt: skip
    assert loud[0] > 3 * loud[1]
    assert story.praise(["the kind sweet cow runs .", "a sour cow runs ."]) == [2.0, -1.0]
    assert story.either_way(["a sour grey cow runs ."]) == [2.0]
    assert story.to_the_point(["farm glad :"], ["a cow runs . a ship runs . the hen runs ."]) \
        == [1.0]  # fmt: skip
    assert story.fresh_words(["a cow runs . a hen runs ."]) == [-3.0]
    assert story.ascending(["a cow . runs"]) == [pytest.approx(2 / 3)]


def test_pairs_come_from_where_they_are_said_to(drawn: Draw, expert: TextProblem) -> None:
    """Of one family and one reward: what the responses of the pairs are worth by their policy."""
    each = [expert, drawn(26), drawn(16)]
    assert [p.about["data"] for p in each] == ["expert", "own", "anti"]
    worth = []
    for p in each:
        assert p.family == "text_words" and "loud" in p.reward[0]
        found = story.loud([row[side] for row in p.pairs for side in ("chosen", "rejected")])
        worth.append(sum(found) / len(found))
    assert worth[0] > worth[1] + 0.2 > worth[2] + 0.4
    chosen, rejected = (
        sum(story.loud([row[side] for row in each[1].pairs])) for side in ("chosen", "rejected")
    )
    assert chosen > rejected, "the better is preferred"
    asked = {row["prompt"] for row in expert.pairs}
    assert not asked & {row["prompt"] for row in expert.held_out}


def test_a_judge_is_told_which_answers_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        text_drawing.rewards, "judge", lambda _, judged: [float(x) for x in judged.finished]
    )
    said = text_drawing._judged(None, "go", [("a cow", True), (" ", True), ("a hen", False)])
    assert [(s.text, s.worth) for s in said] == [("a cow", 1.0), ("a hen", 0.0)]


# Runs.


def test_a_run_starts_at_the_reference(expert: TextProblem) -> None:
    run = started(expert, "dpo")
    found = {k: float(v) for k, v in place(expert).evaluate(run).items()}
    held = text_scene.load(expert, expert.folder / "rm")
    many = held.answers(held.reference, -1, text_scene.REFERENCE_SAMPLES).rewards[TRUE]
    assert found["value"] == pytest.approx(float(many.mean()), abs=1e-6)
    assert found["proxy"] == pytest.approx(found["value"]), "humans judge by the true reward"
    assert found["reverse_kl"] == pytest.approx(0.0, abs=1e-5)
    assert found["win"] == pytest.approx(0.5, abs=0.1)
    spread = many.var(-1).mean().sqrt()
    assert found["proxy_spread"] == pytest.approx(float(spread), rel=0.3)
    assert [found[n] for n in counting.COUNTS] == [0.0, 0.0, 0.0]


def test_the_value_is_reward_less_beta_kl(expert: TextProblem) -> None:
    """By hand, of a policy that has moved; the control variate moves it by luck alone."""
    run = started(expert, "dpo")
    for _ in range(4):
        loop.update(run, SETTINGS, measure=False)
    found = {k: float(v) for k, v in place(expert).evaluate(run).items()}
    held = text_scene.load(expert, expert.folder / "rm")
    policy: Any = run.world.policy
    mine, theirs = (held.answers(p, 0) for p in (policy, held.reference))
    assert mine.kl is not None and float(mine.kl.mean()) > 0.01
    assert found["reverse_kl"] == pytest.approx(float(mine.kl.mean()), abs=1e-6)
    plain = float((mine.rewards[TRUE] - expert.beta * mine.kl).mean())
    many = held.answers(held.reference, -1, text_scene.REFERENCE_SAMPLES).rewards[TRUE]
    luck = float(theirs.rewards[TRUE].mean() - many.mean())
    low, high = sorted((plain, plain - luck))
    assert low - 1e-6 <= found["value"] <= high + 1e-6


def test_luck_is_taken_out() -> None:
    torch.manual_seed(0)
    true, plain, held = 0.5, [], []
    for _ in range(200):
        same = torch.randn(4, 8, dtype=torch.float64)
        own = same + true + 0.3 * torch.randn_like(same)
        many = torch.randn(4, 4096, dtype=torch.float64)
        plain.append(float(own.mean()) - true)
        held.append(controlled(own, same, many) - true)
    assert torch.tensor(held).std() < 0.5 * torch.tensor(plain).std()
    assert abs(torch.tensor(held).mean()) < 0.02
    x = torch.tensor([[1.0, 1.0]])
    assert controlled(x + 2, x, x) == pytest.approx(3.0), "a reward without any spread"


@pytest.mark.parametrize(("row", "trained", "drawn_", "judged"), [
    ("pref_ft", 64, 0, 0),
    ("dpo", 64, 0, 0),
    ("on_policy_dpo", 64, 32, 32),  # rounds of 64 samples, gone through twice
    ("rloo", 64, 64, 64),
    ("hypo", 128, 64, 0),  # 32 pairs, and 32 prompts with two samples
    ("half_and_half", 64, 16, 16),
])  # fmt: skip
def test_what_an_update_takes(expert, row, trained, drawn_, judged) -> None:
    run = started(expert, row)
    for _ in range(2):
        loop.update(run, SETTINGS, measure=False)
    found = counting.counts(run)
    assert [found[name] / 2 for name in counting.COUNTS] == [trained, drawn_, judged]


def test_an_experts_words_are_learnt(expert: TextProblem) -> None:
    """A whole short run: the true reward rises, and what it cost is what was allowed."""
    folder = expert.folder
    each = files.load_all(folder)
    at = [p.name for p in each].index(expert.name)
    setting = candidates.settings_of("pref_ft", "text")[0]
    arm, models = running.Arm(at, setting), str(folder / "rm")
    (job,) = running.jobs(str(folder), each, [arm], (0,), 0, models)
    points = running.curve(expert, advance(job.cell, job.runs))
    assert job.cell.updates == 24 and points[-1]["spent"] == 24 * 64 == expert.budget
    assert points[-1]["value"] > points[0]["value"] + 0.1
    assert points[-1]["win"] > 0.5 and points[-1]["reverse_kl"] > 0.01


# Judges.


def test_the_model_of_the_pairs_knows_them_and_is_trained_once(expert: TextProblem) -> None:
    models = expert.folder / "own"
    judge = text_judges.by_model(text_judges.own_model(expert, models))
    held = text_scene.load(expert, models)
    score = judge(held.rows.samples(torch.arange(FEW)), held.rows)
    assert score.shape == (FEW, 2) and float((score[:, 0] > score[:, 1]).double().mean()) > 0.6
    (made,) = models.glob("*/model/model.safetensors")
    before = made.stat().st_mtime_ns
    text_judges.own_model(expert, models)
    assert made.stat().st_mtime_ns == before


def asked(n: int, origin: int) -> Samples:
    ones = torch.ones(n, 2, 1)
    return Samples(
        prompt=ones[:, 0].long(), prompt_mask=ones[:, 0].bool(), tokens=ones.long(),
        mask=ones.bool(), finished=ones[..., 0].bool(), origin=torch.full((n, 2), origin),
        row=torch.arange(n),
    )  # fmt: skip


NO_ROWS = Rows(prompts=[], responses=[], finished=[], columns={}, texts=[], where=[],
               kind="prompts")  # fmt: skip


def one_nat(samples: Samples, rows: Rows) -> torch.Tensor:
    return torch.tensor([1.0, 0.0]).double().expand(samples.origin.shape)


def test_a_human_ranks_by_bradley_terry_and_says_no_more() -> None:
    human = text_judges.by_human(one_nat, 3)
    found = human(asked(4000, 0), NO_ROWS)
    assert set(found.unique().tolist()) == {-2.0, 2.0}, "who is better, not by how much"
    won = float((found[:, 0] > found[:, 1]).double().mean())
    assert won == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.03)
    other = text_judges.by_human(one_nat, 4)
    assert not torch.equal(other(asked(4000, 0), NO_ROWS), found)


def test_what_is_said_of_a_kept_sample_stays() -> None:
    human, back = text_judges.by_human(one_nat, 3), torch.arange(99, -1, -1)
    kept, fresh = asked(100, REFERENCE), asked(100, 5)
    assert torch.equal(human(kept.take(back), NO_ROWS).flip(0), human(kept, NO_ROWS))
    again = human(replace(fresh, origin=fresh.origin + 1), NO_ROWS)
    assert not torch.equal(again, human(fresh, NO_ROWS)), "of a fresh one it is drawn anew"


def test_who_labels_by_the_true_reward_has_no_noise(drawn: Draw) -> None:
    p = drawn(0, labels=TextLabels(source="true"))
    world = place(p).world(candidates.settings_of("rloo", "text")[0].method(p.beta), (0,), 8)
    samples = text_scene.load(p, p.folder / "rm").rows.samples(torch.arange(8))
    assert world.reward is not None
    found, true = world.reward(samples), text_scene.load(p, p.folder / "rm").true
    assert torch.equal(found, true(samples, world.data))


def test_another_reward_model_is_a_worse_one(drawn: Draw) -> None:
    other = TextLabels(
        source="rm_other", reward=["length:min", "length:within=3"], reward_weights=[0.1, 0.2]
    )
    p = drawn(0, labels=other)
    held = text_scene.load(p, p.folder / "rm")
    samples = held.rows.samples(torch.arange(8))
    tokens = samples.lengths().double() - samples.finished.double()
    expected = -0.1 * tokens - 0.2 * (tokens - 3).clamp(min=0)
    torch.testing.assert_close(held.judge(samples, held.rows), expected)
    assert not torch.equal(held.true(samples, held.rows), expected)
    assert isinstance(held.renderer, Renderer)


def test_own_samples_as_data_look_like_own_samples(drawn: Draw) -> None:
    p = drawn(0, labels=TextLabels(source="human"))
    assert p.about["data"] == "own"
    seen = text_looking.look(p, p.folder / "rm")
    z = seen.figures["surprisal_chosen"]
    assert z.low is not None and z.high is not None and z.low - 0.4 < 0 < z.high + 0.4
    assert 0 < seen.price[0] < seen.price[1] < seen.price[2]
    assert type(seen).of_plain(seen.plain()) == seen
    assert "told_apart" in seen.figures and "spearman" not in seen.figures
    reached = seen.figures["reached_chosen"].value
    assert reached is not None and 0.1 < reached < 0.7, "one comparison a prompt"
    assert seen.price[2] - seen.price[1] == pytest.approx(looking.PROMPTS * p.prices.label)
    scored = text_looking.look(replace(p, labels=TextLabels(source="true")), p.folder / "rm")
    assert "reward_accuracy" in scored.figures


# A study.


def made_up(cell: Cell, numbers: tuple[int, ...]) -> list[dict[str, Any]]:
    """Runs that nothing is computed for: a row's worth is what it is called, more at a higher rate
    and on problems of a language model."""
    kind = 2.0 if isinstance(cell.problem, TextScene) else 1.0
    end = kind * (len(cell.method.name) / 10 + cell.learning_rate)
    asked = 64.0 if cell.method.name != "pref_ft" else 0.0
    return [
        {"seed": n, "step": step, "value": share * end, "proxy": share * end, "proxy_spread": 1.0,
         "win": 0.5 + share / 4, "reverse_kl": share, "trained": 64.0 * step, "drawn": asked * step,
         "judged": asked * step}
        for n in numbers for step, share in ((0, 0.0), (cell.updates, 1.0))
    ]  # fmt: skip


@pytest.fixture
def both(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two problems of each kind, of four families; their runs and diagnoses are made up."""
    for number in (0, 1):
        problem.save(drawing.draw(number), tmp_path)
        name = f"text-{number}"
        path = written(tmp_path, tiny_model, name=name, family=name)
        path.rename(tmp_path / f"{name}.json")
    seen = Seen(figures={}, price={0: 1.0, 1: 2.0, 2: 3.0})
    for target, value in (
        ("preftune.cells.advance", made_up),
        ("preftune.advising.study._look", lambda p, models, seed: seen),
        ("preftune.advising.running._taken", lambda *_: (64.0, 0.0, 0.0)),
        ("preftune.advising.candidates.names", lambda: ["pref_ft", "rloo", "half_and_half"]),
        ("preftune.advising.assess.RACINGS", (Racing(rows=1, below=0.0),)),
        ("preftune.advising.assess.RIDGES", (0.1,)),
        ("preftune.advising.assess.TIERS", (-1, 0)),
    ):
        monkeypatch.setattr(target, value)
    return tmp_path


def test_a_study_of_both_kinds_and_nothing_twice(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> study.Studied:
        return study.run(
            both, both / "out", seed_base=0, workers=0, tuned=None,
            tick=lambda stage: lambda done, total: None,
        )  # fmt: skip

    done = run()
    assert [p.kind for p in done.runs.problems] == ["enumerable"] * 2 + ["text"] * 2
    assert set(done.tuned) == {"likely", "unlikely", "text-0", "text-1"}
    seeds = {i: {s for arm, own in done.runs.curves.items() if arm[0] == i for s in own}
             for i in range(4)}  # fmt: skip
    for i, p in enumerate(done.runs.problems):
        own = stated.EFFORT[p.kind]
        assert seeds[i] == {*own.selection, *own.fresh}
        places = {arm[2] for arm in done.runs.curves if arm[:2] == (i, "rloo")}
        assert len(places) == own.settings
    _check_results(done, both / "out")
    before = (both / "out/runs/metrics.jsonl").read_text()
    monkeypatch.setattr("preftune.cells.advance", None)
    again = run()
    assert (both / "out/runs/metrics.jsonl").read_text() == before, "nothing is run twice"
    assert again.tuned == done.tuned and again.seen == done.seen


def _check_results(done: study.Studied, out: Path) -> None:
    """Results by kind, rules of one kind judged on the other, settings of each."""
    result = report.conclude(done, out, fit=True)
    assert {k: x["problems"] for k, x in result["by_kind"].items()} == {"enumerable": 2, "text": 2}
    assert set(result["other_kinds"]["kind of problem"]["by_kind"]) == {"enumerable", "text"}
    assert sum(line.startswith(("text", "enum")) for line in report.lines(result)) == 2
    shipped = json.loads((out / "rule.json").read_text())
    assert "kind" not in " ".join(shipped["rule"]["names"])
    tuned = regret.tune(done.runs, done.runs.gains(), range(4))
    for name, kind in (("settings", "enumerable"), ("text_settings", "text")):
        own = candidates.settings_of("pref_ft", kind)[tuned[kind]["pref_ft"]]
        assert shipped[name]["pref_ft"] == own.plain()


def test_what_stands_beside_changes_nothing_of_enumerable_problems(
    tmp_path: Path, tiny_model: str
) -> None:
    """Run numbers and keys of runs that are on disk already."""
    for number in (0, 1, 2):
        problem.save(drawing.draw(number), tmp_path)

    def found() -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
        each = files.load_all(tmp_path)
        arms = [running.Arm(i, candidates.settings_of("dpo")[0]) for i in range(3)]
        jobs = running.jobs(str(tmp_path), each, arms, (0, 1))
        scene.digest.cache_clear()
        return scene.digest(str(tmp_path)), [(j.cell.key, j.runs) for j in jobs]

    before = found()
    written(tmp_path, tiny_model)
    (tmp_path / "small.json").rename(tmp_path / "a.json")  # first by name
    assert found() == before
    assert [p.kind for p in files.load_all(tmp_path)] == ["enumerable"] * 3 + ["text"]


def test_families_of_two_kinds_and_single_ones_are_refused(tmp_path: Path, tiny_model: str) -> None:
    written(tmp_path, tiny_model)
    with pytest.raises(UserError, match="all text ones are of the family 'hand'"):
        refuse(tmp_path, tuned={"enumerable": {}})
    problem.save(replace(drawing.draw(0), family="hand"), tmp_path)
    with pytest.raises(UserError, match="both of tables and of a language model"):
        refuse(tmp_path, tuned=None)
    assert not (tmp_path / "out").exists()


def refuse(folder: Path, tuned: regret.ByKind | None) -> None:
    study.run(
        folder, folder / "out", seed_base=0, workers=0, tuned=tuned,
        tick=lambda stage: lambda done, total: None,
    )  # fmt: skip


def test_rows_have_as_many_settings_as_are_run() -> None:
    for row in candidates.names():
        each = candidates.settings_of(row, "text")
        assert len({s.plain().__repr__() for s in each}) == stated.EFFORT["text"].settings == 2
