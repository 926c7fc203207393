"""Claims as they were fixed, verdicts, and the command from end to end on small studies."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from preftune import cli
from preftune.errors import UserError
from preftune.problems import tokens, words
from preftune.reproduce import claims as claims_module
from preftune.reproduce import page, runner
from preftune.reproduce.claims import (
    EXPERIMENTS,
    Claim,
    Measured,
    Part,
    choose,
    judge,
    load,
    verdicts,
)
from preftune.runs import LOCK

pytestmark = pytest.mark.long

IDS = """e1-bofn-r1 e1-bofn-r2 e1-ppo e1-rwr e2-t2 e2-large-t e2-ppo-tolerates e3-r1 e3-r2 e3-speed
e4-few e4-many e4-margin e7-complement m2-isolated m2-displaced-mass m3-cases m3-bimodal
m3-reuse-limit first-1 first-2 first-3 open-2 check-3 c1-prop41 c2-kl-bound c3-global-suffices
c4-global-needed c5-local-suffices-online c6-hypo-local c8-hypo-kl c10-fig2 c11-fig3
c12-diversity-gap d1-replay d2-isomorphic d4-label-source d5-misspecified control-null-dpo
control-reversed-e3""".split()


LANGUAGE = """e5-similarity e5-capacity e6-min e6-skew e6-mode e8-learned-rm fail-1 fail-2 fail-3
open-1 open-3 check-1 check-2 c7-hypo-reward c8-hypo-kl c9-hypo-cost d3-simplemix""".split()
GROUPS = ("bandits", "language", "larger", "model")


def test_the_ids_are_frozen() -> None:
    assert [k for k, c in load().items() if c.group == "bandits"] == IDS
    assert set(LANGUAGE) <= {c.id for c in load().values() if c.group == "language"}
    assert {c.group for c in load().values()} <= set(GROUPS)


def test_every_claim_can_be_measured() -> None:
    runner._experiments()
    named = {c.by or c.key for c in load().values()}
    assert named <= set(EXPERIMENTS) <= {*IDS, *named}


@pytest.mark.parametrize("name", list(load()))
def test_a_claim_says_what_it_needs(name: str) -> None:
    """One sentence, a source, a statistic, a margin, enough seeds."""
    claim = load()[name]
    assert claim.claim.endswith(".") and claim.source and claim.label_source
    for part in claim.parts:
        assert part.statistic and part.direction in ("greater", "less", "within")
        assert part.margin > 0 or part.direction != "within"
    least = {"language": 5, "larger": 5, "model": 3, "bandits": 32}[claim.group]
    assert claim.seeds == 1 or claim.seeds >= (
        5 if claim.settings.get("problem") == "tokens" else least
    )


@pytest.mark.parametrize(
    ("direction", "low", "high", "verdict"),
    [
        ("greater", 0.2, 0.3, "holds"), ("greater", 0.05, 0.3, "not_seen"),
        ("greater", -0.3, 0.05, "does_not_hold"), ("greater", 0.1, 0.3, "not_seen"),
        ("less", -0.3, 0.05, "holds"), ("less", 0.05, 0.3, "not_seen"),
        ("less", 0.2, 0.3, "does_not_hold"), ("within", -0.05, 0.05, "holds"),
        ("within", -0.2, 0.05, "not_seen"), ("within", 0.2, 0.3, "does_not_hold"),
        ("within", -0.3, -0.2, "does_not_hold"), ("within", -0.3, 0.3, "not_seen"),
    ],
)  # fmt: skip
def test_verdicts(direction: Any, low: float, high: float, verdict: str) -> None:
    part = Part(name="", claim="x", statistic="y", direction=direction, margin=0.1)
    assert judge(part, low, high) == verdict


def test_an_interval_is_over_seeds_and_one_number_is_exact() -> None:
    part = Part(name="", claim="x", statistic="y", direction="greater", margin=0.0)
    claim = Claim(id="x", source="s", settings={}, parts=(part,), claim="x")
    (row,) = verdicts(claim, Measured(values={"": torch.arange(32.0)}))
    assert row["measured"] == 15.5 and 12 < row["interval"][0] < 15.5 < row["interval"][1] < 19
    assert (row["seeds"], row["verdict"]) == (32, "holds")
    (row,) = verdicts(claim, Measured(values={"": torch.tensor([-1.0])}))
    assert (row["interval"], row["seeds"], row["verdict"]) == ([-1.0, -1.0], 0, "does_not_hold")
    with pytest.raises(AssertionError, match="not finite"):
        verdicts(claim, Measured(values={"": torch.tensor([1.0, torch.nan])}))


def test_groups_and_names() -> None:
    assert [c.id for c in choose(["bandits"])] == IDS
    assert {c.group for c in choose([])} == {"bandits", "language"}, "no hours unasked for"
    assert [c.id for c in choose(["first-2", "e3-r1"])] == ["e3-r1", "first-2"], "the file's order"
    assert [c.key for c in choose(["first-1"])] == ["first-1", "first-1-synthetic"], "every scale"
    assert [c.key for c in choose(["first-1-synthetic"])] == ["first-1-synthetic"]
    with pytest.raises(UserError, match="e3-r1"):
        choose(["e3-r"])


SMALL = {
    "first-3": {"samples": 200, "round": 50, "passes": [1, 2, 10]},
    "first-1": {"updates": 12, "prompts_per_update": 2},
    "control-null-dpo": {"updates": 12, "prompts_per_update": 2},
    "check-3": {"updates": 12, "prompts_per_update": 2},
    "e4-margin": {"states": [3, 6], "updates": 10},
    "e3-speed": {"states": 4, "updates": 20},
    "m2-displaced-mass": {"states": 4, "updates": 10},
    "e1-ppo": {"samples": 400, "fresh": 100, "stale": 400, "passes": 2},
    "open-2": {"samples": 200, "rounds": [50, 200], "passes": [1, 2]},
    "c8-hypo-kl": {"updates": 10, "pairs": 40},
    "d1-replay": {"updates": 10},
    "d4-label-source": {"updates": 10, "pairs": 64},
    "c5-local-suffices-online": {"sizes": [100, 300]},
    "c11-fig3": {"updates": 25, "pairs": 200, "arms": 20, "seen": 10},
    "e2-t2": {"samples": 40, "round": 20, "samples_per_prompt": 4, "more": 10, "fewer": 5},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims with few seeds and small settings, under their own names."""
    found = {
        name: replace(
            claim,
            seeds=3,
            settings={**claim.settings, **SMALL.get(name, {})},
            parts=tuple(replace(p, seeds=p.seeds and 4) for p in claim.parts),
        )
        for name, claim in load().items()
        if claim.group == "bandits"
    }
    monkeypatch.setattr(claims_module, "load", lambda: dict(found))

    def as_it_starts(network: Callable[[tuple[int, ...]], Any]) -> Callable[..., Any]:
        return lambda seeds: tuple(t.detach() for _, t in network(seeds).tensors())

    # references: training one takes seconds a seed, and test_laboratory.py does it
    monkeypatch.setattr(tokens, "_pretrained", as_it_starts(tokens._network))
    monkeypatch.setattr(words, "_weights", as_it_starts(words._untrained))


