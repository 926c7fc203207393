"""Ensembles of reward models, and names that make no reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from preftune import rewards
from preftune.errors import UserError
from preftune.rewards import Ensemble, Judged


@dataclass(frozen=True)
class Table:
    """A stand-in for a reward model: scores by completion."""

    name: str
    scores: dict[str, float]
    label_source = "rm_other"

    def __call__(self, judged: Judged) -> Sequence[float]:
        return [self.scores[c] for c in judged.completions]


MODELS = {
    "a": Table("a", {"agreed": 2.0, "disputed": 9.0}),
    "b": Table("b", {"agreed": 2.0, "disputed": 3.0}),
    "org/c": Table("org/c", {"agreed": 2.0, "disputed": 0.0}),
}
JUDGED = Judged(prompts=["p", "p"], completions=["agreed", "disputed"], tokens=[1, 1])


def made(spec: str) -> rewards.Reward:
    return rewards.make(spec, MODELS.__getitem__)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    ensemble = made("ensemble:a,b,org/c")
    assert rewards.judge(ensemble, JUDGED) == [2.0, 4.0]
    assert ensemble.label_source == "rm_other" and not rewards.is_open(ensemble)
    assert isinstance(ensemble, Ensemble)
    # deviations 5, -1, -4: variance (25 + 1 + 16) / 2
    assert ensemble.spread(JUDGED) == pytest.approx([0.0, 21**0.5])


@pytest.mark.parametrize("kappa", [0.5, 2.0])
def test_kappa_takes_off_what_the_members_dispute(kappa: float) -> None:
    ensemble = made(f"ensemble:a, b,org/c;kappa={kappa}")
    assert rewards.judge(ensemble, JUDGED) == pytest.approx([2.0, 4.0 - kappa * 21**0.5])
    assert ensemble.name == f"ensemble:a,b,org/c;kappa={kappa:g}"
    again = made(ensemble.name)
    assert isinstance(again, Ensemble) and again.kappa == kappa


def test_each_member_is_checked() -> None:
    bad = Ensemble((MODELS["a"], Table("broken", {"agreed": float("nan"), "disputed": 1.0})))
    with pytest.raises(UserError, match="reward 'broken' returned nan for response 0"):
        rewards.judge(bad, JUDGED)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ensemble:", "two reward models or more"), ("ensemble:a", "two reward models or more"),
        ("ensemble:a,,b", "two reward models or more"),
        ("ensemble:a,b,a", "'a' stands in it twice"),
        ("ensemble:a,b;kapa=1", "'kapa=1' is unknown.*kappa=K"),
        ("ensemble:a,b;kappa=x", "number of 0 or more, not 'x'"),
        ("ensemble:a,b;kappa=-1", "number of 0 or more, not '-1'"),
        ("ensemble:a,b;kappa=nan", "number of 0 or more"), ("judge:host", "no address"),
    ],
)  # fmt: skip
def test_specs_that_are_wrong(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(spec)


def test_an_ensemble_may_be_part_of_a_sum() -> None:
    total = rewards.Weighted(((0.5, made("ensemble:a,b")), (1.0, rewards.Length("min"))))
    assert rewards.judge(total, JUDGED) == [0.0, 2.0]
