"""Estimators against brute force and against what they must do by their meaning."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.figures import (
    best_of_curve,
    best_of_kl,
    best_of_share,
    displacement,
    distinct,
    expected_best,
    interval,
    length_controlled,
    paired,
    ratio,
    wins,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(figure: dict[str, float | None]) -> float:
    assert figure["low"] is not None and figure["high"] is not None
    return figure["high"] - figure["low"]


# --- intervals ------------------------------------------------------------------------------------


def test_a_paired_interval_forgets_what_both_share() -> None:
    shared, noise = 10 * normal(50, 1), normal(50, 4, seed=1)
    mine, other = shared + 0.5 + noise, shared.expand(-1, 2)
    found = paired(mine, other)
    assert found["value"] == pytest.approx(float((mine.mean(-1) - shared.squeeze(-1)).mean()))
    assert width(found) < 0.1 * width(interval(mine))
    assert paired(mine, mine) == {"value": 0.0, "low": 0.0, "high": 0.0}
    with pytest.raises(AssertionError, match="cannot be paired"):
        paired(mine, other[:40])


def test_a_ratio_is_of_sums_and_its_units_are_resampled_together() -> None:
    tokens = torch.tensor([1.0, 10.0, 100.0, 5.0])
    found = ratio(3 * tokens, tokens)
    assert found["value"] == 3 and width(found) == pytest.approx(0, abs=1e-12)
    assert ratio(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))["value"] == 2.5
    assert ratio(torch.tensor([4.0]), torch.tensor([2.0])) == {
        "value": 2.0, "low": None, "high": None,
    }  # fmt: skip


def test_many_prompts_are_resampled_in_pieces() -> None:
    values = normal(5000, 1)
    found = interval(values)
    assert width(found) == pytest.approx(2 * 1.96 / math.sqrt(5000), rel=0.1)


# --- win rate at equal length ---------------------------------------------------------------------


def test_without_an_effect_of_length_the_rate_is_the_raw_one() -> None:
    # each length difference has the same share of wins
    difference = torch.tensor([-8.0, -3.0, 1.0, 20.0]).repeat_interleave(10)[:, None]
    won = torch.tensor([1.0] * 7 + [0.0] * 3).repeat(4)[:, None]
    found = length_controlled(won, difference)
    assert found is not None and found["value"] == pytest.approx(0.7, abs=1e-9)
    assert found["low"] is not None and found["high"] is not None
    assert found["low"] < 0.7 < found["high"]


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_with_nothing_but_an_effect_of_length_it_is_one_half(shift: float) -> None:
    difference = normal(4000, 1) + shift
    chance = 1 / (1 + torch.exp(-2 * difference))
    uniform = torch.rand(4000, 1, generator=torch.Generator().manual_seed(2))
    won = (uniform < chance).double()
    assert shift == 0 or float(won.mean()) > 0.75, "the raw rate is taken in by length"
    found = length_controlled(won, difference)
    assert found is not None and found["value"] == pytest.approx(0.5, abs=0.05)
    assert found["low"] is not None and found["high"] is not None
    assert found["low"] < 0.5 < found["high"] and width(found) < 0.15


def test_perfect_separation_by_length_has_a_finite_fit() -> None:
    difference = torch.tensor([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]])
    found = length_controlled((difference > 0).double(), difference)
    assert found is not None and found["value"] == pytest.approx(0.5, abs=1e-9)
    all_won = length_controlled(torch.ones(6, 1), difference)
    assert all_won is not None and all_won["value"] == pytest.approx(1.0, abs=1e-6)


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    """Against torch's own optimizer, ridge and all."""
    x, y = normal(200, 2), (normal(200, 2, seed=1) + normal(200, 2) > 0.4).double()
    scaled = x / (x**2).mean().sqrt()
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([a, b], max_iter=200, tolerance_grad=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(a + b * scaled, y)
        total = fit + 0.5e-3 * b**2
        total.backward()
        return total

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    found = length_controlled(y, x)
    assert found is not None and found["value"] == pytest.approx(a.sigmoid().item(), abs=1e-6)


def test_equal_lengths_and_equal_differences() -> None:
    won = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    same = length_controlled(won, torch.zeros(3, 2))
    assert same is not None and same["value"] == pytest.approx(float(won.mean()), abs=1e-9)
    for far in (4.0, -4.0):
        differs = far + torch.tensor([[1.0, -1.0], [0.0, 2.0], [1.0, 0.0]])
        assert length_controlled(won, differs) is None, "equal length is not among them"
    one = length_controlled(won[:1], torch.tensor([[1.0, -1.0]]))
    assert one is not None and one["low"] is None


def test_wins_are_halves_at_ties() -> None:
    mine, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 2.0, 2.0]])
    assert wins(mine, other).tolist() == [[0.0, 0.5, 1.0]]


# --- best of n ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    values = normal(3, 6)
    exact = [
        np.mean([max(row[i] for i in chosen) for chosen in itertools.combinations(range(6), n)])
        for row in values.tolist()
    ]
    assert expected_best(values, values, [n]).squeeze(-1).tolist() == pytest.approx(exact)


