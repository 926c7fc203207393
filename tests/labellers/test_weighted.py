"""Labellers that weigh: reward weights, and advantages with each of the six baselines."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune import objectives as o
from preftune.labellers import Advantage, RewardWeights, Shaping
from preftune.labellers.base import KL_SCALE
from preftune.sources import OnPolicy
from preftune.terms import Term, count, loss_sum
from tables import f64, scored

ROUNDS = (
    [[1.0, 4.0, -2.0], [0.5, 0.5, 8.0]],
    [[3.0, -1.0, 2.0], [6.0, 0.0, 0.0]],
    [[-5.0, 1.0, 1.0], [2.0, 2.5, 9.0]],
)


def advantages(labeller: Advantage, rounds: tuple = ROUNDS, **more) -> list[np.ndarray]:
    """Of several rounds, the state handed on."""
    state, found = {}, []
    for reward in rounds:
        batch, state = labeller(scored(reward, **more), state)
        found.append(batch.data["advantage"].squeeze(-2).numpy())
    return found


def baseline_by_hand(name: str, number: int) -> np.ndarray:
    """Of the rewards of round `number`."""
    x = np.array(ROUNDS[number])
    if name == "none":
        return np.zeros_like(x)
    if name == "batch":
        return (x.sum() - x) / (x.size - 1)
    if name == "prompt":
        return np.repeat(x.mean(1, keepdims=True), x.shape[1], 1)
    if name == "leave_one_out":
        return (x.sum(1, keepdims=True) - x) / (x.shape[1] - 1)
    assert name == "running"
    earlier = [r for round_ in ROUNDS[:number] for row in round_ for r in row]
    return np.full_like(x, sum(earlier) / len(earlier) if earlier else 0.0)


@pytest.mark.parametrize("name", ["none", "batch", "prompt", "leave_one_out", "running"])
def test_baselines_of_three_rounds(name):
    for number, found in enumerate(advantages(Advantage(baseline=name))):
        expected = np.array(ROUNDS[number]) - baseline_by_hand(name, number)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_one_item_a_prompt_that_points_at_all_responses():
    batch, _ = Advantage()(scored(ROUNDS[0]), {})
    assert batch.index.tolist() == [[[0, 1, 2]]] * 2 and batch.roles == () and batch.keep is None
    assert batch.data["advantage"].shape == (2, 1, 3)
    assert Advantage().items(7) == RewardWeights().items(7) == 1


def test_the_running_mean_leaves_the_current_round_out():
    """Rounds (2, 4) and (10): 0 in the first, 3 in the second whatever it holds."""
    labeller = Advantage(baseline="running")
    first, state = labeller(scored([[2.0, 4.0]]), {})
    assert first.data["advantage"].tolist() == [[[2.0, 4.0]]]
    for reward in (10.0, -80.0):
        batch, after = labeller(scored([[reward]]), state)
        assert batch.data["advantage"].tolist() == [[[reward - 3.0]]]
        assert float(after["baseline_sum"]) == 6.0 + reward
    assert state is not after and float(state["baseline_sum"]) == 6.0  # states are not changed


def test_the_running_mean_is_of_rewards_with_their_kl():
    """Rewards (2, 4) less 0.5 x (2, 4) are (1, 2): the next baseline is 1.5."""
    labeller = Advantage(baseline="running", kl=0.5)
    round_ = scored([[2.0, 4.0]], logp=[[0.0, 0.0]], ref_logp=[[-2.0, -4.0]])
    _, state = labeller(round_, {})
    batch, _ = labeller(scored([[7.0]], logp=[[0.0]], ref_logp=[[0.0]]), state)
    assert batch.data["advantage"].tolist() == [[[5.5]]]


def test_a_lone_sample_has_no_batch_to_compare_with():
    batch, _ = Advantage(baseline="batch")(scored([[3.0]]), {})
    assert batch.data["advantage"].tolist() == [[[3.0]]]


def test_fewest_responses_that_a_baseline_can_work_with():
    found = {b: Advantage(baseline=b).least for b in ("none", "batch", "running", "value")}
    assert set(found.values()) == {1}
    assert Advantage(baseline="leave_one_out").least == Advantage(baseline="prompt").least == 2
    assert Advantage(whiten="prompt").least == 2 and Advantage(whiten="round").least == 1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_sums_over_tokens(estimator):
    """Log-ratios (1, -0.5) and (2): sums of k1, k2, k3 by hand; the baseline comes after."""
    of = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
    round_ = scored(
        [[3.0, 1.0]],
        logp=[[[0.0, -1.0], [0.0, 5.0]]],
        ref_logp=[[[-1.0, -0.5], [-2.0, -5.0]]],
        lengths=[[2, 1]],
    )
    f = of[estimator]
    net = [3.0 - 0.4 * (f(1.0) + f(-0.5)), 1.0 - 0.4 * f(2.0)]
    for name, expected in (("none", net), ("leave_one_out", [net[0] - net[1], net[1] - net[0]])):
        labeller = Advantage(baseline=name, kl=0.4, kl_estimator=estimator)
        assert labeller.needs == {"reward", "logp", "ref_logp"}
        found = labeller(round_, {})[0].data["advantage"][0, 0]
        torch.testing.assert_close(found, f64(expected), rtol=0, atol=1e-12)


def numpy_gae(
    reward: np.ndarray, value: np.ndarray, lengths: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """By the defining double sum, one response at a time."""
    advantage, target = np.zeros_like(value), np.zeros_like(value)
    for place in np.ndindex(*lengths.shape):
        n = int(lengths[place])
        v = np.append(value[place][:n], 0.0)
        delta = reward[place][:n] + gamma * v[1:] - v[:-1]
        for t in range(n):
            powers = (gamma * lam) ** np.arange(n - t)
            advantage[place][t] = (powers * delta[t:]).sum()
            target[place][t] = advantage[place][t] + v[t]
    return advantage, target


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("gamma", "lam", "kl"), [(1.0, 0.95, 0.0), (0.9, 0.5, 0.3), (1.0, 1.0, 2)])
def test_generalised_advantages_of_ragged_responses(estimator, gamma, lam, kl):
    """Against NumPy: the reward stands at the last token, the KL at each, padding holds rubbish."""
    rng = np.random.default_rng(3)
    n, k, t = 4, 3, 6
    lengths = np.array([[6, 1, 3], [2, 6, 5], [1, 1, 4], [4, 2, 3]])
    reward = rng.normal(size=(n, k))
    real = np.arange(t) < lengths[..., None]
    logp, ref, value = (np.where(real, rng.normal(size=(n, k, t)), 1e3 * s) for s in (1, -1, 1))
    x = logp - ref
    with np.errstate(over="ignore"):
        estimate = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}[estimator]
    tokens = np.where(real, -kl * estimate, 0.0)
    for place in np.ndindex(n, k):
        tokens[place][lengths[place] - 1] += reward[place]
    expected = numpy_gae(tokens, value, lengths, gamma, lam)
    labeller = Advantage(baseline="value", kl=kl, kl_estimator=estimator, gamma=gamma, lam=lam)
    assert "value" in labeller.needs
    round_ = scored(
        reward.tolist(), logp=logp.tolist(), ref_logp=ref.tolist(), value=value.tolist(),
        lengths=lengths.tolist(),
    )  # fmt: skip
    data = labeller(round_, {})[0].data
    for name, by_hand in zip(("advantage", "target"), expected, strict=True):
        assert data[name].shape == (n, 1, k, t)
        np.testing.assert_allclose(data[name][:, 0].numpy(), by_hand, rtol=0, atol=1e-10)


def whitened(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-8)


def test_whitened_over_a_prompt_and_over_the_round():
    x = np.array(ROUNDS[0])
    (by_prompt,) = advantages(Advantage(whiten="prompt"), ROUNDS[:1])
    np.testing.assert_allclose(by_prompt, [whitened(row) for row in x], rtol=0, atol=1e-9)
    (by_round,) = advantages(Advantage(whiten="round"), ROUNDS[:1])
    np.testing.assert_allclose(by_round, whitened(x), rtol=0, atol=1e-9)


def test_whitening_of_a_value_baseline_is_over_real_tokens():
    """Two responses of 1 and 2 tokens: three advantages, and nothing where there is padding."""
    value = [[[0.5, 9.0], [1.0, -1.0]]]
    round_ = scored([[2.0, 3.0]], value=value, lengths=[[1, 2]])
    raw = Advantage(baseline="value", lam=1.0)(round_, {})[0].data
    assert raw["advantage"].flatten().tolist() == [1.5, 0.0, 2.0, 4.0]
    for per in ("round", "prompt"):
        data = Advantage(baseline="value", lam=1.0, whiten=per)(round_, {})[0].data
        a, b, c = whitened(np.array([1.5, 2.0, 4.0]))
        np.testing.assert_allclose(data["advantage"].flatten(), [a, 0.0, b, c], rtol=0, atol=1e-9)
        assert torch.equal(data["target"], raw["target"])  # targets stay in the unit of the reward


@pytest.mark.parametrize(
    ("unit", "level", "expected"),
    [
        # token log-probs (1), (2, 3, 4) | (5, 6), (7); advantages 1, 10 | 100, 1000
        ("sequence", "token", ((1 + 90) / 2 + (1100 + 7000) / 2) / 2),
        ("token", "token", (1 + 90 + 1100 + 7000) / 7),
        ("sequence", "sequence", ((1 + 90) / 2 + (1100 + 7000) / 2) / 2),
        ("token", "sequence", (1 + 90 + 1100 + 7000) / 7),
        ("sequence", "mean", ((1 + 30) / 2 + (550 + 7000) / 2) / 2),
    ],
)
def test_what_a_weighted_loss_is_a_mean_over(unit, level, expected):
    """Responses of 1 and 3, 2 and 1 tokens: over groups, or over all seven tokens."""
    term = Term(source=OnPolicy(samples_per_prompt=2), labeller=Advantage(), objective=o.reinforce,
                unit=unit, level=level)  # fmt: skip
    samples = scored([[1.0, 10.0], [100.0, 1000.0]], lengths=[[1, 3], [2, 1]])
    now = f64([[[-1, 9, 9], [-2, -3, -4]], [[-5, -6, 9], [-7, 9, 9]]])
    batch, _ = term.labeller(samples, {})
    total, _ = loss_sum(term, samples, batch, {"logp": now})
    assert float(total / count(term, samples, batch)) == pytest.approx(expected, abs=1e-12)


STUDY = [
    *(Advantage(baseline=b, whiten=w) for b in ("batch", "running", "leave_one_out", "value")
      for w in ("none", "prompt", "round")),
    Advantage(baseline="value", kl=0.2, kl_estimator="k2"),
    Advantage(shaping=Shaping(standardise="running", limit=1.0), baseline="running"),
    RewardWeights(beta=0.5, kl=0.2, shaping=Shaping(standardise="running")),
]  # fmt: skip


@pytest.mark.parametrize("labeller", STUDY)
def test_each_run_of_a_study_is_labelled_as_alone(labeller):
    runs, n, k, t = 3, 4, 3, 5
    state, alone = {KL_SCALE: f64([0.5, 1.0, 2.0])}, [{KL_SCALE: f64(s)} for s in (0.5, 1.0, 2.0)]
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        x = {f: torch.randn(runs, n, k, t, generator=g) for f in ("logp", "ref_logp", "value")}
        reward = torch.randn(runs, n, k, generator=g).double()
        lengths = torch.randint(1, t + 1, (runs, n, k), generator=g)
        tokens = {f: v.tolist() for f, v in x.items()}
        batch, state = labeller(scored(reward.tolist(), lengths=lengths.tolist(), **tokens), state)
        for r in range(runs):
            own = {f: v[r] for f, v in tokens.items()}
            single = scored(reward[r].tolist(), lengths=lengths[r].tolist(), **own)
            found, alone[r] = labeller(single, alone[r])
            for name, values in found.data.items():
                wide = batch.data[name][r]
                gap = wide.shape[-1] - values.shape[-1]
                values = torch.nn.functional.pad(values, (0, gap))
                torch.testing.assert_close(wide, values, rtol=0, atol=1e-12)


def weights(labeller: RewardWeights, reward: list[list[float]], **more) -> Tensor:
    return labeller(scored(reward, **more), {})[0].data["weight"].squeeze(-2)


def test_reward_weights_by_hand():
    """exp(r / 2), at most 3: (e^0, e^0.5, e^-1, 3)."""
    found = weights(RewardWeights(beta=2.0, max_weight=3.0), [[0.0, 1.0, -2.0, 50.0]])
    expected = f64([[1.0, math.exp(0.5), math.exp(-1.0), 3.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_reward_weights_at_infinite_temperature_are_one():
    assert weights(RewardWeights(beta=math.inf), [[-1e6, 0.0, 3.0, 1e6]]).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("most", [None, 20.0])
def test_reward_weights_never_overflow(most):
    found = weights(RewardWeights(beta=1e-3, max_weight=most), [[1e30, -1e30, 0.0]])
    assert torch.isfinite(found.float()).all() and found[0, 1] == 0 and found[0, 2] == 1
    assert most is None or float(found[0, 0]) == pytest.approx(20.0, rel=1e-12)


def test_reward_weights_take_the_kl_off_first():
    """Reward 1 less 0.5 x 2 is 0: weight 1."""
    found = weights(RewardWeights(beta=0.1, kl=0.5), [[1.0]], logp=[[-1.0]], ref_logp=[[-3.0]])
    assert found.tolist() == [[1.0]]


def test_signs_that_an_advantage_can_have():
    """Never negative only where rewards are known not to be and nothing is taken off them."""
    both, up = [-1.0, 0.0, 1.0], [0.0, 1.0]
    known = (0.0, 10.0)
    assert Advantage().signals() == {"advantage": both}
    assert Advantage(reward_range=known).signals() == {"advantage": up}
    assert Advantage(reward_range=(-0.1, 1.0)).signals() == {"advantage": both}
    for more in ({"kl": 0.1}, {"whiten": "round"}, {"baseline": "running"}):
        assert Advantage(reward_range=known, **more).signals()["advantage"] == both
    assert "target" in Advantage(baseline="value").signals()
    assert min(RewardWeights().signals()["weight"]) >= 0


@pytest.mark.parametrize(
    "shaping", [Shaping(standardise="prompt"), Shaping(standardise="running"),
                Shaping(no_end_penalty=1.0)],
)  # fmt: skip
def test_shaping_can_turn_rewards_negative(shaping):
    """Then a known range of the raw reward says nothing of the advantage's sign."""
    assert -1.0 in Advantage(reward_range=(0.0, 1.0), shaping=shaping).signals()["advantage"]