def _command(*args: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert cli.run(["reproduce", *args, "--json", "--workers", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_runs_claims(tmp_path: Path, small: None, capsys) -> None:
    """Every kind of cell once; rows, data and page."""
    out = tmp_path / "out"
    rows = _command(*SMALL, "m3-cases", "--output", str(out), capsys=capsys)
    assert {r["id"] for r in rows} == {*SMALL, "m3-cases"}
    keys = {"id", "claim", "source", "scale", "label_source", "measured", "interval", "margin",
            "verdict"}  # fmt: skip
    for row in rows:
        assert keys <= row.keys()
        low, high = row["interval"]
        assert low <= row["measured"] <= high
        assert row["verdict"] in ("holds", "does_not_hold", "not_seen")
    assert [r["part"] for r in rows if r["id"] == "c8-hypo-kl"] == [
        "end", "frontier", "best-minus-last"
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    for name in SMALL:
        data = [
            json.loads(x)
            for x in (out / "claims" / name / "data.jsonl").read_text().split("\n")
            if x
        ]
        result = json.loads((out / "claims" / name / "result.json").read_text())
        assert data and len(next(iter(result["statistic_by_seed"].values()))) == 3
        if name == "c8-hypo-kl":
            assert len(result["statistic_by_seed"]["best-minus-last"]) == 4
        assert f'<section id="{name}">' in page and f'id="chart-{name}"' in page
    metrics = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"cell", "seed", "step"} <= metrics[0].keys()

    # what the folder holds is not run again, and gives the same
    before = (out / "metrics.jsonl").stat().st_size
    again = _command("first-3", "c11-fig3", "--output", str(out), "--resume", capsys=capsys)
    assert (out / "metrics.jsonl").stat().st_size == before
    assert again == [r for r in rows if r["id"] in ("first-3", "c11-fig3")]


def test_seeds_move_together(tmp_path: Path, small: None, capsys) -> None:
    one = _command("first-3", "--output", str(tmp_path / "a"), capsys=capsys)
    same = _command("first-3", "--output", str(tmp_path / "b"), capsys=capsys)
    other = _command("first-3", "--output", str(tmp_path / "c"), "--seed-base", "7", capsys=capsys)
    full = _command("first-3", "--output", str(tmp_path / "d"), "--full", capsys=capsys)
    assert one == same != other
    assert full == one, "the rest of the grid does not change the verdict"
    seeds = {json.loads(x)["seed"] for x in (tmp_path / "c/metrics.jsonl").read_text().splitlines()}
    assert seeds == {7, 8, 9}


def test_listing_runs_nothing(capsys) -> None:
    assert cli.run(["reproduce", "--list", "--json", "c8-hypo-kl", "e3-r1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["id"], r["scale"]) for r in rows] == [
        ("e3-r1", "bandit"), *[("c8-hypo-kl", "bandit")] * 3, *[("c8-hypo-kl", "synthetic")] * 2
    ]  # fmt: skip
    assert all(r["verdict"] is None and r["measured"] is None for r in rows)
    assert cli.run(["reproduce", "--list"]) == 0
    assert "control-null-dpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["e3-r"], "e3-r1"), (["--resume"], "--output"), (["--workers", "-1"], "--workers"),
        (["--seed-base", "-5"], "--seed-base"), (["--sedbase", "1"], "seed"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_message(args: list[str], says: str, capsys) -> None:
    assert cli.run(["reproduce", *args]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_other_code_is_not_mixed_in(tmp_path: Path, small: None, capsys, monkeypatch) -> None:
    """Other source judges finished runs, and says so, but adds none."""
    out = tmp_path / "out"
    rows = _command("first-3", "--output", str(out), capsys=capsys)
    began = runner.source_digest()
    assert cli.run(["reproduce", "first-3", "--output", str(out)]) == 2, "not empty"
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(runner, "source_digest", lambda: "other")
    assert _command("first-3", "--output", str(out), "--resume", capsys=capsys) == rows
    assert f"runs {began}, verdicts other" in (out / "report.html").read_text()
    more = ["reproduce", "first-3", "e3-r1", "--output", str(out), "--resume"]
    assert cli.run(more) == 2
    assert "other source code" in capsys.readouterr().err
    assert f"source: {began}" in (out / "config.yaml").read_text(), "as it was"


def test_a_folder_at_work_is_left_as_it_is(tmp_path: Path, small: None, capsys) -> None:
    out = tmp_path / "out"
    _command("first-3", "--output", str(out), capsys=capsys)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with FileLock(out / LOCK):  # as another process has it
        more = ["reproduce", "first-3", "e3-r1", "--output", str(out), "--resume"]
        assert cli.run(more) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def _broken(*_: Any) -> Measured:
    raise AssertionError("no place on the curve")


@pytest.mark.parametrize("of", ["conclusion", "run"])
def test_a_claim_that_fails_loses_no_other(
    of: str, tmp_path: Path, small: None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = _command("first-3", "m3-cases", "--output", str(tmp_path / "whole"), capsys=capsys)
    if of == "conclusion":
        monkeypatch.setitem(
            EXPERIMENTS, "first-3", replace(EXPERIMENTS["first-3"], conclude=_broken)
        )
    else:
        monkeypatch.setattr("preftune.cells.advance", _broken)
    args = ["reproduce", "first-3", "m3-cases", "--output", str(out), "--workers", "0"]
    assert cli.run([*args, "--json"]) == 1
    said = capsys.readouterr()
    assert "failed: first-3: AssertionError: no place on the curve" in said.err
    rows = json.loads(said.out)
    failed = [r for r in rows if r["id"] == "first-3"]
    assert all(r["verdict"] is None and "no place" in r["error"] for r in failed) and failed
    assert [r for r in rows if r["id"] == "m3-cases"] == [r for r in whole if r["id"] == "m3-cases"]
    assert "no place" in (out / "claims/first-3/traceback.txt").read_text()
    text = (out / "report.html").read_text()
    assert "<b>failed</b>" in text and "Failed: AssertionError: no place on the curve" in text


def test_a_wide_interval_is_said() -> None:
    row = {"measured": 0.3, "interval": [0.1, 0.5], "margin": 0.1}
    assert page.shown(row).endswith("wide")
    assert not page.shown({**row, "margin": 0.25}).endswith("wide")
    assert not page.shown({**row, "margin": 0}).endswith("wide"), "a sign has no width"
