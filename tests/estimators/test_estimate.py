"""The common result: values with intervals, bounds, and a bootstrap of any statistic."""

import numpy as np
import pytest
import torch
from enumerable import holds, uniform

from preftune.estimators.estimate import Estimate, bootstrap, bound, cannot_tell, mean, of, share


def test_plain_data() -> None:
    found = Estimate(value=1.0, low=0.5, high=1.5, trusted=True)
    assert found.as_json() == {"value": 1.0, "low": 0.5, "high": 1.5, "trusted": True}
    least = bound(low=2.0, note="too few").as_json()
    assert least == {"value": None, "low": 2.0, "high": None, "trusted": False, "note": "too few"}
    assert cannot_tell("no").as_json()["low"] is None
    with pytest.raises(AssertionError):
        bound(low=1.0, high=2.0, note="")


def test_what_has_no_interval_is_not_trusted() -> None:
    assert not mean(torch.ones(1, 4)).trusted
    assert not of({"value": float("nan"), "low": 0.0, "high": 1.0}).trusted
    assert not mean(torch.tensor([[1.0], [float("inf")]])).trusted
    assert mean(torch.ones(2, 4)).value == 1.0


def test_a_share_that_no_prompt_shows_is_not_certainly_zero() -> None:
    """(1 - p)^50 = .025 at p = .0711."""
    none = share(torch.zeros(50, 4))
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.0711, abs=1e-4)
    every = share(torch.ones(50, 4))
    assert (every.value, every.high) == (1.0, 1.0) and every.low == pytest.approx(
        1 - 0.0711, abs=1e-4
    )


def test_rare_shares_are_held() -> None:
    """p = 1 %, 50 prompts: a plain bootstrap sees nothing in 60 % of draws, and then says 0."""
    holds(lambda g: share((uniform(g, 50, 1) < 0.01).double()), 0.01)


def test_bootstrap_of_a_median() -> None:
    x = np.arange(101.0)
    found = bootstrap(lambda i: float(np.median(x[i])), 101)
    low, high = found["low"] or 0, found["high"] or 0
    assert found["value"] == 50 and 32 < low < 45 < 55 < high < 68
    assert bootstrap(lambda i: 1.0, 1)["low"] is None
    assert bootstrap(lambda i: np.nan, 5)["low"] is None
