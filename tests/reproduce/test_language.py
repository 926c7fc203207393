"""Claims about language models: what they say adds up, and their runs are what they say."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune import building, cli, config, study
from preftune.errors import UserError
from preftune.problems import arithmetic, length, story
from preftune.reproduce import claims as claims_module
from preftune.reproduce import frontiers, language, places, runner, transfer
from preftune.reproduce.claims import EXPERIMENTS, Claim, load
from preftune.reproduce.places import Judge, Place
from preftune.reproduce.text_cell import TextCell
from preftune.study import Curves, Runnable

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import claims_table  # noqa: E402
import language_rates  # noqa: E402

pytestmark = pytest.mark.long

CLAIMS = {k: c for k, c in load().items() if c.group != "bandits"}
SEEDS = (0, 1)


def f64(*x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def curves(**figures: Any) -> Curves:
    """Of two seeds, at updates 0, 5 and 10."""
    return Curves((0, 5, 10), {name: f64(*rows) for name, rows in figures.items()})


RUNS = {
    "a": curves(gold=[[0, 1, 2], [0, 3, 6]]), "b": curves(gold=[[0, 4, 1], [0, 0, 1]]),
    "c, too": curves(gold=[[0, 0, 5], [0, 0, 0]]),
}  # fmt: skip


def test_sums_of_figures() -> None:
    assert language.value({"a.gold": 1, "b.gold": -1}, RUNS).tolist() == [1, 5]
    assert language.value({"a.gold@0.5": 1, "c, too.gold": -2}, RUNS).tolist() == [-9, 3]
    least = [{"a.gold": 1, "b.gold": -1}, {"a.gold": 1, "c, too.gold": -1}]
    assert language.value(least, RUNS).tolist() == [-3, 5], "less the best of the others"


def test_rank_correlation_by_hand() -> None:
    a = f64([1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3], [0, 0, 0, 0])
    b = f64([10, 20, 30, 40], [4, 3, 2, 1], [1, 2, 3, 3], [1, 2, 3, 4])
    # of the third: ranks .5 .5 2 3 and 0 1 2.5 2.5, so 4 / sqrt(4.5 x 4.5)
    assert transfer.spearman(a, b).tolist() == pytest.approx([1, -1, 4 / 4.5, 0])


def cells_of(claim: Claim) -> dict[str, Runnable]:
    runner._experiments()
    plan = EXPERIMENTS[claim.by].plan
    assert plan is not None
    return {name: found for name, (found, _) in plan(claim, SEEDS, True).items()}


@pytest.mark.parametrize("name", CLAIMS)
def test_runs_have_settings_that_training_takes(name: str) -> None:
    for found in cells_of(CLAIMS[name]).values():
        assert isinstance(found, TextCell)
        terms = {k: v for k, v in found.settings if k.startswith("terms.")}
        plain = {k: v for k, v in found.settings if not k.startswith("terms.")}
        given = config.load({"method": found.method, "batch_size": found.batch_size, **plain})
        building.method_of(given, terms)


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_added_up_is_run(name: str) -> None:
    claim, s = CLAIMS[name], CLAIMS[name].settings
    if claim.by == "transfer":
        assert len(s["problems"]) >= 4 and len(s["runs"]) >= 8
        return
    if claim.by == "frontier":
        assert {*s["pair"], *sum(s["sides"].values(), [])} <= set(s["runs"])
        return
    of_parts = s["value"] if claim.parts[0].name else {"": s["value"]}
    assert set(of_parts) == {p.name for p in claim.parts}
    for sums in of_parts.values():
        for one in [sums] if isinstance(sums, dict) else sums:
            assert {k.partition("@")[0].rpartition(".")[0] for k in one} <= set(s["runs"])


def test_the_rest_of_a_grid_and_the_second_size() -> None:
    small, large = claims_module.choose(["e6-min"], full=True)
    assert (small.size, large.size, small.parts[0].margin) == (
        "",
        "width-128",
        large.parts[0].margin,
    )
    assert claims_module.choose(["e6-min"]) == [small]
    assert claims_module.choose([large.key]) == [large]
    own, every = (EXPERIMENTS["difference"].plan(small, SEEDS, full) for full in (False, True))  # type: ignore[misc]
    assert own.items() <= every.items() and len(every) == 4 * len(own)
    rates = sorted(c.learning_rate for n, (c, _) in every.items() if n.startswith("dpo, rate"))  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.001 / 3, 0.001, 0.003])
    (wide,) = {c.place.width for c in cells_of(large).values()}  # type: ignore[attr-defined]
    assert wide == 128


def test_the_grid_changes_no_verdict_and_is_told() -> None:
    claim = replace(CLAIMS["control-reversed-e3-synthetic"])
    ends = {"dpo": (1.0, 2.0, 5.0), "pref_ft": (3.0, 1.0, 2.0)}
    runs = {n: curves(gold=[[0, 0, own[1]]] * 2) for n, own in ends.items()}
    alone = language.difference(claim, SEEDS, runs)
    for name, own in ends.items():
        for times, end in zip(language.GRID, own, strict=True):
            runs[language.at(name, times)] = curves(gold=[[0, 0, end]] * 2)
    both = language.difference(claim, SEEDS, runs)
    assert torch.equal(alone.values[""], both.values[""]) and alone.values[""].tolist() == [-1, -1]
    assert both.notes == ["With each run at the best of 3 rates: -2.000."] and not alone.notes


def test_rates_are_chosen_for_runs_that_a_claim_makes() -> None:
    """But for the rate itself and how often they are judged."""

    def alike(cell: TextCell) -> TextCell:
        return replace(cell, evals=0, learning_rate=0.0)

    run = {alike(c).key for claim in CLAIMS.values() for c in cells_of(claim).values()}  # type: ignore[arg-type]
    wanted = language_rates.wanted()
    for rows in wanted.values():
        for grid in rows.values():
            assert {alike(c).key for c in grid.values()} <= run
            assert tuple(c.learning_rate for c in grid.values()) == language_rates.GRID
    settings = dict(wanted["min"]["ppo"][1e-3].settings)
    assert settings == {"passes": 2, "prompts_per_round": 16}


def test_a_rate_at_the_end_of_the_grid_is_told() -> None:
    inside, edge = ({1e-4: -2.0, 3e-4: -1.0, 1e-3: end} for end in (-1.5, 0.0))
    rewards = "0.0001 -2.00, 0.0003 -1.00, 0.001 -1.50"
    assert language_rates.line("dpo", inside) == f"    dpo: 0.0003  # {rewards}"
    assert language_rates.line("dpo", edge).endswith("0.001 0.00; edge")


def test_rates_of_other_code_are_not_taken(tmp_path: Path, monkeypatch, capsys) -> None:
    language_rates.begun(tmp_path, 0)
    language_rates.begun(tmp_path, 0)
    monkeypatch.setattr(language_rates, "source_digest", lambda: "later")
    monkeypatch.setattr(language_rates, "wanted", dict)
    with pytest.raises(SystemExit):
        language_rates.main([str(tmp_path)])
    assert "its runs are of other source code" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        language_rates.begun(tmp_path / "old", 0)


def test_a_table_of_claims_sets_equals_beside_each_other() -> None:
    """Sizes of one claim are two lines; a folder without one of them has an empty place there."""
    small, large = (CLAIMS[f"e6-min-synthetic{size}"] for size in ("", "-width-128"))
    numbers = {"measured": 3.0, "interval": [1.5, 4.5], "verdict": "holds", "seeds": 5}
    a, b = (claims_module.listed(c, c.parts[0]) | numbers for c in (small, large))
    failed = a | {"interval": None, "verdict": None, "error": "why"}
    _, _, first, second = claims_table.table([[a, b], [b | {"seeds": 4}], [failed]])
    said = "3 [1.5, 4.5] wide: holds"
    part, what = "dpo over pref_ft", a["statistic"]
    assert first == f"| `e6-min-synthetic: {part}` | {what} | > 1 | 5 | {said} |  | failed: why |"
    assert second.startswith(f"| `e6-min-synthetic-width-128: {part}` | {what}; width 128 | > 1 ")
    assert second.endswith(f"| 5, 4 | {said} | {said} |  |")


def test_one_cell_stands_in_many_claims() -> None:
    one, other = (cells_of(CLAIMS[f"{n}-synthetic"])["dpo"] for n in ("e6-min", "first-1"))
    assert one.key == other.key and one.key != cells_of(CLAIMS["e6-mode-synthetic"])["dpo"].key
    null = CLAIMS["control-null-dpo-synthetic"]
    plan = EXPERIMENTS[null.by].plan
    assert plan is not None
    (a, own), (b, others) = plan(null, SEEDS, False).values()
    assert a.key == b.key and not set(own) & set(others)
    assert a.key == a.placed(Path("elsewhere")).key, "where things stand is no part of a run"


@pytest.fixture(scope="module")
def little() -> Iterator[None]:
    """Small references and few answers."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (length, "UPDATES", 40), (length, "EARLY", 8), (length, "ASKED", 8),
            (length, "HELD_OUT", 8), (arithmetic, "TAUGHT", 60), (arithmetic, "UNSURE", 4),
            (story, "UPDATES", 20), (story, "EARLY", 4), (story, "MORE", 4),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        patch.setattr("preftune.reproduce.text_cell.ANSWERS", 32)
        patch.setattr("preftune.reproduce.text_cell.TRAINED_PAIRS", 8)
        places._problem.cache_clear()
        yield
        places._problem.cache_clear()


