"""Alarms: each on a run that is built for it and on a control, at its edges, and after a resume.

The runs and their figures stand in docs/alarms.md.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import leaning
from leaning import ALIKE, APART, evaluator, judged_world, leaning_world, pairs_world, watched
from preftune import alarms, signs, train
from preftune.alarms import WINDOW, Series, Watch
from preftune.evaluate import answer, figures
from preftune.events import Event
from preftune.labellers.base import Shaping
from preftune.report import write_report
from preftune.report.alarms import Agreement, agreement, of_seeds
from preftune.report.read import read_runs
from preftune.resuming import resumed
from preftune.samples import Samples
from preftune.signs import ALARMS, View
from tables import make_world, row_of

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def by_arm(samples: Samples) -> Tensor:
    return samples.tokens.squeeze(-1).double()


def tied(samples: Samples) -> Tensor:
    return torch.zeros(samples.finished.shape, dtype=torch.float64)


def spoilt(samples: Samples) -> Tensor:
    """Follows the arm's number up to 10; from there on three times as fast, downwards."""
    arm = by_arm(samples)
    return torch.where(arm <= 10, arm, 10 - 3 * (arm - 10))


def noisy(samples: Samples) -> Tensor:
    """The arm's number, and a disagreement with it that is the same everywhere."""
    arm = by_arm(samples)
    return arm + 4 * torch.sin(1.7 * arm + samples.row.unsqueeze(-1))


# Runs that are built for an alarm, and their controls.


def test_ties() -> None:
    fired, _ = watched(row_of("on_policy_dpo"), make_world("on_policy_dpo", reward=tied), 6, 0.05)
    assert fired["ties"].step == 1 and "finer reward" in fired["ties"].message
    quiet, _ = watched(row_of("on_policy_dpo"), make_world("on_policy_dpo"), 6, 0.05)
    assert "ties" not in quiet


def test_a_policy_far_from_the_reference() -> None:
    """A pair whose chosen arm has e^-60 of the reference, and one whose arm has e^-4."""
    row = row_of("hypo", weight=0.0, beta=0.01)  # fresh samples are logged, and hold nothing
    fired, logged = watched(row, pairs_world([0.0, -60.0], (1, 0)), 24, 2.0)
    quiet, control = watched(row, pairs_world([0.0, -4.0], (1, 0)), 24, 2.0)
    assert "nats a response" in fired["kl"].measured and "kl" not in quiet
    assert logged[-1]["kl"] > 59 and 3.5 < control[-1]["kl"] < 4.1
    # without samples in training, at the first evaluation that shows it
    world = pairs_world([0.0, -60.0], (1, 0))
    how = {"eval_every": 12, "evaluate": evaluator(world, {})}
    fired, _ = watched(row_of("dpo", beta=0.01), world, 24, 2.0, **how)
    assert fired["kl"].step == 24


@pytest.mark.parametrize("centres", [(10,), (4, 16)])
def test_mode_seeking(centres: tuple[int, ...]) -> None:
    """One best arm or two that are equally good; the control is held by a KL in the reward."""

    def run(kl: float) -> tuple[dict, list]:
        world = judged_world(leaning.peaks(*centres), states=8, slope=0.0)
        return watched(row_of("rloo", kl=kl), world, 48, 0.6)

    fired, logged = run(0.0)
    quiet, control = run(5.0)
    assert {"entropy", "modes"} <= fired.keys() and not quiet
    assert logged[31]["entropy"] < 0.2 and logged[31]["distinct_samples"] < 0.1
    assert control[31]["entropy"] > 2.5 and control[31]["distinct_samples"] > 0.8


def test_samples_of_another_policy() -> None:
    """An engine that never gets the new weights, and one that has them."""

    def run(follows: bool) -> tuple[dict, list]:
        world = judged_world(leaning.peaks(10), states=8, slope=0.0)
        engine = world.policy if follows else world.policy.frozen_copy()
        return watched(row_of("rloo"), replace(world, engine=engine), 48, 0.1)

    (fired, logged), (quiet, control) = run(False), run(True)
    assert fired["sampler"].step == 24 and "sampler" not in quiet
    assert "1.09 nats a response, and 56% of the samples" in fired["sampler"].measured
    assert logged[-1]["sampler_gap"] > 2 and logged[-1]["sampler_effective_sample_size"] < 0.5
    assert max(m["sampler_gap"] for m in control) == 0


