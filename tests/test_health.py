"""Warnings of a run: each with its cure, each once."""

from types import SimpleNamespace

import pytest

from preftune import health


def watched() -> SimpleNamespace:
    return SimpleNamespace(step=7, warned=set(), first_entropy=None)


def said(run: SimpleNamespace, **metrics: float | None) -> list[str]:
    return list(health.warnings(run, {"loss": 0.1, **metrics}))


@pytest.mark.parametrize(
    ("quiet", "loud", "words"),
    [
        ({"loss": 0.5}, {"loss": None}, ["tied", "finer reward"]),
        ({"kl": 49.0}, {"kl": 51.0}, ["51 nats", "target_kl"]),
        ({"entropy": 0.21}, {"entropy": 0.19}, ["0.190 nats", "2.000 at first", "repeats itself"]),
    ],
)
def test_a_sign_is_said_once(quiet: dict, loud: dict, words: list[str]) -> None:
    run = watched()
    assert said(run, entropy=2.0) == []
    assert said(run, **quiet) == []
    (message,) = said(run, **loud)
    assert "step 7" in message and all(word in message for word in words)
    assert said(run, **loud) == []


def test_figures_of_a_study_are_left_alone() -> None:
    assert list(health.warnings(watched(), {"loss": [0.1], "kl": [99.0], "entropy": [0.0]})) == []