@pytest.fixture(scope="module")
def where(little: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def at(where: Path, problem: str = "min", count: int = 32, **more: Any) -> Place:
    pairs = replace(Place(problem=problem).pairs, count=count)
    return Place(problem=problem, width=16, pairs=pairs, folder=str(where), **more)


def a_cell(place: Place, method: str, **more: Any) -> TextCell:
    return TextCell(
        place=place, method=method, updates=4, batch_size=4, learning_rate=1e-3, evals=2, **more
    )


def test_a_run_is_what_its_seed_makes_it(where: Path) -> None:
    cell = a_cell(at(where), "dpo")
    rows, other = cell.run((3, 4)), cell.run((4,))
    assert [(r["seed"], r["step"]) for r in rows] == [(s, t) for s in (3, 4) for t in (0, 2, 4)]
    for mine, again in zip(rows[3:], other, strict=True):
        mine, again = ({k: v for k, v in r.items() if k != "seconds"} for r in (mine, again))
        assert mine == again
    start, _, end = rows[:3]
    assert start["kl"] == 0 and start["log_ratio_chosen"] == 0 and end["kl"] > 0
    assert end["gold"] == pytest.approx(-end["length"]), "min: the true reward is the length"
    assert end["proxy"] != end["gold"] and "agreement" in end


@pytest.mark.parametrize("of", ["reward", "kl"])
def test_a_run_that_diverges_stays_as_it_was_judged_last(where: Path, of: str) -> None:
    """One seed of two, after its start: at each later step, so that no statistic lacks it."""
    cell = a_cell(at(where, judge=Judge(source="true")), "dpo")
    rows = replace(cell, learning_rate=1e30).run((3,))
    assert [r["step"] for r in rows] == [0, 2, 4] and rows[-1]["stopped"] == 1
    found = study.curves(rows + cell.run((4,)), (3, 4))
    gold = found.figures["gold"]
    assert gold.isfinite().all() and gold[0].unique().numel() == 1
    assert language.value({"dpo.gold@0.5": 1, "dpo.gold": -1}, {"dpo": found})[0] == 0
    claim = CLAIMS[f"{'c7-hypo-reward' if of == 'reward' else 'c8-hypo-kl'}-synthetic"]
    assert claim.settings["of"] == of
    runs = {name: found for name in frontiers._plan(claim, (3, 4), False)}
    measured = frontiers.frontier(claim, (3, 4), runs)
    assert all(v.tolist() == [0, 0] for v in measured.values.values())
    first = next(iter(runs))
    assert measured.notes[0] == (
        f"{first}: 1 of the runs diverged and stay as they were judged last."
    )


def test_who_judges(where: Path) -> None:
    true, own, other, several = (
        at(where, judge=judge).made(5)
        for judge in (
            Judge(source="true"), Judge(epochs=1), Judge(source="rm_other", epochs=1),
            Judge(members=2, kappa=1.0, epochs=1, pairs=16),
        )
    )  # fmt: skip
    assert true.reward == "length:min" and "gold" not in true.settings()
    assert own.settings()["gold"] == "length:min" and own.pairs == other.pairs == true.pairs
    assert own.reward != other.reward
    assert several.reward.startswith("ensemble:") and several.reward.endswith(";kappa=1")
    seen = {p.name.partition("-")[0] for p in Path(where, "pairs").glob("*-5-other.jsonl")}
    assert seen, "other pairs were drawn"


def test_turned_pairs() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "rejected_finished": 0}
    (turned,) = places._turned([row], 1.0, 0)
    assert turned == {
        "prompt": "p", "rejected": "a", "chosen": "b", "score_rejected": 2, "chosen_finished": 0
    }  # fmt: skip
    assert places._turned([row], 0.0, 0) == [row]


