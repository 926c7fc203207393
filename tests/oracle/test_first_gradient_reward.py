"""`first_gradient` of `reward`: Bradley-Terry on scores read at the last token of a response.

The score is a linear head on the trunk's last hidden state, by one plain forward a response. Built
from a causal model the head is zero, so the first gradient moves the head alone; from a saved
classifier it moves everything.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worlds import (
    CUT_PAIRS,
    PAIRS,
    VISIBLE,
    WORLDS,
    Response,
    World,
    assert_same,
    exact_norm,
    gradient,
    largest_difference,
    mean,
    write_rows,
)

from preftune import first_gradient

WITH_MARGINS = [row | {"margin": 0.4 * n} for n, row in enumerate(PAIRS)]
UNSURE = [row | {"probability": 1 - 0.1 * n} for n, row in enumerate(PAIRS)]


@pytest.fixture(autouse=True)
def only_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norm in float64 on both sides."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@pytest.fixture(scope="module")
def classifiers(
    worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A classifier with a random head for each world, saved by transformers alone."""
    folders = {}
    for name, world in worlds.items():
        model = build_classifier(world.policy)
        with torch.no_grad():
            model.score.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
        folders[name] = tmp_path_factory.mktemp(f"{name}-classifier")
        model.save_pretrained(folders[name])
        PreTrainedTokenizerFast.from_pretrained(world.policy).save_pretrained(folders[name])
    return folders


def build_classifier(folder: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@cache
def load_classifier(folder: Path) -> torch.nn.Module:
    return build_classifier(folder).double().eval()


@dataclass
class Scores:
    """The Bradley-Terry loss of rows, with one deliberate flaw or none."""

    model: torch.nn.Module
    end: int
    flaw: str | None = None

    def score(self, response: Response) -> Tensor:
        prompt, tokens = response
        if self.flaw == "end_left_out" and tokens[-1] == self.end:
            tokens = tokens[:-1]
        ids = torch.tensor([prompt + tokens])
        hidden = self.model.base_model(input_ids=ids).last_hidden_state[0]
        if self.flaw == "mean_of_tokens":
            hidden = hidden[len(prompt) :].mean(0, keepdim=True)
        if self.flaw == "first_token":
            hidden = hidden[: len(prompt) + 1]
        return self.model.score(hidden[-1])[0]

    def loss(self, world: World, rows: Sequence[Mapping], template: str) -> Tensor:
        losses = []
        for (chosen, rejected), row in zip(world.pairs(rows, template), rows, strict=True):
            lead = self.score(chosen) - self.score(rejected)
            sign = {"margin_added": 1, "margin_left_out": 0}.get(str(self.flaw), -1)
            lead = lead + sign * row.get("margin", 0.0)
            flipped = 1 - row.get("probability", 1.0)
            flipped = 0.0 if self.flaw == "not_smoothed" else flipped
            if self.flaw == "swapped":
                lead = -lead
            losses.append(-(1 - flipped) * logsigmoid(lead) - flipped * logsigmoid(-lead))
        total = torch.stack(losses).sum()
        return total if self.flaw == "summed_over_pairs" else mean(losses)


def actual(
    model: Path, folder: Path, rows: Sequence[Mapping] = PAIRS, **changes: Any
) -> dict[str, Tensor]:
    config = {
        "method": "reward",
        "model": str(model),
        "data": write_rows(folder / "data.jsonl", rows),
        "batch_size": 64,
        "template": "none",
        "seed": 0,
    }
    return first_gradient(config | changes)


def expected(
    world: World,
    model: torch.nn.Module,
    rows: Sequence[Mapping] = PAIRS,
    template: str = "none",
    flaw: str | None = None,
) -> dict[str, Tensor]:
    return gradient(model, Scores(model, world.end, flaw).loss(world, rows, template))


def with_zero_head(world: World) -> torch.nn.Module:
    model = copy.deepcopy(load_classifier(world.policy))
    with torch.no_grad():
        model.score.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("name", "template"),
    [(name, "none") for name in WORLDS] + [("llama-tied-bos", "auto"), ("gpt2-bos", "auto")],
)
def test_new_head_moves_alone(
    worlds: dict[str, World], name: str, template: str, tmp_path: Path
) -> None:
    world = worlds[name]
    gradients = actual(world.policy, tmp_path, template=template)
    model = with_zero_head(world)
    assert_same(gradients, expected(world, model, template=template))
    for key, value in gradients.items():
        assert bool(value.abs().max() > 1e-3) == (key == "score.weight"), key


@pytest.mark.parametrize("name", WORLDS)
def test_saved_classifier(
    worlds: dict[str, World], classifiers: dict[str, Path], name: str, tmp_path: Path
) -> None:
    world, model = worlds[name], load_classifier(classifiers[name])
    assert_same(actual(classifiers[name], tmp_path), expected(world, model))
    split = actual(classifiers[name], tmp_path, micro_batch_tokens=24)
    assert_same(split, expected(world, model))


@pytest.mark.parametrize("rows", [CUT_PAIRS, WITH_MARGINS, UNSURE], ids=["cut", "margin", "unsure"])
@pytest.mark.parametrize("template", ["none", "auto"])
def test_columns_of_the_data(
    worlds: dict[str, World],
    classifiers: dict[str, Path],
    rows: list[dict[str, Any]],
    template: str,
    tmp_path: Path,
) -> None:
    """A cut response is read at its last token, a margin is a lead, a probability smooths."""
    world, model = worlds["gpt2-bos"], load_classifier(classifiers["gpt2-bos"])
    gradients = actual(classifiers["gpt2-bos"], tmp_path, rows, template=template)
    assert_same(gradients, expected(world, model, rows, template))


def test_model_given_as_an_object(
    worlds: dict[str, World], classifiers: dict[str, Path], tmp_path: Path
) -> None:
    """It replaces the folder's weights and keeps its values."""
    world, model = worlds["llama"], build_classifier(classifiers["llama"])
    config = {"method": "reward", "model": str(classifiers["llama"]), "batch_size": 64}
    config |= {"data": write_rows(tmp_path / "data.jsonl", PAIRS), "template": "none"}
    with torch.no_grad():
        model.score.weight.mul_(-0.5)
    doubled = copy.deepcopy(model).double().eval()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert_same(first_gradient(config, model=model), expected(world, doubled))
    for name, value in model.named_parameters():
        assert torch.equal(value.detach().to(before[name].dtype), before[name]), name


FLAWS = {
    "end_left_out": PAIRS,
    "mean_of_tokens": PAIRS,
    "first_token": PAIRS,
    "swapped": PAIRS,
    "summed_over_pairs": PAIRS,
    "margin_added": WITH_MARGINS,
    "margin_left_out": WITH_MARGINS,
    "not_smoothed": UNSURE,
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_wrong_oracle_differs(
    worlds: dict[str, World], classifiers: dict[str, Path], flaw: str, tmp_path: Path
) -> None:
    world, model = worlds["gpt2-bos"], load_classifier(classifiers["gpt2-bos"])
    gradients = actual(classifiers["gpt2-bos"], tmp_path, FLAWS[flaw])
    wrong = expected(world, model, FLAWS[flaw], flaw=flaw)
    assert largest_difference(gradients, wrong) > VISIBLE
