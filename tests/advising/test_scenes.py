"""Enumerable problems as runs: exact figures, what is spent, and the diagnosis of them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preftune import counting
from preftune.advising import candidates, costs, running, scene
from preftune.advising.drawing import draw
from preftune.advising.files import load_all
from preftune.advising.looking import look
from preftune.advising.problem import Problem, save
from preftune.advising.scene import Scene, context_logits
from preftune.cells import Cell, advance
from preftune.policies.tree import Tree, all_responses
from preftune.problems.drawn import draws
from preftune.samples import REFERENCE
from preftune.study import curves
from preftune.theory.closed_form import kl, tilted

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems 0, 12, 24, 36 of one family, whatever their shapes."""
    path = tmp_path_factory.mktemp("problems")
    for number in (0, 12, 24, 36):
        save(draw(number), path)
    return path


@pytest.fixture(scope="module")
def each(folder: Path) -> list[Problem]:
    return load_all(folder)


def place(folder: Path) -> Scene:
    return Scene(folder=str(folder), digest=scene.digest(str(folder)))


def one_cell(folder: Path, each: list[Problem], row: str, updates: int = 6) -> Cell:
    setting = candidates.settings_of(row)[0]
    return Cell(
        problem=place(folder), method=setting.method(each[0].beta), updates=updates,
        batch_size=setting.batch_size, learning_rate=setting.learning_rate, eval_every=2,
    )  # fmt: skip


def test_contexts_of_a_table_give_the_table_back() -> None:
    torch.manual_seed(0)
    table = torch.randn(2, 3, 27, dtype=torch.float64).log_softmax(-1)
    logits = context_logits(table, 3, 3)
    assert logits.shape == (2, 3 * 13, 3)
    tokens = all_responses(3, 3)
    for a in (0, 5, 26):
        prefix, level, total = 0, 0, torch.zeros(2, 3, dtype=torch.float64)
        for t in range(3):
            rows = torch.arange(3) * 13 + level + prefix
            total += logits[:, rows, tokens[a, t]]
            prefix, level = prefix * 3 + int(tokens[a, t]), level + 3**t
        torch.testing.assert_close(total, table[..., a])


def test_a_run_starts_at_the_reference_and_its_value_is_exact(folder, each) -> None:
    method = candidates.settings_of("dpo")[0].method(each[0].beta)
    world = place(folder).world(method, (0,), 32)
    policy, p = world.policy, each[0]
    assert isinstance(policy, Tree)
    torch.testing.assert_close(policy.log_joint()[0].double(), p.ref_logp(), atol=1e-4, rtol=0)
    best = tilted(p.ref_logp(), p.true_reward(), p.beta)
    found = scene.worth(best, sorted(folder.glob("*.json"))[0])
    by_hand = ((best.exp() * p.true_reward()).sum(-1) - p.beta * kl(best, p.ref_logp())).mean()
    assert float(found["value"]) == pytest.approx(float(by_hand), abs=1e-6)
    start = scene.worth(p.ref_logp(), sorted(folder.glob("*.json"))[0])
    assert float(start["win"]) == pytest.approx(0.5, abs=1e-9)
    assert found["value"] > start["value"] and found["win"] > 0.5


def test_a_run_alone_is_what_it_is_in_company(folder, each) -> None:
    same = [i for i, p in enumerate(each) if p.shape == each[0].shape]
    runs = tuple(scene.run_number(i, s) for i in same for s in (0, 1))
    for row in ("half_and_half", "hypo"):
        cell = one_cell(folder, each, row)
        together, alone = (
            curves(advance(cell, runs), runs),
            curves(advance(cell, runs[:1]), runs[:1]),
        )
        assert torch.equal(together.figures["value"][:1], alone.figures["value"]), row


@pytest.mark.parametrize(("row", "trained", "drawn", "judged"), [
    ("pref_ft", 64, 0, 0),
    ("dpo", 64, 0, 0),
    ("on_policy_dpo", 64, 32, 32),  # rounds of 64 samples, gone through twice
    ("rloo", 64, 64, 64),
    ("ppo", 64, 32, 32),
    ("hypo", 128, 64, 0),  # 32 pairs, and 32 prompts with two samples
    ("half_and_half", 64, 16, 16),
    ("chosen_vs_own", 64, 16, 0),
    ("auto", 64, 32, 32),
    ("on_policy_best_of_n", 64, 128, 128),
])  # fmt: skip
def test_what_an_update_takes(folder, each, row, trained, drawn, judged) -> None:
    run = scene.run_number(0, 0)
    end = advance(one_cell(folder, each, row, updates=4), (run,))[-1]
    assert [end[name] / 4 for name in counting.COUNTS] == [trained, drawn, judged]


def test_reference_samples_are_paid_once(folder, each) -> None:
    pairs = len(each[0].pairs)
    updates = 2 * math.ceil(pairs / 64) + 2
    end = advance(one_cell(folder, each, "best_of_n", updates), (scene.run_number(0, 0),))[-1]
    assert end["drawn"] == end["judged"] == 4 * pairs