def test_a_value_head_far_from_the_rewards() -> None:
    """Rewards around -25, as they are and less the mean of earlier rounds."""
    row, centred = row_of("ppo"), Shaping(standardise="running")
    terms = tuple(replace(t, labeller=replace(t.labeller, shaping=centred)) for t in row.terms)
    fired, logged = watched(row, leaning.far_world(-20.0), 24, 0.1)
    quiet, control = watched(replace(row, terms=terms), leaning.far_world(-20.0), 24, 0.1)
    assert fired["value"].step == 16 and "standardise=running" in fired["value"].cure
    assert "off by 8.3 deviations of its target, 8.1 before" in fired["value"].measured
    assert "value" not in quiet and logged[0]["value_offset"] == control[0]["value_offset"] > 8
    assert max(m["value_offset"] for m in control[3:]) < 1.5


@cache
def on_features(method: str, shared: bool, weight: float | None = None) -> tuple[dict, list]:
    """Pairs of arms that share most of their features, or none."""
    row = row_of(method, **({} if weight is None else {"weight": weight}))
    world = leaning_world(ALIKE if shared else APART)
    offline = not row.on_policy and weight is None
    how = {"eval_every": 16, "evaluate": evaluator(world, {})} if offline else {}
    fired, logged = watched(row, world, 64, 0.1, **how)
    return fired, [metrics for metrics in logged if metrics["step"]]


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_chosen_falls_with_rejected(method: str) -> None:
    """By the reference where there is one, else by the log-prob at first."""
    fired, logged = on_features(method, True)
    quiet, control = on_features(method, False)
    assert "ln-CHES" in fired["displacement"].cure and "displacement" not in quiet
    name = "log_ratio_chosen" if method == "dpo" else "logp_chosen"
    assert logged[-1][name] < logged[0][name] - 3 and control[-1][name] > control[0][name] + 0.5
    assert logged[-1]["margin"] > 1 and control[-1]["margin"] > 1
    seen = logged[fired["displacement"].step - 1]
    assert seen[name] < (-5 if method == "dpo" else 1.5 * logged[0][name]), "not before it is lost"


def test_the_cure_of_displacement() -> None:
    quiet, logged = on_features("dpop", True)
    assert "displacement" not in quiet and logged[-1]["log_ratio_chosen"] > -0.5


def test_leaving_what_the_data_cover() -> None:
    """The mass goes to an arm that is in no pair; the controls hold fresh samples by their KL, or
    have pairs whose chosen arm takes what the rejected one loses."""
    fired, logged = on_features("hypo", True, 0.0)  # samples are logged, and hold nothing
    held, control = on_features("hypo", True, 1.0)
    covered, _ = on_features("hypo", False, 0.0)
    assert "coverage" in fired and "coverage" not in held and "coverage" not in covered
    assert signs.gap(logged[-1]) > 10 > 1 > signs.gap(control[-1])


def test_leaving_what_the_data_cover_is_seen_at_evaluations_too() -> None:
    """Without fresh samples, by the KL on held-out prompts."""
    fired, _ = on_features("dpo", True)
    quiet, _ = on_features("dpo", False)
    assert fired["coverage"].step % 16 == 0 and "coverage" not in quiet


def test_few_pairs_teach_where_rejected_ones_are_unlikely() -> None:
    """The same row and chosen arm; the rejected arm has e^-7 of the reference, or a third."""
    logits = [0.0, 0.0, 0.0, -6.0]
    fired, slow = watched(row_of("dpo"), pairs_world(logits, (0, 3)), 16, 0.1)
    quiet, control = watched(row_of("dpo"), pairs_world(logits, (0, 1)), 16, 0.1)
    assert fired["slow"].step == WINDOW and "slow" not in quiet
    assert slow[0]["unlikely_pairs"] == 1 and control[0]["unlikely_pairs"] == 0
    assert slow[7]["log_ratio_chosen"] < 0.8 * control[7]["log_ratio_chosen"]


def test_few_pairs_teach_where_margins_are_large() -> None:
    def run(rate: float) -> tuple[dict, list]:
        world = pairs_world([0.0, 0.0, 0.0, 0.0], (0, 1))
        return watched(row_of("dpo", beta=2.0), world, 16, rate)

    fired, logged = run(0.5)
    quiet, control = run(0.02)
    assert "slow" in fired and "slow" not in quiet
    assert logged[7]["settled_pairs"] == 1 and logged[7]["unlikely_pairs"] == 0
    assert control[-1]["informative_pairs"] == 1


