"""What a diagnosis takes: parts timed by themselves, prices, and what fits a budget."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from preftune.config import load
from preftune.diagnosis import cost, job, measure
from preftune.errors import UserError
from preftune.policies import scoring
from preftune.samples import Samples

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1.5m", 90), ("30", 30)]
)
def test_times(text: str, expected: float) -> None:
    assert cost.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-5m", "1d", "1m30s", "inf"])
def test_no_times(text: str) -> None:
    with pytest.raises(UserError, match="give a time"):
        cost.seconds(text)


def test_the_price_of_a_sample() -> None:
    """In units of training on one response of the data, of which a forward pass is three tenths."""
    # eight samples take .8 s, the two responses of a row .4 s to score
    speeds = cost.Speeds(row=0.4, prompt=2.0, drawing=0.8)
    assert speeds.sample_price(2) == pytest.approx(0.1 * cost.SCORE / 0.2)
    long = cost.Speeds(row=40.0, prompt=2.0, drawing=0.8)
    assert 0 < long.sample_price(2) < 0.01, "cheap, not free, beside responses that are long"


def test_parts_are_timed_by_themselves(tiny_model, pairs_file, here, monkeypatch) -> None:
    """Neither policy nor judge is in what a price is told from; both are in what a budget is. By a
    clock that the judge moves by a second when it is asked first, a finished policy by two."""
    settings = {"model": tiny_model, "data": pairs_file, "max_new_tokens": 3, "output": "out"}
    made, *_ = job._prepare(load(settings | {"reward": "length:min"}), tiny_model)
    clock, asked = [0.0], []

    def judge(samples: Samples) -> torch.Tensor:
        if samples.tokens.shape not in asked:
            asked.append(samples.tokens.shape)
            clock[0] += 1
        return torch.zeros(samples.finished.shape)

    def score(*given):
        clock[0] += 2
        return scoring.score_all(*given)

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(job, "score_all", score)
    monkeypatch.setattr(measure, "score_all", score)
    made = replace(made, judge=judge)
    different = measure.distinct(made, 12)
    speeds = job._speeds(made, different, 0.0)
    assert (speeds.row, speeds.prompt) == (0, 0) and speeds.drawing > 0
    assert (speeds.judged_row, speeds.judged_prompt) == (0.25, 0.25)
    assert speeds.policy_row == 0.5
    again = job._speeds(made, different, 0.0)
    assert again.judged_row == 0.25, "what it took at first, though it answers at once now"


def test_a_budget_is_of_all_parts() -> None:
    """A row's and a prompt's, with a judge, and a policy whose answers have their KL."""
    plain = cost.Speeds(row=0.1, prompt=1.0)
    assert (plain.whole_row, plain.whole_prompt(1)) == (0.1, 1.0)
    assert plain.whole_prompt(2) == 1 + cost.WITH_KL
    full = replace(plain, policy_row=0.2, judged_row=0.4, judged_prompt=3.0)
    assert full.whole_row == pytest.approx(0.7)
    assert full.whole_prompt(2) == 1 + cost.WITH_KL + 2 * 3
    assert cost.sizes(None, full, 10, 1).expected == pytest.approx(10 * (0.7 + 4))
    assert replace(full, drawing=0.8).sample_price(2) == replace(plain, drawing=0.8).sample_price(2)
    assert full.probed == plain.probed, "a probe is not judged"


def test_what_fits_a_budget() -> None:
    assert cost.left(100, 20) == pytest.approx(72)
    assert cost.left(10, 20) == 1, "as little as can be"
    speeds = cost.Speeds(row=0.1, prompt=1.0)
    whole = cost.sizes(None, speeds, 900, 1)
    assert (whole.rows, whole.prompts, whole.note) == (cost.ROWS, cost.PROMPTS, "")
    assert whole.expected == pytest.approx(50 + 200)
    half = cost.sizes(100, speeds, 900, 1)
    assert half.expected <= 100 and half.rows == 100 and half.prompts == 90
    assert "100 of 500 rows" in half.note and "90 of 200 prompts" in half.note
    two = cost.sizes(100, speeds, 900, 2)
    assert two.prompts == 32, "another policy answers, with its KL: three times as much"
    most = cost.sizes(240, speeds, 900, 1)
    assert (most.rows, most.prompts) == (400, 200), "prompts first, then more rows"
    for budget in (20, 40, 75, 150, 249):
        cut = cost.sizes(budget, replace(speeds, row=0.7), 900, 1)
        assert cut.rows >= cut.prompts and cut.expected <= budget, "no answer without its row"
    short = cost.sizes(10, speeds, 900, 1)
    assert short.prompts == 0 and "no answers are drawn" in short.note
    assert cost.sizes(10_000, speeds, 900, 1).note == ""
