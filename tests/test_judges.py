"""Who judges, and what a reward's numbers hang on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preftune import judges
from preftune.rewards import Classifier, Ensemble, Function, Length, Reward, Weighted


def classifier(folder: Path | str = "rm", weight: float = 0.0) -> Classifier:
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, weight)
    torch.nn.init.zeros_(model.bias)
    return Classifier(str(folder), model, lambda prompt, completion: [0])


def test_a_reward_model_of_these_pairs_is_found_wherever_it_stands(tmp_path: Path) -> None:
    """Its run's config.yaml stands beside it; an ensemble of two, one of other data; a sum."""
    data = tmp_path / "pairs.jsonl"
    for name, seen in (("own", data), ("other", tmp_path / "others.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"data: {seen}\n")
    own, other = classifier(tmp_path / "own" / "model"), classifier(tmp_path / "other" / "model")

    def told(reward: Reward) -> str | None:
        return judges.label_source(reward, str(data))

    short = Length("min")
    assert told(own) == "rm_same" and told(other) == "rm_other"
    assert told(Ensemble((other, own))) == "rm_same"
    assert told(Ensemble((other, other))) == "rm_other"
    assert told(Weighted(((1.0, short), (0.5, own)))) == "rm_same"
    assert told(Weighted(((1.0, short), (0.5, Ensemble((other, own)))))) == "rm_same"
    assert told(Weighted(((1.0, short), (0.5, other)))) == "rm_other"
    assert told(short) == "true" and judges.label_source(None, str(data)) is None
    assert judges.label_source(own, None) == "rm_other"


@pytest.mark.parametrize("inside", [
    lambda x: x, lambda x: Ensemble((classifier("first"), x)),
    lambda x: Weighted(((1.0, Length("min")), (2.0, x))),
    lambda x: Weighted(((1.0, Ensemble((classifier("first"), x))),)),
])  # fmt: skip
def test_a_model_that_was_trained_again_is_another(inside: Callable[[Reward], Reward]) -> None:
    digest = judges.digest_of(inside(classifier()))
    assert digest == judges.digest_of(inside(classifier()))
    assert digest != judges.digest_of(inside(classifier(weight=1.0))), "of the same name"


def test_numbers_beside_the_models_count() -> None:
    one, part = classifier(), Length("min")
    each = [Ensemble((one, one), 0.1), Ensemble((one, one), 0.1 + 1e-9), part, Length("mode", 3),
            Weighted(((0.1, part),)), Weighted(((0.1 + 1e-9, part),))]  # fmt: skip
    assert len({judges.digest_of(x) for x in each}) == len(each)


@pytest.mark.parametrize("body", [
    "def f(completions, **_):\n    return [{0}.0 for _ in completions]\n",
    "class F:\n    def __call__(self, completions):\n        return [{0}.0]\n\nf = F()\n",
    "from functools import partial\n\ndef g(completions, by):\n    return [by]\n\n"
    "f = partial(g, by={0})\n",
])  # fmt: skip
def test_an_edited_function_is_another(
    here: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """By the file that it is named by, whatever kind of function it is."""
    found = []
    for value in (1, 1, 2):
        (here / "my.py").write_text(body.format(value))
        namespace: dict[str, object] = {}
        exec(compile(body.format(value), "my.py", "exec"), namespace)
        function = namespace["f"]
        assert callable(function)
        found.append(judges.digest_of(Function("my.py:f", function)))
    assert found[0] == found[1] != found[2]
    (here / "pkg_of_rewards.py").write_text(body.format(1))
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "pkg_of_rewards", raising=False)
    made = judges.make_reward("pkg_of_rewards:f", None)
    assert made is not None
    before = judges.digest_of(made)
    (here / "pkg_of_rewards.py").write_text(body.format(3))
    assert judges.digest_of(made) != before