@pytest.mark.parametrize("row", ["dpo", "best_of_n"])
def test_a_short_minibatch_counts_as_what_it_is(folder, each, row) -> None:
    """Two epochs and no more: every response once an epoch, and the run is long enough."""
    pairs, width = len(each[0].pairs), {"dpo": 2, "best_of_n": 1}[row]
    of_each = {"dpo": 32, "best_of_n": 64}[row]
    assert pairs % of_each
    updates = 2 * math.ceil(pairs / of_each)
    end = advance(one_cell(folder, each, row, updates), (scene.run_number(0, 0),))[-1]
    assert end["trained"] == 2 * pairs * width


def test_runs_are_as_long_as_the_budget(folder, each) -> None:
    for row in ("dpo", "best_of_n", "ppo", "half_and_half"):
        job = running.jobs(
            str(folder), each, [running.Arm(0, candidates.settings_of(row)[0])], [0]
        )[0]
        rows = advance(job.cell, job.runs)
        spent = [p["spent"] for p in running.curve(each[0], rows)]
        assert spent[-1] >= each[0].budget, row
        # samples that are drawn once are dear in the first epoch alone
        assert row == "best_of_n" or spent[-1] < 1.25 * each[0].budget, row


def test_a_ranking_says_who_is_better_and_no_more() -> None:
    utility = torch.tensor([[[3.0, 1.0, 2.0, 100.0]], [[0.0, 5.0, -1.0, 1.0]]])
    found = scene.ranked(utility)
    assert torch.allclose(found[0, 0], torch.tensor([2 / 3, -2.0, -2 / 3, 2.0]))
    assert torch.equal(scene.ranked(3 * utility + 7), found)
    wins = torch.tensor([[[0.1, 0.0]]])
    assert scene.ranked(wins).tolist() == [[[2.0, -2.0]]]


def test_each_run_reads_its_pairs_in_its_own_order(folder, each) -> None:
    seeds = tuple(scene.run_number(0, s) for s in (0, 1))
    method = candidates.settings_of("dpo")[0].method(each[0].beta)
    tokens = place(folder).world(method, seeds, 32).data.tokens
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0].sum((0, 1)), tokens[1].sum((0, 1)))


def test_a_humans_label_of_a_kept_sample_stays(tmp_path) -> None:
    p = draw(0)
    save(replace(p, labels=replace(p.labels, source="human")), tmp_path)
    run = (scene.run_number(0, 0),)
    world = place(tmp_path).world(candidates.settings_of("best_of_n")[0].method(0.1), run, 8)
    prompt = torch.zeros(1, 6, 1, dtype=torch.long)
    drawn = world.reference.sample(prompt, torch.ones_like(prompt).bool(), 4, draws((0,), "t"), 0)
    row = torch.arange(6)[None]
    kept = replace(drawn, row=row, origin=torch.full_like(drawn.origin, REFERENCE))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(world.reward(kept).index_select(1, order), world.reward(kept.take(order)))
    fresh = replace(drawn, row=row)
    again = replace(fresh, origin=fresh.origin + 1)
    assert not torch.equal(world.reward(fresh), world.reward(again))


def test_a_reward_model_is_paid_by_who_uses_it(each) -> None:
    from dataclasses import replace

    p = replace(each[0], labels=replace(each[0].labels, source="rm_same"))
    assert costs.spent(p, 10, 0, 0) == 10
    with_model = costs.spent(p, 10, 4, 4)
    assert with_model == pytest.approx(
        10 + 4 * p.prices.sample + 4 * p.prices.label + 2 * len(p.pairs)
    )


def test_a_figure_between_two_places() -> None:
    points = [
        {"step": 0, "spent": 200.0, "value": 0.0},
        {"step": 2, "spent": 300.0, "value": 1.0},
        {"step": 4, "spent": 400.0, "value": 3.0},
    ]
    # a reward model was paid before the first update
    assert running.at(points, "value", 150.0) == 0.0
    assert running.at(points, "value", 250.0) == pytest.approx(0.5)
    assert running.at(points, "value", 350.0) == pytest.approx(2.0)
    assert running.at(points, "value", 1000.0) == 3.0


def test_own_samples_as_data_look_like_own_samples() -> None:
    """The family whose data are the reference's: z is (0, 1), ranks are uniform."""
    seen = look(draw(0))
    for side in ("chosen", "rejected"):
        z = seen.figures[f"surprisal_{side}"]
        assert z.low is not None and z.high is not None and z.low - 0.4 < 0 < z.high + 0.4
    assert 0 < seen.price[0] < seen.price[1] < seen.price[2]
    strange = look(draw(10))  # uniform data
    assert strange.figures["surprisal_chosen"].value > 0.8
    assert type(seen).of_plain(seen.plain()) == seen


def test_samples_of_the_diagnosis_are_the_references(folder, each) -> None:
    """Drawn by the tree itself, frequencies agree with the table that `look` inverts."""
    world = place(folder).world(candidates.settings_of("dpo")[0].method(each[0].beta), (0,), 32)
    assert isinstance(world.reference, Tree)
    prompt = torch.zeros(1, 400, 1, dtype=torch.long)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    drawn = world.reference.sample(prompt, mask, 8, draws((0,), "test"), 0)
    place_value = each[0].vocab ** torch.arange(each[0].length - 1, -1, -1)
    number = (drawn.tokens * place_value).sum(-1).flatten()
    p = each[0].ref_logp().exp()[0]
    seen = torch.bincount(number, minlength=len(p)).double() / len(number)
    assert float((seen - p).abs().sum()) < 0.35
