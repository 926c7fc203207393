"""The bandit's closed forms against values computed apart from it and by enumeration."""

import itertools
import math

import pytest
import torch

from preftune.problems.bandit import (
    CONTINUOUS,
    REWARDS,
    Peak,
    Peaks,
    anti_aligned,
    coordinates,
    exact,
    expected_best,
    near,
    reference_probs,
)


def test_the_reference_has_its_published_values():
    p = reference_probs()
    assert p.sum() == pytest.approx(1.0, abs=1e-12) and (p > 0).all()
    # rounded; .0267 is of arm 15, not of arm 10
    for arm, mass in {0: 0.0781, 99: 0.0422, 15: 0.0267, 20: 0.0243, 70: 0.0021}.items():
        assert float(p[arm]) == pytest.approx(mass, abs=6e-5), arm
    assert int(p[1:-1].argmax()) + 1 == 16
    assert float(p[15:26].sum()) == pytest.approx(0.259, abs=6e-4)
    assert float(p[65:76].sum()) == pytest.approx(0.0234, abs=6e-5)
    assert float(-(p * p.log()).sum()) == pytest.approx(4.117, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "mean"), [("r4", 0.0390), ("r5", 0.3772), ("r8", 0.0955), ("r9", 0.1876)]
)
def test_expected_rewards_of_the_reference(name, mean):
    assert float((reference_probs() * REWARDS[name]()).sum()) == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize(("name", "mean"), [("r4", 0.313), ("r5", 0.940)])
def test_best_of_ten(name, mean):
    assert float(expected_best(reference_probs(), REWARDS[name](), 10)) == pytest.approx(
        mean, abs=6e-4
    )


def test_best_of_n_by_enumeration():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    r = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    total = sum(
        float(p[list(c)].prod()) * float(r[list(c)].max())
        for c in itertools.product(range(3), repeat=3)
    )
    assert float(expected_best(p, r, 3)) == pytest.approx(total, abs=1e-12)


def test_exact_figures_by_hand():
    logp = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double().log()
    ref = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double().log()
    found = exact(logp, ref, torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double())
    assert float(found.reward) == pytest.approx((0.5 + 0.25) / 2)
    assert float(found.mass_near) == pytest.approx((0.5 + 0.75) / 2)
    half = torch.tensor(0.5).double()
    kl = half * (half / 0.75).log() + half * (half / 0.25).log()
    assert float(found.reverse_kl) == pytest.approx(float(kl) / 2)
    assert float(found.forward_kl) > 0


def test_several_peaks_are_equally_high():
    r = Peaks((Peak(20, 5), Peak(80, 5)))()
    assert float(r[20]) == float(r[80]) == 1.0 and float(r[50]) < 1e-6
    assert near(Peak(70, 10)).sum() == 21


def test_an_anti_aligned_reference_ranks_against_the_reward():
    r = REWARDS["r4"]()
    logp = anti_aligned(r)
    assert int(logp.argmin()) == int(r.argmax()) == 70
    assert float(logp.exp().sum()) == pytest.approx(1.0)


def test_continuous_rewards_by_hand():
    """r1 at its centre, one width away in one coordinate, and beyond the limit of 0.99."""
    r1, r3 = CONTINUOUS["r1"], CONTINUOUS["r3"]
    at = torch.full((10,), 0.7, dtype=torch.float64)
    assert float(r1(at)) == 1.0
    away = at.clone()
    away[3] -= 0.75
    assert float(r1(away)) == pytest.approx(math.exp(-1))
    assert float(r1(torch.full((10,), 5.0))) == pytest.approx(math.exp(-10 * (0.29 / 0.75) ** 2))
    assert float(r3(-at)) == 1.0 and float(r3(at)) < 1e-9
    assert coordinates(torch.tensor([0, 50, 99])).tolist() == pytest.approx([-0.99, 0.01, 0.99])
