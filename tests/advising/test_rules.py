"""The rule: what a fit finds, and that its explanations are its own arithmetic."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from preftune import building, config, methods
from preftune.advising import advise as advising
from preftune.advising import rule
from preftune.advising.advise import advise, shipped
from preftune.advising.advise import settings_for as advised_settings
from preftune.advising.candidates import names, settings_of
from preftune.advising.signs import FIGURES, Circumstances, of_figures
from preftune.advising.wording import WORDS, plain_sign
from preftune.diagnosis.reading import DOCUMENTED
from preftune.estimators.estimate import Estimate, bound, cannot_tell

ROWS = ("a", "b", "c")


def problems(count: int) -> tuple[list[dict[str, float | None]], np.ndarray]:
    """Worth of a grows with x, that of b falls with it, c is middling; y is noise."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, count))
    worth = np.stack([0.5 + 0.3 * x, 0.5 - 0.3 * x, np.full(count, 0.4)], -1)
    return [{"x": float(a), "y": float(b)} for a, b in zip(x, y, strict=True)], worth


def test_a_linear_worth_is_found() -> None:
    signs, worth = problems(400)
    found = rule.fit(signs, worth, ROWS, 1e-6, tier=-1)
    assert list(found.worth({"x": 1.0, "y": 0.0})) == ["a", "c", "b"]
    assert found.worth({"x": 1.0, "y": 0.0})["a"] == pytest.approx(0.8, abs=0.01)
    assert found.worth({"x": -1.0, "y": 2.0})["b"] == pytest.approx(0.8, abs=0.01)
    assert found.worth({"x": None, "y": None})["c"] == pytest.approx(0.4, abs=0.01)
    again = rule.of_plain(json.loads(json.dumps(found.plain())))
    assert again == found


def test_a_strong_ridge_forgets_the_signs() -> None:
    signs, worth = problems(400)
    found = rule.fit(signs, worth, ROWS, 1e6, tier=-1)
    assert found.worth({"x": 2.0, "y": 0.0})["a"] == pytest.approx(worth[:, 0].mean(), abs=1e-3)


def test_what_speaks_for_a_row_adds_up_to_its_lead() -> None:
    signs, worth = problems(50)
    found = rule.fit(signs, worth, ROWS, 0.1, tier=-1)
    here = {"x": 0.7, "y": -0.4}
    values = found.worth(here)
    bias = found.bias[0] - found.bias[1]
    assert sum(found.between("a", "b", here).values()) + bias == pytest.approx(
        values["a"] - values["b"]
    )


def test_where_two_rows_draw_level() -> None:
    signs, worth = problems(200)
    found = rule.fit(signs, worth, ROWS, 0.01, tier=-1)
    here: dict[str, float | None] = {"x": 0.9, "y": 0.1}
    step = found.turning("a", "b", here, {"x": 1.0})
    assert step is not None and abs(0.9 + step) < 0.1
    level = found.worth(here | {"x": 0.9 + step})
    assert level["a"] == pytest.approx(level["b"], abs=1e-9)
    over, under = (found.worth(here | {"x": 0.9 + step + d}) for d in (0.01, -0.01))
    assert over["a"] > over["b"] and under["a"] < under["b"]
    assert found.turning("a", "b", here, {"y": 1.0}) is None, "too far"
    narrow = replace(found, low=(0.5, -3.0), high=(3.0, 3.0))
    assert narrow.turning("a", "b", here, {"x": 1.0}) is None, "no x has been seen below a half"
    far: dict[str, float | None] = {"x": 9.0, "y": 0.1}
    step = found.turning("a", "b", far, {"x": 1.0})
    assert step is not None and abs(9 + step) < 0.1, "from where it is, not from three deviations"
    assert found.turning("a", "b", far, {"x": 1.0, "y": 1.0}) is None
    both = found.turning("a", "b", here, {"x": 1.0, "y": 1.0})
    assert both is not None
    level = found.worth({"x": 0.9 + both, "y": 0.1 + both})
    assert level["a"] == pytest.approx(level["b"], abs=1e-9)


def test_a_bound_is_used_and_the_unknown_is_not() -> None:
    figures = {
        "surprisal_chosen": Estimate(value=1.5, low=1.0, high=2.0, trusted=True),
        "reference_accuracy": bound(low=0.7, note="at least"),
        "surprisal_rejected": cannot_tell("no"),
    }
    found = of_figures(figures, 0)
    assert found["surprisal_chosen"] == 1.5 and found["reference_accuracy"] == 0.7
    assert found["surprisal_rejected"] is None and found["surprisal_spread_chosen"] is None
    assert set(found) == set(FIGURES[0])


