"""The verdict that `diagnose` prints: whose it is, at what prices, and how sure."""

from dataclasses import replace
from typing import Any

import pytest

from preftune import methods
from preftune.advising import verdict
from preftune.advising.advise import shipped
from preftune.advising.verdict import NOBODY, SAME, Verdict
from preftune.data.findings import Health
from preftune.diagnosis.job import Diagnosis
from preftune.diagnosis.measure import Measured
from preftune.errors import UserError


def found(source: str | None, pairs: int = 800, kind: str = "pairs", **facts: Any) -> Diagnosis:
    return Diagnosis(
        measured=Measured(), figures={}, notes=[], health=Health(
            rows=pairs, distinct_rows=pairs, distinct_prompts=pairs, findings={}, rules={},
            held_out_seen=None,
        ),
        facts={"label_source": source, "pairs": pairs, "kind": kind, "sample_price": 1.0, **facts},
    )  # fmt: skip


def said(source: str | None, **given: Any) -> Verdict:
    settings = {"beta": None, "label_price": None, "spend": None} | given
    return verdict.advise(found(source), **settings)


def test_prices_that_are_not_given() -> None:
    assert said("human").given.label_price == 30.0
    assert said("rm_same").given.label_price == said("true").given.label_price == 0.3
    assert said("human", label_price=5.0).given.label_price == 5.0
    assert said("human").given.budget == 4800.0, "three epochs of both responses"
    assert said("human", spend=100.0, beta=0.4).given.beta == 0.4


@pytest.mark.parametrize("wrong", [
    {"label_price": -1.0}, {"label_price": float("nan")}, {"label_price": float("inf")},
    {"spend": 0.0}, {"spend": float("nan")}, {"spend": float("inf")},
])  # fmt: skip
def test_wrong_prices(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        said("human", **wrong)


@pytest.mark.parametrize("source", [None, "true", "rm_same", "rm_other", "judge", "human"])
def test_ten_lines_for_everybody(source: str | None) -> None:
    own = said(source)
    lines = [*verdict.lines(own), verdict.validated()]
    assert 6 <= len(lines) <= 10
    first = own.advised.ranked[0]
    assert first.method in lines[0]
    assert lines[0].startswith("advice: " if own.advised.sure else "cannot tell ")
    assert (f"  {SAME}" in lines) == (source == "rm_same")
    assert (f"  {NOBODY}" in lines) == (source is None)
    for entry in own.advised.ranked:
        assert set(entry.as_json()) == {"method", "settings", "reason", "cost", "would_change"}
        assert all(entry.as_json().values())
        methods.configure(methods.get(entry.method), {
            k: v for k, v in entry.settings.items()
            if k not in ("learning_rate", "on_policy_share")
        })  # fmt: skip


def test_nobody_judges() -> None:
    """Then nothing is said of labels, of who gives them, or of what they cost."""
    own = said(None)
    assert not any("reward" in methods.get(m).needs for m in own.advised.worth)
    plain = own.as_json()
    assert plain["circumstances"]["label_source"] is None
    assert plain["expected_regret"] == shipped().measured["mean_regret"]
    told = [x for a in own.advised.ranked for x in (a.reason, a.would_change)]
    assert not [x for x in told if "label" in x or "judge" in x], told
    assert any("label" in a.would_change for a in said("human").advised.ranked)
    few = verdict.advise(found(None, pairs=3), None, None, None)
    assert "log_pairs" in few.advised.strange and "log_fresh" not in few.advised.strange


@pytest.mark.parametrize("source", [None, "human"])
def test_completions_are_no_pairs(source: str | None) -> None:
    """Rows that need pairs are left out, a row has one response, and nobody speaks of pairs."""
    completions = verdict.advise(found(source, kind="completions"), None, None, None)
    assert completions.given.budget == 2400.0, "three epochs of one response each"
    assert completions.given.signs()["log_epochs"] == said(source).given.signs()["log_epochs"]
    worth = completions.advised.worth
    assert "pref_ft" in worth and not {"dpo", "ipo", "hypo", "half_and_half", "auto"} & set(worth)
    assert ("rloo" in worth) == (source is not None)
    lines = verdict.lines(completions)
    assert not any("pairs" in line for line in lines if NOBODY not in line), lines
    assert not any(line.strip() == "then" for line in lines)
    assert "dpo" in said(source).advised.worth


def test_dear_labels_speak_against_buying_many() -> None:
    """The cheaper a human's label, the better the rows that buy one for every sample."""

    def lead(price: float) -> float:
        worth = said("human", label_price=price, spend=4000.0).advised.worth
        buys = [w for m, w in worth.items() if methods.get(m).on_policy and "reward" in
                methods.get(m).needs]  # fmt: skip
        free = [w for m, w in worth.items() if "reward" not in methods.get(m).needs]
        return max(buys) - max(free)

    assert lead(1.0) > lead(30.0)


@pytest.mark.parametrize("source", ["true", "rm_same", None])
def test_why_it_cannot_tell_is_said(source: str | None) -> None:
    own = said(source)
    close = replace(own, advised=replace(own.advised, sure=False, strange=[], loss=0.284))
    whose = "advice for such labels" if source else "advice"
    reason = f"({whose} has missed 0.28 of what could be gained, where the goal is 0.10)"
    assert reason in verdict.lines(close)[0]
    far = replace(own, advised=replace(own.advised, sure=False, strange=["log_pairs"]))
    assert "beyond what was studied: pairs" in verdict.lines(far)[0]
