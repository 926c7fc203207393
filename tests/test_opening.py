"""The quickstart's opening: one pass of the reference, on a tiny model and a few pairs."""

import json
from pathlib import Path

import pytest

from preftune import cli, quickstart
from preftune.config import load
from preftune.diagnosis import opening
from preftune.diagnosis.job import Diagnosis
from preftune.policies.transformer import Transformer
from preftune.preparing import prepare

pytestmark = pytest.mark.long


@pytest.fixture
def few(here: Path) -> Path:
    """A folder of 24 pairs, two a prompt, and four held-out prompts, of which one is among them."""
    folder = here / "few"
    folder.mkdir()
    pairs = [
        {"prompt": f"Say {n // 2}.", "chosen": f"{n}", "rejected": f"no {n} no {n % 5}"}
        for n in range(24)
    ]
    held = [{"prompt": f"Say {n}."} for n in (11, 12, 13, 14)]
    for name, rows in (("pairs", pairs), ("heldout", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def opened(model: str, few: Path, **more: int) -> Diagnosis:
    files = {"data": str(few / "pairs.jsonl"), "eval_data": str(few / "heldout.jsonl")}
    parts = prepare(load({"method": "pref_ft", "model": model, "max_new_tokens": 4, **files}))
    assert parts.data is not None and parts.renderer is not None
    return opening.opening(
        parts.policy, parts.data, parts.renderer, name=model, held_out=parts.held_out, **more
    )


def test_one_pass_over_few_prompts_and_no_sampling(tiny_model, few, monkeypatch) -> None:
    monkeypatch.setattr(Transformer, "sample", lambda *a, **k: pytest.fail("nothing is drawn"))
    asked = []
    survey = Transformer.survey
    monkeypatch.setattr(
        Transformer, "survey", lambda self, s: asked.extend(s.row.tolist()) or survey(self, s)
    )
    found = opened(tiny_model, few, most=5)
    assert len(asked) == 5 == found.facts["rows"] and found.health.rows == 24
    assert len({row // 2 for row in asked}) == 5, "each prompt once"
    assert {"surprisal_chosen", "surprisal_rejected", "reference_accuracy", "ln_ches_0.5"} <= set(
        found.figures
    )
    assert found.measured.drawn is None
    assert len(opened(tiny_model, few).measured.data.row) == 12, "all prompts, once"


def test_what_it_says(tiny_model, few) -> None:
    found = opened(tiny_model, few)
    said = opening.lines(found)
    assert said[0].startswith("to the reference, by one pass over 12 of 12 prompts' pairs")
    assert [line.split()[0] for line in said[1:5]] == ["surprise", "surprise", "%", "ln-CHES,"]
    x = found.figures["surprisal_chosen"]
    assert f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]" in said[1]
    assert f"{100 * found.figures['reference_accuracy'].value:.0f} [" in said[3]
    assert any(line.startswith("data: overlap: 2 of 24") for line in said), "a held-out prompt"
    again = opening.lines(opened(tiny_model, few, most=6))
    assert "cannot tell with 6 pairs" in again[4]


def test_quickstart_opens_with_it(tiny_model, few, monkeypatch, capsys) -> None:
    make = quickstart._prepare
    monkeypatch.setattr(quickstart, "_prepare", lambda name, out, data: make(name, out, few))
    for name, value in {"model": tiny_model, "max_steps": 2, "max_new_tokens": 4}.items():
        monkeypatch.setitem(quickstart.SETTINGS, name, value)
    assert cli.run(["quickstart", "--output", "q", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [r["method"] for r in rows] == ["reference", *quickstart.METHODS]
    kept = json.loads(Path("q/diagnosis.json").read_text())
    assert rows[0]["diagnosis"] == kept and kept["figures"]["surprisal_chosen"]["trusted"]
    assert kept["data"]["rows"] == 24
    assert "by one pass over 12 of 12" in err and "data: overlap" in err
    assert 'href="diagnosis.html"' in Path("q/report.html").read_text()
    page = Path("q/diagnosis.html").read_text()
    assert "<h1>Before training</h1>" in page and 'id="chart-surprisal"' in page
    assert "rules of thumb" not in page, "no method is advised"
    monkeypatch.setattr(quickstart, "run", lambda output, console: rows)
    assert cli.run(["quickstart", "--output", "q"]) == 0
    assert "before training: q/diagnosis.html" in capsys.readouterr().out