def test_best_by_one_reward_is_worth_another() -> None:
    values, by = normal(2, 5), normal(2, 5, seed=1)
    exact = [
        np.mean([
            v[max(chosen, key=lambda i: b[i])] for chosen in itertools.combinations(range(5), 3)
        ])
        for v, b in zip(values.tolist(), by.tolist(), strict=True)
    ]  # fmt: skip
    assert expected_best(values, by, [3]).squeeze(-1).tolist() == pytest.approx(exact)


def test_ties_share_their_values_whatever_their_order() -> None:
    values, by = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[2.0, 2.0, 0.0]])
    for order in itertools.permutations(range(3)):
        moved = list(order)
        found = expected_best(values[:, moved], by[:, moved], [1, 2, 3]).tolist()[0]
        assert found == pytest.approx([3.0, 3.0, 3.0])
    all_tied = expected_best(values, torch.zeros(1, 3), [3])
    assert all_tied.item() == pytest.approx(3.0), "a blind choice gains nothing"


def test_the_curve_stays_within_the_samples_that_there_are() -> None:
    values = normal(4, 20)
    curve = best_of_curve(values, values)
    assert list(curve) == [1, 2, 4, 8, 16]
    assert curve[1]["value"] == pytest.approx(float(values.mean()))
    rewards = [f["value"] for f in curve.values()]
    assert rewards == sorted(rewards, key=lambda x: x or 0.0)
    with pytest.raises(AssertionError, match="as many samples"):
        expected_best(values, values, [21])


def test_the_bound_of_the_kl() -> None:
    assert best_of_kl(1) == 0 and best_of_kl(2) == pytest.approx(math.log(2) - 0.5)
    # reached exactly where no two responses tie: density n F^(n-1) against 1 on [0, 1]
    for n in (2, 4, 64):
        u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx(float(torch.xlogy(density, density).mean()), rel=1e-3)


def test_best_of_n_as_a_policy_has_its_whole_gain() -> None:
    drawn = normal(400, 16)
    for n in (2, 4, 16):
        reward = expected_best(drawn, drawn, [n])
        at = torch.full((400, 1), best_of_kl(n))
        share = best_of_share(reward, at, drawn, drawn)
        assert share is not None and share["value"] == pytest.approx(1.0)
        assert width(share) == pytest.approx(0, abs=1e-9), "paired: the prompts' noise is shared"
        half = best_of_share(drawn.mean(-1, keepdim=True) / 2 + reward / 2, at, drawn, drawn)
        assert half is not None and half["value"] == pytest.approx(0.5)
    far = best_of_share(expected_best(drawn, drawn, [16]), torch.full((400, 1), 9.0), drawn, drawn)
    assert far is not None and far["value"] == pytest.approx(1.0), "beyond the last n: at the last"


def test_a_share_of_no_gain_is_none() -> None:
    drawn, kl = normal(6, 4), torch.full((6, 1), 0.5)
    assert best_of_share(drawn, 0.001 * kl, drawn, drawn) is None
    same = torch.ones(6, 4)
    assert best_of_share(drawn, kl, same, same) is None


# --- distinct n-grams -----------------------------------------------------------------------------


def test_distinct_n_grams_by_hand() -> None:
    responses = [[[1, 2, 1, 2]], [[1, 2, 3], [3]]]
    one, two = distinct(responses, 1), distinct(responses, 2)
    assert one is not None and one["value"] == 3 / 8
    assert two is not None and two["value"] == 3 / 5  # 12 21 12 | 12 23
    assert distinct([[[1]], [[]]], 2) is None
    single = distinct([[[1, 1]]], 1)
    assert single == {"value": 0.5, "low": None, "high": None}


def test_collapse_across_prompts_is_seen() -> None:
    same = distinct([[[1, 2, 3, 4]]] * 20, 2)
    differ = distinct([[[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]] for i in range(20)], 2)
    assert same is not None and same["value"] == pytest.approx(3 / 60)
    assert differ is not None and differ["value"] == 1


def test_the_jackknife_covers_fresh_samples() -> None:
    def draw(seed: int) -> list[list[list[int]]]:
        g = torch.Generator().manual_seed(seed)
        return [[torch.randint(0, 60, (12,), generator=g).tolist()] for _ in range(40)]

    found = distinct(draw(0), 2)
    assert found is not None
    values = [f["value"] for seed in range(1, 60) if (f := distinct(draw(seed), 2)) is not None]
    spread = float(np.std(np.array(values, dtype=float)))
    assert width(found) / (2 * 1.96) == pytest.approx(spread, rel=0.5)


# --- displacement ---------------------------------------------------------------------------------


def test_displacement_is_said_where_the_interval_is_below_zero() -> None:
    low = {"value": -2.0, "low": -3.0, "high": -1.0}
    message = displacement({"log_ratio_chosen": low})
    assert message is not None
    for word in ("log_ratio_chosen is -2", "hypo", "dpop", "dpo_nll", "on_policy_dpo", "ln-CHES"):
        assert word in message
    assert displacement({"log_ratio_chosen": low | {"high": 0.1}}) is None
    assert displacement({"log_ratio_chosen": low | {"low": None, "high": None}}) is None
    assert displacement({}) is None
