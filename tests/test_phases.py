"""Times of phases add up, nested ones too."""

import time

import pytest

from preftune.phases import count, phase, recording


def test_times_add_up_and_an_inner_phase_takes_its_time_away() -> None:
    with recording() as spent:
        began = time.perf_counter()
        with phase("train", tokens=5):
            time.sleep(0.02)
            with phase("score"):
                time.sleep(0.05)
            time.sleep(0.02)
            count("train", 2)
        taken = time.perf_counter() - began
    assert spent.tokens == {"train": 7}
    assert spent.seconds["train"] + spent.seconds["score"] == pytest.approx(taken, abs=0.01)
    assert spent.seconds["score"] >= 0.05
    assert 0.04 <= spent.seconds["train"] < taken - 0.04


def test_without_a_recorder_nothing_is_kept() -> None:
    with phase("train", tokens=5):
        count("decode", 3)
    with recording() as spent:
        pass
    assert spent.seconds == {} and spent.tokens == {}


def test_a_phase_that_fails_is_closed() -> None:
    with recording() as spent:
        with pytest.raises(ValueError), phase("train"):
            raise ValueError
        with phase("reward"):
            pass
    assert set(spent.seconds) == {"train", "reward"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AssertionError, match="no phase"), phase("trian"):
        pass
