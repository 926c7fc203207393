"""What is done to rewards before they are used: penalties, standardising, limits, KL a token."""

import math

import pytest
import torch

from preftune.labellers import Shaping
from preftune.labellers.base import KL_SCALE, kl_tokens, log_ratio, rewards_of, shaped
from tables import f64, scored


def close(x: torch.Tensor, expected: list, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, f64(expected), rtol=0, atol=tolerance)


def test_nothing_is_done_unless_asked():
    round_ = scored([[1.5, -2.0], [7.0, 0.25]], finished=[[False, True], [True, True]])
    reward, state = rewards_of(round_, Shaping(), {})
    assert torch.equal(reward, round_.reward) and state == {}


def test_a_response_that_was_cut_pays():
    round_ = scored([[1.0, 2.0], [3.0, 4.0]], finished=[[True, False], [False, True]])
    close(rewards_of(round_, Shaping(no_end_penalty=0.5), {})[0], [[1.0, 1.5], [2.5, 4.0]])


def test_rewards_are_limited_on_both_sides():
    round_ = scored([[-9.0, -2.0, 0.5, 2.5]])
    close(rewards_of(round_, Shaping(limit=2.0), {})[0], [[-2.0, -2.0, 0.5, 2.0]])


def test_standardised_over_a_prompts_responses():
    """(1, 3): mean 2, population deviation 1. (0, 6): mean 3, deviation 3. Equal rewards: 0."""
    round_ = scored([[1.0, 3.0], [0.0, 6.0], [5.0, 5.0]])
    reward, state = rewards_of(round_, Shaping(standardise="prompt"), {})
    close(reward, [[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]], 1e-7)
    assert state == {}


def test_standardised_by_all_earlier_rounds():
    """Round 1 is left as it is; round 2 by (1, 3, 5, 7): mean 4, variance 5; round 3 by all six."""
    shaping, first, second = Shaping(standardise="running"), [[1.0, 3.0], [5.0, 7.0]], [[4.0, 14.0]]
    reward, state = rewards_of(scored(first), shaping, {})
    close(reward, first)
    reward, state = rewards_of(scored(second), shaping, state)
    close(reward, [[0.0, 10 / math.sqrt(5)]], 1e-7)
    seen = [1.0, 3.0, 5.0, 7.0, 4.0, 14.0]
    mean = sum(seen) / 6
    deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / 6)
    reward, _ = rewards_of(scored([[2.0]]), shaping, state)
    close(reward, [[(2.0 - mean) / deviation]], 1e-7)


def test_one_reward_has_no_deviation_yet():
    """After a single reward of 3 the deviation counts as 1."""
    shaping = Shaping(standardise="running")
    _, state = rewards_of(scored([[3.0]]), shaping, {})
    close(rewards_of(scored([[5.0]]), shaping, state)[0], [[2.0]])


def test_running_statistics_of_the_penalised_rewards():
    """The penalty comes first, so it is in the statistics too: round 1 counts as (0, 2)."""
    shaping = Shaping(standardise="running", no_end_penalty=1.0)
    _, state = rewards_of(scored([[1.0, 2.0]], finished=[[False, True]]), shaping, {})
    close(rewards_of(scored([[4.0]]), shaping, state)[0], [[3.0]], 1e-7)


def test_the_order_is_penalty_standardise_limit():
    """(0, 8), the second cut, penalty 2: (0, 6) -> (-1, 1) -> limited to 0.5. Limited first, it
    would be (0, 0.5) -> (-1, 1)."""
    round_ = scored([[0.0, 8.0]], finished=[[True, False]])
    shaping = Shaping(no_end_penalty=2.0, standardise="prompt", limit=0.5)
    close(rewards_of(round_, shaping, {})[0], [[-0.5, 0.5]])
    unlimited = Shaping(no_end_penalty=8.0, standardise="prompt")
    close(rewards_of(round_, unlimited, {})[0], [[0.0, 0.0]], 1e-7)  # 0 and 8 - 8


def test_limited_rewards_do_not_enter_the_statistics():
    """Round 1 (0, 100) has mean 50 and deviation 50 whatever the limit is."""
    shaping = Shaping(standardise="running", limit=1.0)
    first, state = rewards_of(scored([[0.0, 100.0]]), shaping, {})
    close(first, [[0.0, 1.0]])
    close(rewards_of(scored([[75.0]]), shaping, state)[0], [[0.5]], 1e-9)


LOGP, REF = [[-1.0, -2.0, -0.5], [-3.0, 7.0, 7.0]], [[-1.5, -1.0, -0.5], [-1.0, -7.0, -7.0]]


@pytest.mark.parametrize(
    ("estimator", "of"),
    [
        ("k1", lambda x: x),
        ("k2", lambda x: x * x / 2),
        ("k3", lambda x: math.exp(-x) - 1 + x),
    ],
)
def test_kl_of_each_token(estimator, of):
    """Log-ratios (0.5, -1, 0) and (-2), padding left out; times kl 0.2, and 3 from the budget."""
    round_ = scored(logp=[LOGP], ref_logp=[REF], lengths=[[3, 1]])
    expected = [[[0.2 * of(0.5), 0.2 * of(-1.0), 0.2 * of(0.0)], [0.2 * of(-2.0), 0.0, 0.0]]]
    close(kl_tokens(round_, 0.2, estimator, {}), expected)
    tripled = {KL_SCALE: torch.tensor(3.0, dtype=torch.float64)}
    scaled = [[[3 * x for x in row] for row in prompt] for prompt in expected]
    close(kl_tokens(round_, 0.2, estimator, tripled), scaled)


def test_log_ratio_of_a_response_without_its_padding():
    round_ = scored(logp=[LOGP], ref_logp=[REF], lengths=[[3, 1]])
    close(log_ratio(round_), [[-0.5, -2.0]])


def test_the_kl_is_taken_off_after_the_limit():
    """Reward 9 limited to 1, less 0.5 x 2; and a KL of the other sign adds."""
    round_ = scored([[9.0, 0.25]], logp=[[0.0, -3.0]], ref_logp=[[-2.0, -1.0]])
    close(shaped(round_, 0.5, Shaping(limit=1.0), {})[0], [[0.0, 1.25]])


def test_each_run_has_its_own_scale_and_statistics():
    state = {KL_SCALE: f64([1.0, 10.0])}
    round_ = scored(
        [[[1.0, 3.0]], [[10.0, 30.0]]],
        logp=[[[0.0, 0.0]], [[0.0, 0.0]]],
        ref_logp=[[[-1.0, -2.0]], [[-1.0, -2.0]]],
    )
    reward, state = shaped(round_, 0.1, Shaping(standardise="running"), state)
    close(reward, [[[0.9, 2.8]], [[9.0, 28.0]]])
    reward, _ = rewards_of(scored([[[4.0]], [[40.0]]]), Shaping(standardise="running"), state)
    close(reward, [[[2.0]], [[2.0]]], 1e-7)