def test_a_reward_that_errs_where_the_policy_goes() -> None:
    def run(gold: Callable[[Samples], Tensor]) -> tuple[dict, list]:
        world = judged_world(by_arm)
        how = {"eval_every": 4, "evaluate": evaluator(world, {"reward": by_arm, "gold": gold})}
        return watched(row_of("rloo"), world, 40, 0.2, **how)

    fired, logged = run(spoilt)
    quiet, control = run(noisy)
    assert {"agreement", "gold"} <= fired.keys()
    assert not {"agreement", "gold"} & quiet.keys()
    assert logged[-1]["eval_agreement_far:gold"] < 0.4 < control[-1]["eval_agreement_far:gold"]
    golds = [m["eval_reward:gold"] for m in logged if "eval_reward:gold" in m]
    assert golds[-1] < max(golds) - 4 and logged[-1]["eval_reward"] > 13
    # without a gold reward nothing is said, whatever happens
    world = judged_world(by_arm)
    how = {"eval_every": 16, "evaluate": evaluator(world, {"reward": by_arm})}
    silent, _ = watched(row_of("rloo"), world, 40, 0.2, **how)
    assert not {"agreement", "gold"} & silent.keys()


def folder_of(path: Path, seed: int, centres: tuple[int, ...], steps: int, rate: float) -> Path:
    """A run on these peaks as a run folder."""
    world = judged_world(leaning.peaks(*centres), states=48, slope=0.0, seed=seed)
    watched(row_of("on_policy_best_of_n"), world, steps, rate, log_every=steps)
    drawn = answer(world.policy, world.reference, world.prompts, {}, samples_per_prompt=1, seed=0)
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"method": "x", "seed": seed}))
    (path / "evaluation.json").write_text(json.dumps(figures(drawn)))
    rows = [
        {"step": steps, "set": "eval", "prompt": f"state {n}", "response": f"arm {int(arm)}"}
        for n, arm in enumerate(drawn.samples.tokens.flatten())
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("centres", "steps", "rate", "by_chance"),
    [((3, 10, 17), 40, 0.4, True), ((10,), 72, 0.1, False)],
)
def test_modes_kept_across_seeds(
    centres: tuple[int, ...], steps: int, rate: float, by_chance: bool, tmp_path: Path
) -> None:
    """Of three arms that are equally good seeds keep different ones; a best arm all keep."""
    runs = [folder_of(tmp_path / f"seed{n}", n, centres, steps, rate) for n in range(2)]
    (found,) = of_seeds(read_runs(runs))
    assert (found.prompts, found.comparisons) == (48, 48) and found.least is not None
    assert found.by_chance == by_chance
    if by_chance:
        assert found.share < 0.4 and found.least > 0.7
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert ("which answers are left is chance" in page) == by_chance
    assert "differ in their seed alone" in page


def test_runs_that_differ_in_more_than_their_seed_are_not_compared(tmp_path: Path) -> None:
    def folder(name: str, answers: list[str], **settings: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"method": "x"} | settings))
        rows = [{"step": 1, "prompt": str(n), "response": a} for n, a in enumerate(answers)]
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path / name

    a, b = folder("a", ["x", "y"], seed=0, threads=1), folder("b", ["x", "z"], seed=1, threads=2)
    c, d = folder("c", ["x", "y"], seed=0, beta=1.0), folder("d", ["x", "y"], seed=0, threads=1)
    (found,) = of_seeds(read_runs([a, b, c]))
    assert (found.comparisons, found.share, found.least, found.by_chance) == (2, 0.5, None, False)
    assert of_seeds(read_runs([a, c])) == [] == of_seeds(read_runs([a, d]))


def test_the_most_frequent_answers_are_compared() -> None:
    mine = {"p": ["a", "b", "b"], "q": ["a"], "only mine": ["a"]}
    other = {"p": ["b"], "q": ["b", "b", "a"]}
    assert agreement([mine, other]) == (2, 2, 0.5)
    assert agreement([mine, other, {"q": ["a"]}]) == (2, 4, 0.5)


def test_seeds_disagree_where_that_cannot_be_noise() -> None:
    """exp(-0.2) is 0.82, and its standard error on 24 prompts 0.08."""
    found = Agreement(labels=("a", "b"), prompts=24, comparisons=24, share=0.58, entropy=0.2)
    assert found.by_chance and not replace(found, share=0.59).by_chance
    assert not replace(found, prompts=12, share=0.5).by_chance
    assert not replace(found, entropy=3.0, share=0.0).by_chance, "it could not be told"
    assert not replace(found, prompts=10**6, share=0.66).by_chance, "so little is no matter"


# The conditions at their edges.


def one(name: str, reads: str = "") -> signs.Alarm:
    return next(a for a in ALARMS if a.name == name and (not reads or reads in a.reads))


