"""Expected gradients, exact: every tuple of samples of a small table, weighed by its probability.

Each tuple goes through the loop's own `gradient` as the whole first round, so labeller, binding,
masking and mean are all in what is measured.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import tables
from preftune import objectives as o
from preftune.labellers import Advantage, Best, BestWorst, Labeller, RewardWeights, Unlabelled
from preftune.method import Method
from preftune.policies.categorical import Categorical
from preftune.rounds import World, group_terms
from preftune.samples import Samples
from preftune.sources import OnPolicy
from preftune.terms import Objective, Term
from preftune.theory.closed_form import tilted
from tables import f64, logits

ARMS = 3
REWARD = f64([0.3, -1.2, 2.0])


def make(policy: Tensor | None = None, states: int = 1) -> World:
    start, anchor = logits(5, states, ARMS), logits(6, states, ARMS)
    return World(
        policy=Categorical(start if policy is None else policy), reference=Categorical(anchor),
        data=None, prompts=None, reward=None, seed=0, batch_size=8, micro_batch_tokens=None,
    )  # fmt: skip


def one(
    labeller: Labeller, objective: Objective, k: int, level: str = "sequence", **more
) -> Method:
    source = OnPolicy(samples_per_prompt=k)
    term = Term(
        source=source, labeller=labeller, objective=objective, level=level, settings=more
    )  # fmt: skip
    return Method(name="x", terms=(term,))


def round_of(arms: tuple[int, ...], states: int, k: int) -> Samples:
    tokens = torch.tensor(arms).view(states, k, 1)
    prompt = torch.arange(states)[:, None]
    return Samples(
        prompt=prompt, prompt_mask=torch.ones_like(prompt, dtype=torch.bool), tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        finished=torch.ones(states, k, dtype=torch.bool),
        origin=torch.zeros(states, k, dtype=torch.long), row=prompt[:, 0],
        reward=REWARD[tokens.squeeze(-1)],
    )  # fmt: skip


def expected(row: Method, world: World, k: int = 2, states: int = 1) -> tuple[Tensor, float]:
    """The exact mean of the gradient and of the loss."""
    p = world.policy.logits.detach().softmax(-1).tolist()
    total, value = torch.zeros(states, ARMS, dtype=torch.float64), 0.0
    for arms in itertools.product(range(ARMS), repeat=states * k):
        chance = math.prod(p[i // k][a] for i, a in enumerate(arms))
        world.policy.logits.grad = None
        loss, _ = tables.gradient(group_terms(row), world, 0, round_of(arms, states, k))
        if loss is not None:
            total += chance * world.policy.logits.grad
            value += chance * float(loss)
    return total, value


def exact(world: World, kl: float = 0.0) -> Tensor:
    """Gradient of -(E reward - kl KL(policy || reference)), the mean over states."""
    z = world.policy.logits
    logp, ref = z.log_softmax(-1), world.reference.logits.detach().log_softmax(-1)
    goal = (logp.exp() * (REWARD - kl * (logp - ref))).sum(-1).mean()
    return torch.autograd.grad(-goal, z)[0]


def exact_kl(world: World, forward: bool = False) -> tuple[Tensor, float]:
    z = world.policy.logits
    logp, ref = z.log_softmax(-1), world.reference.logits.detach().log_softmax(-1)
    kl = ((ref.exp() * (ref - logp)) if forward else (logp.exp() * (logp - ref))).sum()
    return torch.autograd.grad(kl, z)[0], float(kl.detach())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "batch", "running"])
def test_a_baseline_that_leaves_the_sample_out_is_unbiased(baseline, k):
    world = make()
    close(expected(one(Advantage(baseline=baseline), o.reinforce, k), world, k)[0], exact(world))


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch"])
def test_unbiased_over_two_prompts(baseline):
    """All 81 rounds of two prompts with two samples each."""
    world = make(states=2)
    found, _ = expected(one(Advantage(baseline=baseline), o.reinforce, 2), world, 2, states=2)
    close(found, exact(world))


@pytest.mark.parametrize("k", [2, 3])
def test_the_prompts_own_mean_scales_the_gradient(k):
    """With the sample itself in the mean: (K - 1) / K of it."""
    world = make()
    found, _ = expected(one(Advantage(baseline="prompt"), o.reinforce, k), world, k)
    close(found, (k - 1) / k * exact(world))


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_clipped_policy_gradient_before_the_first_step(level):
    """At ratio 1 its expected gradient is the exact one."""
    world = make()
    row = one(Advantage(baseline="leave_one_out"), o.ppo_clip, 2, level, clip=0.2)
    close(expected(row, world)[0], exact(world))


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_kl_in_the_reward_has_the_kls_gradient(baseline):
    world = make()
    row = one(Advantage(baseline=baseline, kl=0.7), o.reinforce, 2)
    close(expected(row, world)[0], exact(world, kl=0.7))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_in_the_reward_have_another(estimator):
    world = make()
    row = one(Advantage(baseline="leave_one_out", kl=0.7, kl_estimator=estimator), o.reinforce, 2)
    assert (expected(row, world)[0] - exact(world, kl=0.7)).abs().max() > 0.01


@pytest.mark.parametrize("kl", [0.5, 2.0])
def test_the_optimum_under_a_kl_is_the_tilted_reference(kl):
    """There, and not beside it, the expected gradient of RLOO with the KL in its reward is 0."""
    row = one(Advantage(baseline="leave_one_out", kl=kl), o.reinforce, 2)
    best = tilted(make().reference.logits.detach(), REWARD, kl)
    close(expected(row, make(best))[0], torch.zeros_like(best))
    assert expected(row, make(0.5 * best))[0].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("baseline", "k"), [("leave_one_out", 2), ("leave_one_out", 3), ("none", 2)]
)
def test_the_kl_term_has_the_value_and_gradient_of_the_kl(baseline, k):
    world = make()
    found, value = expected(one(Unlabelled(baseline=baseline), o.reverse_kl, k), world, k)
    gradient, kl = exact_kl(world)
    close(found, gradient)
    assert value == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("drawn", [(0, 1), (2, 2), (1, 2)])
def test_the_kl_term_on_one_pair_of_samples(drawn):
    """Each weighs by its log-ratio less the other's: mean of (l_j - l_i) (e_j - p) by hand. A wrong
    sign of the baseline would not show in the mean over all pairs."""
    world = make()
    p = world.policy.logits.detach().softmax(-1)[0].tolist()
    h = (world.policy.logits.log_softmax(-1) - world.reference.logits.log_softmax(-1))[0].tolist()
    tables.gradient(
        group_terms(one(Unlabelled(), o.reverse_kl, 2)), world, 0, round_of(drawn, 1, 2)
    )
    by_hand = [0.0] * ARMS
    for own, other in (drawn, drawn[::-1]):
        for arm in range(ARMS):
            by_hand[arm] += (h[own] - h[other]) * ((arm == own) - p[arm]) / 2
    close(world.policy.logits.grad, f64([by_hand]))


def test_k2_as_a_loss_has_that_gradient_and_k1_has_none():
    """k1 reports the KL and does nothing about it; k3 has the gradient of the forward KL."""
    world = make()
    found = {
        e: expected(one(Unlabelled(baseline="none"), o.kl_loss, 2, estimator=e), world)
        for e in ("k1", "k2", "k3")
    }
    gradient, kl = exact_kl(world)
    forward, _ = exact_kl(world, forward=True)
    close(found["k2"][0], gradient)
    close(found["k1"][0], torch.zeros_like(gradient))
    assert found["k1"][1] == pytest.approx(kl, abs=1e-12)
    assert found["k3"][1] == pytest.approx(kl, abs=1e-12)
    close(found["k3"][0], forward)
    assert (forward - gradient).abs().max() > 0.01


def test_reward_weights_tilt_the_policy():
    """Mean gradient of -w log p: p (E w - w), w = min(e^(r / 2), 1.5)."""
    world = make()
    p = world.policy.logits.detach().softmax(-1)
    w = f64([min(math.exp(r / 2), 1.5) for r in REWARD.tolist()])
    row = one(RewardWeights(beta=2.0, max_weight=1.5), o.weighted_nll, 2)
    close(expected(row, world)[0], p * ((p * w).sum() - w))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("worst", [False, True])
def test_best_of_n_imitates_the_distribution_of_the_best(k, worst):
    """P(best <= r) = P(one <= r)^N: the mean gradient is p less that distribution."""
    world = make()
    p = world.policy.logits.detach().softmax(-1)[0].tolist()
    order = sorted(range(ARMS), key=lambda a: float(REWARD[a]), reverse=worst)
    best, below = [0.0] * ARMS, 0.0
    for arm in order:
        best[arm] = (below + p[arm]) ** k - below**k
        below += p[arm]
    row = one(Best(worst=worst), o.nll, k)
    close(expected(row, world, k)[0], f64([p]) - f64([best]))


def test_pairs_of_fresh_samples_at_the_reference():
    """DPO there pushes each couple apart by beta / 2, drawn with probability 2 p_w p_l; a tie of a
    sample with itself makes no update."""
    world = make(make().reference.logits)
    p = world.policy.logits.detach().softmax(-1)[0].tolist()
    by_hand = [0.0] * ARMS
    for w, lost in itertools.permutations(range(ARMS), 2):
        if REWARD[w] > REWARD[lost]:
            push = 0.4 / 2 * 2 * p[w] * p[lost]
            by_hand[w] -= push
            by_hand[lost] += push
    row = one(BestWorst(), o.dpo, 2, beta=0.4)
    close(expected(row, world)[0], f64([by_hand]))
