"""How much fits a budget of time, told from a short timing before anything else is done."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from preftune.errors import UserError

ROWS, PROMPTS, SAMPLES = 500, 200, 8
"""As much as is taken where the budget allows it: intervals of a twentieth, and a resolution of a
ninth for ranks."""
SCORE = 0.3
"""Of training on a response (forward, backward, the reference's forward): one forward pass."""
FEWEST = 16
"""Prompts below which a figure's interval says nothing; the tier is left out then."""
_DATA_SHARE = 0.25
"""Of the budget, for the data: answers cost more a prompt, and say more."""
_MEASURED = 0.9
"""Of what is left; the rest is for reading figures off, and for a timing that was lucky."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(budget: str) -> float:
    """Of `90s`, `10m`, `1h` or a bare number of seconds.

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", budget)
    value = float(found[1]) * _UNITS.get(found[2] or "s", 1.0) if found else 0.0
    if value <= 0:
        raise UserError(f"budget '{budget}': give a time, as 90s, 10m or 1h.")
    return value


def left(budget: float, spent: float) -> float:
    """Seconds for measuring: what loading and timing took is gone, and figures take some."""
    return max(1.0, _MEASURED * (budget - spent))


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds of what is done many times."""

    row: float
    """Scoring the responses of a row."""
    prompt: float
    """Answering a prompt `SAMPLES` times, scoring and judging the answers."""

    def sample_price(self, responses: int) -> float:
        """Of drawing a response, in units of training on one, of which a score is `SCORE`.

        Args:
            responses: of a row of the data.
        """
        score = self.row / responses
        return max(0.0, self.prompt / SAMPLES - score) * SCORE / score


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


def sizes(budget: float | None, speeds: Speeds, prompts: int, policies: int) -> Sizes:
    """What of the whole is taken.

    Args:
        budget: seconds; None takes the whole.
        prompts: of the data, those that differ; a row of each is scored.
        policies: whose answers are drawn: 1, or 2 with a finished policy.
    """
    most_rows, most_prompts = min(prompts, ROWS), min(prompts, PROMPTS)
    prompt = speeds.prompt * policies
    everything = most_rows * speeds.row + most_prompts * prompt
    if budget is None:
        return Sizes(rows=most_rows, prompts=most_prompts, expected=everything)
    share = _DATA_SHARE if everything > budget else 1.0
    taken = max(min(most_rows, FEWEST), min(most_rows, int(share * budget / speeds.row)))
    left = max(0.0, budget - taken * speeds.row)
    answered = min(most_prompts, int(left / prompt))
    said = []
    if taken < most_rows:
        said.append(f"{taken} of {most_rows} rows are scored")
    if answered < min(FEWEST, most_prompts):
        answered = 0
        said.append(f"no answers are drawn: {FEWEST} prompts would take {FEWEST * prompt:.0f} s")
    elif answered < most_prompts:
        said.append(f"{answered} of {most_prompts} prompts are answered")
    note = f"within {budget:.0f} s " + " and ".join(said) if said else ""
    return Sizes(
        rows=taken, prompts=answered, expected=taken * speeds.row + answered * prompt, note=note
    )


def timed(work: Callable[[], object], count: int) -> float:
    """Seconds that each of `count` things takes; done twice, the first time to warm up."""
    work()
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) / count