def test_every_sign_is_a_documented_figure_and_has_words() -> None:
    for name in (n for tier in FIGURES.values() for n in tier):
        side = name.removesuffix("_chosen").removesuffix("_rejected")
        assert name in DOCUMENTED or f"{side}_SIDE" in DOCUMENTED, name
    given = Circumstances(
        label_source="human", label_price=3, sample_price=1, beta=0.1, pairs=10, budget=100
    )
    every = [*given.signs(), *(n for tier in FIGURES.values() for n in tier)]
    assert all(n.startswith("is_") or plain_sign(n) in WORDS for n in every)


def given(**changes: float | str) -> Circumstances:
    plain = {
        "label_source": "rm_other", "label_price": 0.3, "sample_price": 1.0, "beta": 0.1,
        "pairs": 500, "budget": 3000.0,
    }  # fmt: skip
    return Circumstances(**(plain | changes))  # pyright: ignore[reportArgumentType]


def test_the_shipped_rule_knows_the_candidates() -> None:
    own = shipped()
    assert own.rule.rows == tuple(names())
    for row in own.rule.rows:
        assert row in methods.table()
        assert any(s.plain() == dict(own.settings[row]) for s in settings_of(row)), row
    assert 0 <= own.measured["mean_regret"] < own.measured["halving_regret"] < 1


def test_what_is_advised_can_be_trained() -> None:
    """Settings as a user would type them, through the same checks."""
    for row in shipped().rule.rows:
        settings = advised_settings(row, 0.1)
        flat = {k: v for k, v in settings.items() if k not in ("learning_rate", "on_policy_share")}
        building.method_of(config.load({"method": row, **flat, "reward": "length:min"}))


def test_without_a_judge_no_row_that_needs_one_is_named() -> None:
    found = advise({}, replace(given(), label_source=None))
    assert found.ranked
    assert not any("reward" in methods.get(a.method).needs for a in found.ranked)
    assert any("reward" in methods.get(r).needs for r in advise({}, given()).worth)


NAMES = {"the budget, in responses trained on,": "budget", "the number of pairs": "pairs",
         "the price of a label": "label_price", "the price of a sample": "sample_price",
         "beta": "beta"}  # fmt: skip


def test_what_would_change_the_advice_would() -> None:
    """Beyond the value that is named the order is the other way round, all that hangs on the
    quantity moving along."""
    checked = sum(
        changes_checked(given(label_source=source, label_price=price))
        for source in ("rm_same", "human", "rm_other")
        for price in (0.3, 3.0)
    )
    assert checked > 10


def changes_checked(here: Circumstances) -> int:
    found = advise({}, here)
    own = shipped().rule
    checked = 0
    for place, entry in enumerate(found.ranked):
        rival = found.ranked[1 if place == 0 else 0].method
        for text in entry.would_change.split(" or "):
            told = re.fullmatch(r"(.+) (below|above) ([\d.,e+-]+) \(now .+\)", text)
            if told is None:
                assert text.startswith("nothing")
                continue
            name, value = NAMES[told[1]], float(told[3].replace(",", ""))
            value *= 1.005 if told[2] == "above" else 0.995  # it is printed rounded
            there = replace(here, **{name: round(value) if name == "pairs" else value}).signs()
            now, then = own.worth(here.signs()), own.worth(there)
            assert (now[entry.method] > now[rival]) != (then[entry.method] > then[rival]), text
            checked += 1
    return checked


@pytest.mark.parametrize("source", ["rm_same", "human", "rm_other"])
def test_reasons_have_the_users_numbers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever speaks for any row over any other."""
    monkeypatch.setattr(advising, "REASONS", 99)
    here, own = given(label_source=source, beta=0.15, pairs=800), shipped().rule
    each = itertools.permutations(own.rows, 2)
    said = " ".join(advising._reason(own, *rows, here.signs(), here) for rows in each)
    assert set(re.findall(r"KL costs ([\d.]+)", said)) == {"0.15"}
    assert set(re.findall(r"there are ([\d,]+) pairs", said)) == {"800"}
    fresh = (3000 - (1600 if source == "rm_same" else 0)) / 2.3
    assert set(re.findall(r"buys ([\d,]+) fresh", said)) == {f"{fresh:,.0f}"}


def test_what_would_change_the_advice_has_been_seen() -> None:
    """A figure's value that is named lies where the rule was fitted."""
    own, checked = shipped().rule, 0
    for source, x in itertools.product((None, "rm_other"), (0.4, 1.0, 2.0)):
        figures = dict.fromkeys(FIGURES[0], Estimate(value=x, low=x, high=x, trusted=True))
        for entry in advise(figures, replace(given(), label_source=source)).ranked:
            for name in FIGURES[0]:
                place, quantity = own.names.index(name), WORDS[name].quantity
                for told in re.findall(rf"{quantity} (?:below|above) (\S+)", entry.would_change):
                    assert own.low[place] - 0.01 < float(told) < own.high[place] + 0.01, told
                    checked += 1
    assert checked > 5


def test_far_from_all_that_was_studied_nothing_is_sure() -> None:
    far = given(budget=3e9, pairs=10**8)
    found = advise({}, far)
    assert not found.sure and "log_pairs" in found.strange
