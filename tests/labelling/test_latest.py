"""Labels for a run that goes on: pairs are drawn from the weights that it has by now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import config
from preftune.errors import UserError
from preftune.events import Event
from preftune.labelling import drawing
from preftune.training import train

pytestmark = pytest.mark.long


def settings(tiny_model: str, pairs_file: str) -> dict[str, Any]:
    return {
        "model": tiny_model, "data": pairs_file, "max_steps": 4, "save_every": 2, "batch_size": 4,
        "output": "out", "learning_rate": 1e-2,
    }  # fmt: skip


def label_settings(pairs_file: str) -> config.Config:
    return config.load({"prompts": pairs_file, "max_new_tokens": 8})


def weights(writer: drawing.Writer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in writer.policy.named_parameters()}


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_pairs_come_from_the_newest_checkpoint(
    here: Path, tiny_model: str, pairs_file: str, adapter: str | None
) -> None:
    seen: list[Any] = []

    def look(event: Event) -> None:
        if event.kind == "start":
            seen.extend(drawing.writers(label_settings(pairs_file), ["out"]))
            pair = next(p for i in range(12) if (p := drawing.draw(seen[:1], 0, i)))
            assert pair.writers == ("out", "out"), "nothing is saved yet"
        if event.kind == "save" and len(seen) == 1:
            pair = next(p for i in range(12) if (p := drawing.draw(seen[:1], 0, i)))
            assert pair.writers == ("out, step 2", "out, step 2")
            seen.append(weights(seen[0]))

    given = settings(tiny_model, pairs_file) | ({"adapter": adapter} if adapter else {})
    run = train(given, callbacks=[look])
    writer, early = seen
    assert writer.now() == "out, step 4"
    late, left = weights(writer), dict(run.policy.named_parameters())
    assert late.keys() == left.keys() and all(torch.equal(late[n], left[n]) for n in late)
    assert any(not torch.equal(early[n], late[n]) for n in late)
    assert writer.now() == "out, step 4", "nothing new"

    ended = drawing.writers(label_settings(pairs_file), ["out"])[0]
    assert ended.latest is None and ended.now() == "out", "it has left its model"
    both = [run.policy, ended.policy]
    if adapter is None:
        one, other = (dict(p.named_parameters()) for p in both)
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_run_that_goes_on_is_not_compared(
    here: Path, tiny_model: str, pairs_file: str, make_tiny_model: Callable[..., str]
) -> None:
    def look(event: Event) -> None:
        if event.kind == "start":
            with pytest.raises(UserError, match="goes on, and its weights would change"):
                drawing.writers(label_settings(pairs_file), ["out", tiny_model])

    train(settings(tiny_model, pairs_file), callbacks=[look])


def test_a_reward_model_says_nothing(here: Path, tiny_model: str, pairs_file: str) -> None:
    def look(event: Event) -> None:
        if event.kind == "start":
            with pytest.raises(UserError, match="trains a reward model"):
                drawing.writers(label_settings(pairs_file), ["out"])

    train(settings(tiny_model, pairs_file) | {"method": "reward"}, callbacks=[look])