DOWN = {"log_ratio_chosen": -5.0, "margin": 2.0}
WAS = {"log_ratio_chosen": -4.9, "margin": 1.9}
GONE = {"kl": 8.0, "log_ratio_chosen": -2.0, "log_ratio_rejected": -4.0, "accuracy": 0.72}
NEAR = {"kl": 6.0, "log_ratio_chosen": -1.0, "log_ratio_rejected": -3.0, "accuracy": 0.7}
THREE = {"settled_pairs": 0.5, "unlikely_pairs": 0.3, "alike_pairs": 0.0}
JUDGED = {"agreement": 0.7, "agreement_far": 0.6, "agreement_far_high": 0.79}
SPOILT = {"gold": 0.0, "gold_low": -1.0, "gold_high": 0.9, "reward": 1.1}
TOP = {"gold": 2.0, "gold_low": 1.0, "gold_high": 3.0, "reward": 1.0}


@pytest.mark.parametrize(
    ("alarm", "view", "quiet"),
    [
        (one("ties"), {"now": {"loss": None}}, [{"now": {"loss": 0.0}}, {"now": {"loss": [0.1]}}]),
        (one("kl"), {"now": {"kl": 50.1}}, [{"now": {"kl": 50.0}}, {"now": {"kl": [99.0]}}]),
        (one("entropy"), {"now": {"entropy": 0.19}, "first": {"entropy": 2.0}},
         [{"now": {"entropy": 0.2}}, {"first": {}}]),
        (one("modes"), {"now": {"distinct_samples": 0.19}, "first": {"distinct_samples": 0.8}},
         [{"now": {"distinct_samples": 0.2}}, {"first": {"distinct_samples": 0.7}}]),
        (one("displacement"), {"now": DOWN, "before": WAS},
         [{"now": DOWN | {"log_ratio_chosen": -4.95}}, {"before": WAS | {"margin": 2.0}},
          {"before": WAS | {"log_ratio_chosen": -5.0}}, {"before": {}}]),
        (one("displacement", "logp_chosen"),
         {"now": {"logp_chosen": -3.0, "margin": 2.0},
          "first": {"logp_chosen": -2.0, "margin": 1.0}},
         [{"now": {"logp_chosen": -2.9, "margin": 2.0}},
          {"now": {"logp_chosen": -3.0, "margin": 1.0}}]),
        (one("coverage"), {"now": GONE, "before": NEAR},
         [{"now": GONE | {"accuracy": 0.73}}, {"now": GONE | {"kl": 6.0}},
          {"now": GONE | {"log_ratio_chosen": -1.0}}, {"now": GONE | {"kl": 6.9}},
          {"before": NEAR | {"log_ratio_rejected": -5.0}}, {"before": {}}]),
        (one("slow"), {"now": THREE | {"informative_pairs": 0.19}},
         [{"now": THREE | {"informative_pairs": 0.2}}, {"now": {"informative_pairs": 0.0}}]),
        (one("value"), {"now": {"value_offset": 2.1}, "before": {"value_offset": 2.2}},
         [{"now": {"value_offset": 2.0}}, {"before": {"value_offset": 2.0}}, {"before": {}}]),
        (one("agreement"), {"now": JUDGED, "first": {**JUDGED, "agreement": 0.8}},
         [{"now": JUDGED | {"agreement_far": 0.61}}, {"now": JUDGED | {"agreement_far_high": 0.8}},
          {"first": {}}]),
        (one("gold"), {"now": SPOILT, "best": TOP},
         [{"now": SPOILT | {"gold_high": 1.0}}, {"now": SPOILT | {"reward": 1.0}}, {"best": {}},
          {"now": {"gold": 0.0, "reward": 1.1}}]),
    ],
)  # fmt: skip
def test_a_condition_at_its_edges(
    alarm: signs.Alarm, view: dict[str, Any], quiet: list[dict[str, Any]]
) -> None:
    loud = View(**view)
    assert alarm.says(loud)
    for change in quiet:
        assert alarm.says(replace(loud, **change)) is None


def test_every_alarm_has_a_page_entry_and_documented_figures() -> None:
    from preftune.measures import DOCUMENTED

    page = (Path(__file__).parent.parent / "docs" / "alarms.md").read_text()
    assert all(f"`{alarm.name}`" in page for alarm in ALARMS)
    assert {n for n in alarms._OF_UPDATES} <= set(DOCUMENTED)


def said(watch: Watch, updates: list[dict[str, Any]]) -> tuple[Watch, list[alarms.Fired]]:
    fired: list[alarms.Fired] = []
    for step, metrics in enumerate(updates, 1):
        watch, new = alarms.after_update(watch, step, {"loss": 0.1, **metrics})
        fired += new
    return watch, fired


