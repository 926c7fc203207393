"""How much fits a budget of time, told from a short timing before anything else is done."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from preftune.errors import UserError

ROWS, PROMPTS, SAMPLES = 500, 200, 8
"""As much as is taken where the budget allows it: intervals of a twentieth, and a resolution of a
ninth for ranks."""
SCORE = 0.3
"""Of training on a response (forward, backward, the reference's forward): one forward pass."""
WITH_KL = 2.0
"""By another model and with its KL from the reference, against answering a prompt and scoring the
answers: three forward passes more. Measured at answers of 16 tokens; less at longer ones."""
FEWEST = 16
"""Prompts below which a figure's interval says nothing; the tier is left out then."""
_MEASURED = 0.9
"""Of what is left; the rest is for reading figures off, and for a timing that was lucky."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(budget: str) -> float:
    """Of `90s`, `10m`, `1h` or a bare number of seconds.

    Raises:
        UserError: it is none of these.
    """
    value = duration(budget)
    if value <= 0:
        raise UserError(f"budget '{budget}': give a time, as 90s, 10m or 1h.")
    return value


def duration(text: str) -> float:
    """Seconds of a time with or without a unit; 0 where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    return float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0


def check_prices(*, spend: float | None = None, label_price: float | None = None) -> None:
    """Refuse what is no price, before anything is measured.

    Raises:
        UserError: nothing to spend, a price below 0, or no finite number.
    """
    if spend is not None and not 0 < spend < math.inf:
        raise UserError(f"flag '--spend': is {spend:g}. Give a number above 0.")
    if label_price is not None and not 0 <= label_price < math.inf:
        raise UserError(f"flag '--label-price': is {label_price:g}. Give a number of 0 or more.")


def left(budget: float, spent: float) -> float:
    """Seconds for measuring: what loading and timing took is gone, and figures take some."""
    return max(1.0, _MEASURED * (budget - spent))


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds of what is done many times, each part by itself."""

    row: float
    """Scoring the responses of a row by the reference."""
    prompt: float
    """Answering a prompt `SAMPLES` times by the reference, and scoring the answers by it."""
    drawing: float = 0.0
    """Of that, sampling alone."""
    load: float = 0.0
    """Loading a model and the data."""
    policy_row: float = 0.0
    """Scoring the responses of a row by a finished policy, too."""
    judged_row: float = 0.0
    """Judging the responses of a row."""
    judged_prompt: float = 0.0
    """Judging `SAMPLES` answers to a prompt."""

    @property
    def whole_row(self) -> float:
        """All that is done of a row."""
        return self.row + self.policy_row + self.judged_row

    def whole_prompt(self, policies: int) -> float:
        """All that is done of a prompt, without a probe."""
        others = (policies - 1) * (WITH_KL * self.prompt + self.judged_prompt)
        return self.prompt + self.judged_prompt + others

    @property
    def probed(self) -> float:
        """Answering a prompt by a probe, with its KL, and scoring the prompt's row by it."""
        return WITH_KL * self.prompt + self.row

    def sample_price(self, responses: int) -> float:
        """Of drawing a response, in units of training on one, of which a score is `SCORE`.

        Args:
            responses: of a row of the data.
        """
        return self.drawing / SAMPLES * SCORE / (self.row / responses)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short training run, whose answers are measured as the reference's are."""

    steps: int
    pairs: int
    """Of a step."""
    asked: bool
    """By the user: the rest is cut to make room for it. Else it is made where all the rest fits."""

    def training(self, speeds: Speeds) -> float:
        """Seconds until there is something to measure; what is loaded again is loaded faster."""
        return speeds.load + self.steps * self.pairs * speeds.row / SCORE


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each is taken."""

    rows: int
    prompts: int
    samples: int = SAMPLES
    expected: float
    """Seconds."""
    note: str = ""
    """What was cut, and why."""
    probe_steps: int = 0
    """0: no probe."""
    no_probe: str = ""
    """Why not, where there is a budget."""


def sizes(
    budget: float | None, speeds: Speeds, prompts: int, policies: int, probe: Probe | None = None
) -> Sizes:
    """What of the whole is taken.

    Args:
        budget: seconds; None takes the whole, and a probe where it is asked for.
        prompts: of the data, those that differ; a row of each is scored.
        policies: whose answers are drawn: 1, or 2 with a finished policy.
        probe: that may be made, if one may.
    """
    row, prompt = speeds.whole_row, speeds.whole_prompt(policies)
    without = _sizes(budget, row, prompt, prompts)
    if probe is None or (budget is None and not probe.asked):
        return without
    training = probe.training(speeds)
    left = None if budget is None else budget - training
    if left is None or left > 0:
        beside = _sizes(left, row, prompt + speeds.probed, prompts)
        if beside.prompts and (probe.asked or not beside.note):
            expected = beside.expected + training
            return replace(beside, expected=expected, probe_steps=probe.steps)
    more = training + without.prompts * speeds.probed
    why = f"no probe: {probe.steps} updates and what is measured of them would take {more:.0f} s"
    return replace(without, no_probe=why)


def _sizes(budget: float | None, row: float, prompt: float, prompts: int) -> Sizes:
    """By seconds a row and a prompt: as many prompts as fit with their rows, then more rows."""
    most_rows, most_prompts = min(prompts, ROWS), min(prompts, PROMPTS)
    everything = most_rows * row + most_prompts * prompt
    if budget is None or everything <= budget:
        return Sizes(rows=most_rows, prompts=most_prompts, expected=everything)
    answered = min(most_prompts, int(budget / (row + prompt)))
    fewest = min(FEWEST, most_prompts)
    if answered < fewest:
        answered = 0
    fit = int((budget - answered * prompt) / row)
    taken = max(fewest, answered, min(most_rows, fit))
    said = []
    if taken < most_rows:
        said.append(f"{taken} of {most_rows} rows are scored")
    if not answered:
        least = fewest * (row + prompt)
        said.append(f"no answers are drawn: {fewest} prompts would take {least:.0f} s")
    elif answered < most_prompts:
        said.append(f"{answered} of {most_prompts} prompts are answered")
    note = f"within {budget:.0f} s " + " and ".join(said) if said else ""
    return Sizes(rows=taken, prompts=answered, expected=taken * row + answered * prompt, note=note)


TIMES = 2
"""That work is done to be timed."""


def timed(work: Callable[[], object], count: int) -> float:
    """Seconds that each of `count` things takes; done `TIMES` times, at first to warm up."""
    for _ in range(TIMES - 1):
        work()
    return took(work) / count


def took(work: Callable[[], object]) -> float:
    """Seconds of doing it once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
