"""Baselines, generalized advantages and whitening: numbers by hand, and naive versions."""

import functools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.advantages import gae, leave_one_out, whiten

floats = st.floats(-100, 100)


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_leave_one_out_by_hand() -> None:
    """(1, 2, 6): (2 + 6)/2 = 4, (1 + 6)/2 = 3.5, (1 + 2)/2 = 1.5; a pair swaps its values."""
    assert leave_one_out(f64(1.0, 2.0, 6.0)).tolist() == [4.0, 3.5, 1.5]
    assert leave_one_out(f64(3.0, -1.0)).tolist() == [-1.0, 3.0]


def test_leave_one_out_keeps_prompts_apart() -> None:
    """Rows (1, 3) and (10, 30): (3, 1) and (30, 10)."""
    out = leave_one_out(torch.tensor([[1.0, 3.0], [10.0, 30.0]]))
    assert out.tolist() == [[3.0, 1.0], [30.0, 10.0]]


@given(st.lists(floats, min_size=2, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_leave_one_out_excludes_the_sample_itself(values: list[float], data: st.DataObject) -> None:
    """It is the mean of the others, and bit for bit the same whatever the sample itself is."""
    i = data.draw(st.integers(0, len(values) - 1))
    out = leave_one_out(f64(*values))
    others = values[:i] + values[i + 1 :]
    assert out[i].item() == pytest.approx(statistics.fmean(others), abs=1e-9)
    for own in (1e300, math.inf, math.nan):
        changed = f64(*values[:i], own, *values[i + 1 :])
        assert leave_one_out(changed)[i].item() == out[i].item()


@pytest.mark.parametrize("num", [0, 1])
def test_leave_one_out_needs_two_samples(num: int) -> None:
    with pytest.raises(ValueError, match=f"got {num}: set samples_per_prompt to 2"):
        leave_one_out(torch.zeros(3, num))


def test_gae_by_hand() -> None:
    """Two real tokens, one padded (99s must not matter); gamma 0.9, lambda 0.5.

    δ_1 = 2 + 0.9·0 - 1 = 1;  A_1 = 1;                      target 1 + 1 = 2
    δ_0 = 1 + 0.9·1 - 0.5 = 1.4;  A_0 = 1.4 + 0.45·1 = 1.85;  target 1.85 + 0.5 = 2.35
    """
    advantage, target = gae(
        f64(1.0, 2.0, 99.0),
        f64(0.5, 1.0, 99.0),
        torch.tensor([True, True, False]),
        gamma=0.9,
        lam=0.5,
    )
    torch.testing.assert_close(advantage, f64(1.85, 1.0, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(target, f64(2.35, 2.0, 0.0), rtol=0, atol=1e-12)


def naive_gae(
    reward: list[float], value: list[float], length: int, gamma: float, lam: float
) -> list[float]:
    """The defining double sum over the real tokens of one response."""
    v = [*value[:length], 0.0]
    delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    sums = [
        sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length)) for t in range(length)
    ]
    return sums + [0.0] * (len(reward) - length)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_gae_is_the_naive_sum(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 5)
    reward, value = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    # What stands in the padding must not matter, not even NaN.
    dirty = [x.where(mask, math.nan).requires_grad_() for x in (reward, value)]
    advantage, target = gae(dirty[0], dirty[1], mask, gamma=gamma, lam=lam)
    assert not advantage.requires_grad and not target.requires_grad
    for i, length in enumerate(lengths):
        expected = naive_gae(reward[i].tolist(), value[i].tolist(), length, gamma, lam)
        torch.testing.assert_close(advantage[i], f64(*expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(target, (advantage + value).where(mask, 0.0), rtol=0, atol=1e-12)


def test_gae_without_discount_is_reward_to_go_less_value() -> None:
    """gamma = lambda = 1, reward 3 at the last of three tokens, values (1, 2, 4): targets
    (3, 3, 3), advantages (2, 1, -1)."""
    advantage, target = gae(
        f64(0.0, 0.0, 3.0),
        f64(1.0, 2.0, 4.0),
        torch.ones(3, dtype=torch.bool),
        gamma=1.0,
        lam=1.0,
    )
    assert advantage.tolist() == [2.0, 1.0, -1.0]
    assert target.tolist() == [3.0, 3.0, 3.0]


def test_whiten_by_hand() -> None:
    """(1, 2, 3, 4): mean 2.5, population variance (2.25 + 0.25 + 0.25 + 2.25)/4 = 1.25, so
    ∓1.5/√1.25 = ∓1.341641 and ∓0.5/√1.25 = ∓0.447214; the masked entry becomes 0."""
    out = whiten(f64(1.0, 2.0, 3.0, 4.0, math.nan), torch.tensor([True] * 4 + [False]))
    expected = f64(-1.3416407865, -0.4472135955, 0.4472135955, 1.3416407865, 0.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7)


@given(st.lists(floats, min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_whiten_gives_mean_0_and_sd_1(values: list[float]) -> None:
    out = whiten(f64(*values)).tolist()
    assert statistics.fmean(out) == pytest.approx(0, abs=1e-7)
    if statistics.pstdev(values) > 0.1:
        assert statistics.pstdev(out) == pytest.approx(1, abs=1e-5)


def test_whiten_of_equal_lone_or_no_entries_is_zero() -> None:
    assert whiten(torch.full((3, 2), 0.7)).abs().max() < 1e-2
    assert whiten(torch.tensor([5.0])).tolist() == [0.0]
    assert whiten(torch.tensor([5.0, 6.0]), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_whiten_maps_over_runs() -> None:
    """Through vmap each run is whitened by itself, with or without a mask."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 10 * x[1] + 5
    mask = torch.arange(4) < torch.tensor([[[1], [4], [2]], [[3], [2], [4]]])
    masked, plain = torch.vmap(whiten)(x, mask), torch.vmap(functools.partial(whiten, mask=None))(x)
    for run in range(2):
        torch.testing.assert_close(masked[run], whiten(x[run], mask[run]))
        torch.testing.assert_close(plain[run], whiten(x[run]))
