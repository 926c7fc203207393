"""Frontier against frontier: by hand, and which runs a verdict is of."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.reproduce import frontiers
from preftune.reproduce.claims import Claim, load

CLAIMS = {k: c for k, c in load().items() if c.by == "frontier"}
SEEDS = (0, 1)


def f64(*x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_frontiers_by_hand() -> None:
    # one seed: at KLs of .05 to 1, the first has reward 0 until .5 and then 4, the other 0, then 2
    kl, reward = f64([0, 0.5, 1.0]), f64([0, 4, 1])
    other_kl, other = f64([0, 0.5, 2.0]), f64([0, 2, 9])
    gain = frontiers.reward_at_equal_kl(kl, reward, other_kl, other)
    shares = (torch.linspace(0.05, 1, frontiers.PLACES) >= 0.5).double().mean()
    assert gain.item() == pytest.approx(2 * shares.item())
    assert frontiers.reward_at_equal_kl(kl, reward, kl, reward).item() == 0
    # rewards 0 to 4: the first needs KL .5 beyond 0; the other .5 up to 2 and 2 beyond
    more = frontiers.kl_at_equal_reward(other_kl, other, kl, reward)
    beyond = (torch.linspace(0, 4, frontiers.PLACES) > 2).double().mean()
    assert more.item() == pytest.approx(1.5 * beyond.item())
    apart = frontiers.kl_at_equal_reward(kl, -reward, other_kl, -other)
    assert apart.isfinite().all(), "nobody rises above the reference"
    start, end = -7.9, -1.3
    assert start + (end - start) > end, "a place computed so is beyond every checkpoint"
    least = f64([0, 1], [0, 2]), f64([start, end], [start, end])
    assert frontiers.kl_at_equal_reward(*least, *least).tolist() == [0, 0]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_rest_of_the_grid_changes_no_run_of_the_verdict(claim: Claim) -> None:
    own, every = (frontiers._plan(claim, SEEDS, full) for full in (False, True))
    assert own.items() <= every.items() and len(every) > len(own)


def test_a_multiple_of_one_rate_is_no_other_rate_beside_it() -> None:
    listed = [1e-4, 3e-4]
    assert frontiers._rates(listed, False) == listed
    found = frontiers._rates(listed, True)
    assert found == [1e-4 / 3, 1e-4, 3e-4, 3e-4 * 3.0], "as far as nothing is in the way, exactly"
