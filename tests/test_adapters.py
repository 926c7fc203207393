"""Adapters from the config: step 0, what trains, what is saved, resume, hostile folders."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import train
from preftune.errors import UserError


@pytest.fixture
def settings(here: Path, tiny_model: str, pairs_file: str) -> Any:
    """Settings of a short run into a folder of that name."""

    def make(output: str, **changes: Any) -> dict[str, Any]:
        given = {"model": tiny_model, "data": pairs_file, "method": "dpo", "output": output}
        given |= {"max_steps": 2, "batch_size": 12, "learning_rate": 0.002, "adapter": "lora"}
        given |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "max_new_tokens": 4}
        given |= {"eval_fraction": 0.0}
        return {k: v for k, v in (given | changes).items() if v is not None}

    return make


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics]


LN2 = math.log(2)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_step_zero(settings: Any, kind: str) -> None:
    """Fresh, gone on with, and on top of an earlier one: the first loss is ln 2 each time."""
    first = train(settings("a", adapter={"kind": kind, "rank": 4}))
    assert losses(first)[0] == pytest.approx(LN2, abs=1e-6) and losses(first)[1] < LN2 - 1e-4
    again = train(settings("b", model="a", adapter=None))
    assert losses(again)[0] == pytest.approx(LN2, abs=1e-6) and losses(again)[1] < LN2 - 1e-4
    if kind == "dora":
        with pytest.raises(UserError, match="preftune merge"):
            train(settings("c", model="a/model"))
    else:
        top = train(settings("c", model="a/model", adapter={"kind": "rslora", "rank": 2}))
        assert losses(top)[0] == pytest.approx(LN2, abs=1e-6) and losses(top)[1] < LN2 - 1e-4
