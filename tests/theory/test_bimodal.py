"""Forward KL covers two modes, reverse KL takes one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.theory import bimodal

OTHERS = bimodal.unimodal_grid()[0][::97]


def test_the_two_projections() -> None:
    """Forward (45, sd 36), between the modes and wide; reverse (25, sd 5), the heavier mode, at
    log(1.8 / 1) = .5878 nats: the other mode's share is all that is lost."""
    family, grid = bimodal.unimodal_grid()
    assert family.shape == (100 * 38, 100)
    forward, reverse = bimodal.fits(bimodal.two_modes(), family)
    assert grid[forward.argmin()].tolist() == [45, 36]
    assert grid[reverse.argmin()].tolist() == [25, 5]
    assert reverse.min().item() == pytest.approx(0.5878, abs=1e-4)


def test_the_forward_projection_is_flat_in_sd() -> None:
    """(44, sd 40) is the best of sd 40, .0009 nats behind, and wins on sds 3, 5, 10, 20, 40."""
    family, grid = bimodal.unimodal_grid()
    forward, _ = bimodal.fits(bimodal.two_modes(), family)
    coarse = torch.isin(grid[:, 1], torch.tensor([3, 5, 10, 20, 40]))
    best = forward.where(coarse, torch.inf)
    assert grid[best.argmin()].tolist() == [44, 40]
    assert (best.min() - forward.min()).item() == pytest.approx(0.0009, abs=5e-5)


def test_reverse_takes_the_heavier_mode() -> None:
    """With the weights exchanged, reverse goes to 75; with one mode alone both find it."""
    family, grid = bimodal.unimodal_grid()
    parts = bimodal.discretised_gaussian(
        torch.tensor([25.0, 75.0], dtype=torch.float64), torch.tensor([5.0, 5.0]).double()
    )
    swapped = bimodal.mixture(parts, torch.tensor([0.8, 1.0], dtype=torch.float64))
    assert grid[bimodal.fits(swapped, family)[1].argmin()].tolist() == [75, 5]
    for divergence in bimodal.fits(parts[0], family):
        assert grid[divergence.argmin()].tolist() == [25, 5]
        assert divergence.min().item() == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 98), st.floats(0.5, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_forward_projection_matches_moments(mean: int, sd: float) -> None:
    """Inside an exponential family the forward projection keeps mean and variance: no other member
    of (mean, sd) comes nearer to a target than one that shares its first two moments."""
    centre = torch.tensor([float(mean)], dtype=torch.float64)
    member = bimodal.discretised_gaussian(centre, torch.tensor([sd], dtype=torch.float64))
    # A target with the same two moments: move mass along a direction orthogonal to 1, k, k².
    arm = torch.arange(100, dtype=torch.float64)
    basis = torch.stack([torch.ones_like(arm), arm, arm**2], -1)
    wiggle = torch.sin(arm) * member[0].exp()
    wiggle = wiggle - basis @ torch.linalg.lstsq(basis, wiggle[:, None]).solution[:, 0]
    p = member[0].exp()
    safe = (p / wiggle.abs()).min() * 0.5
    target = (p + safe * wiggle).log()
    nearest = bimodal.fits(target, member)[0]
    assert (bimodal.fits(target, OTHERS)[0] >= nearest - 1e-9).all()
