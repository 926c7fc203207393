"""The mixed sampler's joint law, and the share of uniform pairs that it needs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.theory import sampling


def test_two_arms_by_hand() -> None:
    """s = (0, 1): weights 4 on equal arms and 2 + e + 1/e = 5.0862 on each other pair; a fair coin
    puts .25 · ½ + ½ · ½(σ(1)² + σ(−1)²) there, .2767 against .2799."""
    score = torch.tensor([0.0, 1.0], dtype=torch.float64)
    off = 2 + math.e + 1 / math.e
    law = sampling.mix_joint_law(score)
    assert law[0, 1].item() == pytest.approx(off / (8 + 2 * off), abs=1e-12)
    assert law[0, 1].item() == pytest.approx(0.2799, abs=1e-4)
    assert sampling.two_part_law(score, 0.5)[0, 1].item() == pytest.approx(0.2767, abs=1e-4)
    assert sampling.mix_uniform_share(score).item() == pytest.approx(4 / (6 + math.e + 1 / math.e))


@given(st.integers(0, 2**31), st.integers(2, 8), st.floats(0, 6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_law_and_its_two_parts(seed: int, arms: int, scale: float) -> None:
    """The joint is 2 + e^Δ + e^−Δ normalised, is the two-part sampler at its exact share, and that
    share never exceeds ½."""
    gen = torch.Generator().manual_seed(seed)
    score = scale * torch.randn(100, arms, generator=gen, dtype=torch.float64)
    delta = score[:, :, None] - score[:, None, :]
    weight = 2 + delta.exp() + (-delta).exp()
    product = 1 / (delta.sigmoid() * (-delta).sigmoid())
    torch.testing.assert_close(weight, product, rtol=1e-9, atol=0)
    law = sampling.mix_joint_law(score)
    expected = weight / weight.sum((-1, -2), keepdim=True)
    torch.testing.assert_close(law, expected, rtol=1e-9, atol=1e-14)
    share = sampling.mix_uniform_share(score)
    torch.testing.assert_close(sampling.two_part_law(score, share), law, rtol=1e-9, atol=1e-14)
    assert (share <= 0.5 + 1e-12).all()
