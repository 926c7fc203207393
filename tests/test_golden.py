"""Losses of twenty steps stay what they were, whatever the size of the micro-batches."""

import json

import pytest
import torch

from golden_curves import FILE, WORLDS, curve
from preftune import methods

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("scale", WORLDS)
@pytest.mark.parametrize("name", methods.table())
def test_twenty_steps_of_every_row(name, scale):
    torch.set_num_threads(1)
    assert curve(name, scale) == pytest.approx(GOLDEN[scale][name], abs=1e-8, rel=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("name", methods.table())
def test_micro_batches_change_nothing(name):
    """One prompt a forward pass; over four epochs and, of rows with two passes, four rounds."""
    torch.set_num_threads(1)
    got = curve(name, "transformer", steps=8, micro_batch_tokens=1)
    assert got == pytest.approx(GOLDEN["transformer"][name][:8], abs=1e-6, rel=1e-6)
