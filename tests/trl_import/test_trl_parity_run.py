"""A DPO run of an imported configuration has TRL's losses, update by update."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

pytest.importorskip("trl", reason="trl is not installed: parity with it is not checked")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trl_parity.py"
ROWS = [
    {"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": f" I would say {n * n} now"}
    for n in range(20)
]
IPO = {"lr_scheduler_type": "cosine", "loss_type": ["ipo"], "beta": 0.5, "max_grad_norm": 0.2}


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("trl_parity", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "more", [pytest.param({}, id="as it comes"), pytest.param(IPO, marks=pytest.mark.slow)]
)
def test_losses_are_those_of_trl(parity, tiny_model, here, more):
    values = parity.settings(
        tiny_model, 20, per_device_train_batch_size=4, learning_rate=1e-4, **more
    )
    found = parity.compare(values, ROWS)
    assert len(found) == 20
    assert max(row["difference"] for row in found) < 1e-4
    moved = abs(found[-1]["trl"] - found[0]["trl"])
    assert moved > 0.02, "the losses hardly move, so that equal ones would show nothing"