@pytest.mark.parametrize("problem", ["mode", "skew", "arithmetic", "story", "two_modes"])
def test_every_problem_can_be_made(where: Path, problem: str) -> None:
    made = at(where, problem, count=8, judge=Judge(source="true")).made(0)
    rows = [json.loads(line) for line in made.pairs.read_text().splitlines()]
    assert 4 <= len(rows) <= 8 and all(r["score_chosen"] > r["score_rejected"] for r in rows)
    assert made.held_out.read_text().count("\n") == len(made.task.held_out)


@pytest.mark.long
@pytest.mark.slow
def test_the_command(where: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def little_claim(name: str) -> Claim:
        claim = CLAIMS[f"{name}-synthetic"]
        few = {"updates": 4, "batch_size": 4, "evals": 2, "width": 16, "pairs": {"count": 32}}
        few |= {"judge": {"source": "true"}}
        if name == "c8-hypo-kl":  # a run a side, at one rate
            mine, other = claim.settings["pair"]
            runs = {k: v for k, v in claim.settings["runs"].items() if k in (mine, other)}
            sides = {"hypo": [mine], "dpo": [other]}
            few |= {"runs": runs, "sides": sides, "rates": [0.001]}
        return replace(claim, seeds=2, settings={**claim.settings, **few})

    found = {c.key: c for c in map(little_claim, ("first-1", "c8-hypo-kl"))}
    monkeypatch.setattr(claims_module, "load", lambda: found)
    out = tmp_path / "out"
    args = ["reproduce", "language", "--json", "--workers", "0", "--output", str(out)]
    assert cli.run(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["id"], r["part"], r["label_source"]) for r in rows] == [
        ("first-1", "", "true"), ("c8-hypo-kl", "frontier", "rm_same"),
        ("c8-hypo-kl", "end", "rm_same"),
    ]  # fmt: skip
    assert all(r["scale"] == "synthetic" for r in rows)
    page = (out / "report.html").read_text()
    for key in found:
        assert f'<section id="{key}">' in page and f'id="chart-{key}"' in page
    size = (out / "metrics.jsonl").stat().st_size
    assert cli.run([*args, "--resume"]) == 0, "nothing is run again"
    assert json.loads(capsys.readouterr().out) == rows
    assert (out / "metrics.jsonl").stat().st_size == size