def test_a_sign_is_told_from_windows_and_said_once() -> None:
    """One update of no entropy is noise; a window of it is none."""
    high, low = {"entropy": 2.0}, {"entropy": 0.1}
    watch, fired = said(Watch(), [high] * WINDOW + [{"entropy": 0.0}] + [high] * (WINDOW - 1))
    assert not fired and watch.windows.last == {"entropy": 1.75}
    watch, fired = said(watch, [low] * 3 * WINDOW)
    assert [(f.step, f.alarm) for f in fired] == [(WINDOW, "entropy")]
    assert fired[0].message.startswith("step 8: samples have lost nine tenths of their entropy: ")
    assert "0.100 nats a token, 2.000 at first" in fired[0].message


def test_a_figure_that_an_update_lacks_counts_once_less() -> None:
    watch, _ = said(Watch(), [{"kl": 1.0, "margin": 2.0}] + [{"margin": 4.0}] * (WINDOW - 1))
    assert watch.windows.last == {"kl": 1.0, "margin": 3.75}
    watch, _ = said(watch, [{}, {"loss": None}, {"kl": [1.0]}, {"kl": float("nan")}])
    assert watch.updates == 0, "nothing was measured"


def test_a_trend_is_told_over_half_of_the_run() -> None:
    series = Series()
    found = []
    for n in range(1, 17):
        series = series.then({"x": float(n)})
        found.append(series.before.get("x"))
    assert found == [None, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, 8]
    assert series.first == {"x": 1} and series.last == {"x": 16}
    assert series.then({"y": 1.0}).first == {"x": 1, "y": 1}


def test_figures_of_a_study_are_left_alone() -> None:
    lists = {"loss": [0.1], "kl": [99.0], "entropy": [0.0], "informative_pairs": [0.0]}
    assert said(Watch(), [lists] * 2 * WINDOW) == (Watch(), [])


def test_a_watch_comes_back_from_json() -> None:
    watch, _ = said(Watch(), [{"kl": 60.0, "margin": 0.25}] * (WINDOW + 3))
    point = {"eval_kl": 0.3, "eval_reward": 1.0, "eval_reward:g": 2.0, "eval_reward:g_low": 1.0}
    watch, _ = alarms.after_evaluation(watch, 3, point)
    assert watch.best == {"kl": 0.3, "reward": 1.0, "gold": 2.0, "gold_low": 1.0, "margin": 0.25}
    assert Watch.of(json.loads(json.dumps(asdict(watch)))) == watch and watch.said == ("kl",)


# A run's folder.


def stop_at(*steps: int) -> Callable[[Event], None]:
    def callback(event: Event) -> None:
        if event.kind == "step" and event.step in steps:
            raise RuntimeError("stopped")

    return callback


def test_alarms_stand_in_the_folder_and_survive_a_resume(
    tiny_model: str, pairs_file: str, tmp_path: Path
) -> None:
    """A random model gives every rejected response less than 1 % a token: said at step 8, by a
    window that two stops fall into, and once more where step 8 itself is done again."""
    values = {
        "model": tiny_model, "data": pairs_file, "method": "dpo", "batch_size": 4, "max_steps": 10,
        "threads": 1, "save_every": 3, "eval_fraction": 0.25, "max_new_tokens": 4,
    }  # fmt: skip
    notes: list[str] = []
    callbacks = [lambda event: notes.append(event.message) if event.kind == "note" else None]
    train({**values, "output": str(tmp_path / "a")}, callbacks=callbacks)
    broken = {**values, "output": str(tmp_path / "b")}
    for step in (2, 5, 8):
        with pytest.raises(RuntimeError, match="stopped"):
            train(resumed({**broken, "resume": True}), callbacks=[stop_at(step)])
    assert (tmp_path / "b" / "alarms.jsonl").exists()
    train(resumed({**broken, "resume": True}))
    a, b = ((tmp_path / n / "alarms.jsonl").read_text() for n in "ab")
    (row,) = map(json.loads, a.splitlines())
    assert a == b and (row["step"], row["alarm"]) == (8, "slow")
    assert any(row["measured"] in note and row["cure"] in note for note in notes)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "few pairs still teach" in page and 'id="alarms"' in page


def test_the_report_shows_alarms_as_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: dpo\n")
    row = {"step": 8, "alarm": "x", "title": "<b>t", "measured": "<script>1", "cure": '"&'}
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert 'id="alarms"' not in page
    (tmp_path / "alarms.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"step": "?"}) + "\n"
    )
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "&lt;b&gt;t" in page and "&lt;script&gt;1" in page and "<script>1" not in page
