"""Every row trains the default model on real rows (slow)."""

import math
from pathlib import Path

import pytest

from preftune import methods, train
from preftune.evaluate import DOCUMENTED as FIGURES
from preftune.measures import DOCUMENTED
from preftune.reward_evaluation import DOCUMENTED as REWARD_FIGURES

DATA = Path(__file__).parents[2] / "shared" / "data" / "hh_helpful.jsonl.gz"


def known(name: str) -> bool:
    """Whether docs/metrics.md explains a name of metrics.jsonl."""
    if name in ("step", *DOCUMENTED) or name.startswith("loss_"):
        return True
    plain = name.removeprefix("eval_").removesuffix("_low").removesuffix("_high")
    if plain.startswith("gain_over_"):
        return True
    return plain.partition(":")[0] in {n.partition(":")[0] for n in (*FIGURES, *REWARD_FIGURES)}


def characters(prompts: list, completions: list, **columns: object) -> list[float]:
    """Shorter is better, in characters: tokens would tie, since most samples are cut."""
    return [-float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is not here")
@pytest.mark.parametrize("method", methods.table())
def test_every_row_trains_five_steps(method, tmp_path):
    run = train(
        {
            "method": method, "data": str(DATA), "max_rows": 24, "max_length": 256,
            "batch_size": 2, "max_steps": 5, "max_new_tokens": 16, "output": str(tmp_path / "run"),
            "eval_fraction": 0.1, "bad_rows": 0.2,
        },
        reward=characters,
    )  # fmt: skip
    assert [row["step"] for row in run.metrics][-1] == 5
    moved = 0
    for row in run.metrics:
        for name, value in row.items():
            assert known(name), name
            # a round whose every pair ties makes no update and says so
            assert value is None or math.isfinite(value), (name, value)
        moved += row.get("loss") is not None
    assert moved
