"""The laboratory's problems: what they draw, what they judge, and figures against enumeration."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from preftune import loop
from preftune.cells import Problem
from preftune.policies.tree import Tree
from preftune.problems import arms, tokens, words
from preftune.problems.arms import Arms, States
from preftune.problems.bandit import REWARDS, Peak, Peaks, reference_probs
from preftune.problems.drawn import reward_at
from preftune.problems.tokens import Tokens
from preftune.problems.unseen import Unseen
from preftune.problems.words import Words
from preftune.reproduce import rows
from preftune.study import one_thread
from preftune.theory.closed_form import kl, tilted
from preftune.theory.linear_reward import fit_linear_reward

pytestmark = pytest.mark.long

SEEDS = (4, 9)


def started(problem: Problem, method=None) -> loop.State:
    method = method or rows.fresh_pairs(0.1)
    settings = loop.Settings(max_steps=3, learning_rate=1e-2)
    with one_thread():
        return loop.start(method, problem.world(method, SEEDS, 4, None), settings)


def moved(run: loop.State) -> loop.State:
    with torch.no_grad():
        for i, p in enumerate(run.world.policy.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return run


@pytest.mark.parametrize(
    "problem", [Arms(), States(states=4), Tokens(prompts=4), Words(pairs=16),
                Unseen(arms=12, seen=6, reward_range=1.0, pairs=16)],
    ids=lambda p: type(p).__name__,
)  # fmt: skip
def test_a_policy_starts_at_its_reference(problem: Problem) -> None:
    run = started(problem)
    assert isinstance(problem, Problem) and run.world.policy.batch_shape == (2,)
    found = problem.evaluate(run)
    assert all(v.shape == (2,) for v in found.values())
    if "reverse_kl" in found:
        assert bool((found["reverse_kl"] == 0).all())
    after = problem.evaluate(moved(run))
    assert any(not torch.equal(found[k], after[k]) for k in found)


def test_arms_start_at_the_closed_form() -> None:
    run = started(Arms(rows=5000, responses=4), rows.dpo(rows.kept(4), 0.1))
    assert isinstance(run.world.policy, Tree)
    p = run.world.policy.log_joint().exp()[:, 0].double()
    torch.testing.assert_close(p[1], reference_probs(), rtol=1e-5, atol=1e-7)
    drawn = run.world.data.samples(torch.arange(5000)).tokens  # type: ignore[union-attr]
    for r in range(2):
        share = torch.bincount(drawn[r].flatten(), minlength=100) / drawn[r].numel()
        assert float((share - reference_probs()).abs().max()) < 7e-3
    assert not torch.equal(drawn[0], drawn[1])
    exact = Arms().evaluate(run)
    assert float(exact["reward"][0]) == pytest.approx(0.039, abs=1e-4)


def test_several_modes_and_the_mass_near_each() -> None:
    problem = Arms(modes=Peaks((Peak(20, 5), Peak(70, 5))))
    run = started(problem)
    found, p = problem.evaluate(run), reference_probs()
    assert float(found["mass_0"][0]) == pytest.approx(float(p[15:26].sum()), rel=1e-4)
    assert float(found["mass_1"][0]) == pytest.approx(float(p[65:76].sum()), rel=1e-4)


def test_the_network_learns_the_reference() -> None:
    """The rest of the mass away from the closed form, and states held apart."""
    problem = States(states=8)
    run = started(problem)
    found = problem.evaluate(run)
    assert (found["entropy"] - 4.117).abs().max() < 0.15
    assert (found["reward"] - 0.039).abs().max() < 0.02
    other = arms._pretrained(SEEDS[::-1])
    for a, b in zip(arms._pretrained(SEEDS), other, strict=True):
        assert torch.equal(a, b.flip(0)), "a function of the run's seed"


def test_where_the_mass_went_by_hand() -> None:
    """Five arms, samples 0 (best), 3, 3: similar within one is 1; 2 and 4 are others."""
    ref = torch.tensor([[[0.2, 0.2, 0.2, 0.2, 0.2]]]).log()
    now = torch.tensor([[[0.3, 0.25, 0.2, 0.05, 0.2]]]).log()
    reward = torch.tensor([1.0, 0.9, 0.0, 0.1, 0.0])
    found = arms._moved(now, ref, torch.tensor([[[0, 3, 3]]]), reward, similar=1)
    assert float(found["gained_chosen"]) == pytest.approx(0.1)
    assert float(found["gained_similar"]) == pytest.approx(0.05)
    assert float(found["gained_rejected"]) == pytest.approx(-0.15)
    assert float(found["gained_other"]) == pytest.approx(0.0, abs=1e-7)
    assert float(found["h_best"]) == pytest.approx(float(torch.tensor(1.5).log()))
    assert float(found["h_others"]) == pytest.approx(float(torch.tensor(0.25).log()))


def test_tokens_are_judged_without_the_noise_of_the_last_draw() -> None:
    """Reward from exact next tokens agrees with plain sampling, with less spread."""
    problem = Tokens(prompts=4)
    run = moved(started(problem))
    assert run.world.reward is not None
    prompt = tokens._prompts(SEEDS, "judged", 100)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    policy = run.world.policy
    plain = []
    for n in range(6):
        drawn = policy.sample(prompt, mask, 8, tokens.draws(SEEDS, "more", n), 0)
        plain.append(run.world.reward(drawn))
    sampled = torch.cat(plain, -1)  # type: ignore[arg-type]
    assert isinstance(sampled, Tensor)
    error = sampled.double().flatten(1).std(-1) / sampled[0].numel() ** 0.5
    found = problem.evaluate(run)["reward"]
    assert bool(((found - sampled.double().mean((-2, -1))).abs() < 6 * error + 0.004).all())
    vector = Tokens(prompts=4, reward="r1")
    judged = vector.world(rows.fresh_pairs(0.1), SEEDS, 4).reward
    assert judged is not None
    value = judged(drawn)
    assert isinstance(value, Tensor) and value.shape == (2, 100, 8) and bool((value <= 1).all())


def test_words_have_a_rare_token_and_a_bounded_reward() -> None:
    reward, ref = words.true_reward(SEEDS), words.reference_log_probs(SEEDS)
    rare = words._has_rare()
    assert int(rare.sum()) == 6**3 - 5**3 and bool((reward[..., rare] == -2).all())
    assert float(reward.abs().max()) == 2.0
    assert float(ref.exp()[..., rare].sum(-1).mean()) < 0.02
    assert float(kl(words.energies(SEEDS), ref).mean()) < 0.3
    covered = words.pair_law("covered", ref, reward, 1.0)
    assert float(covered[..., rare].sum()) == 0.0
    torch.testing.assert_close(covered.sum(-1), torch.ones(2, 8, dtype=torch.float64))
    expert = words.pair_law("expert", ref, reward, 0.3)
    ratio = expert[0, 0, 3].log() - expert[0, 0, 4].log()
    assert float(ratio) == pytest.approx(float(reward[0, 0, 3] - reward[0, 0, 4]) / 0.3)


def test_pairs_of_words_are_labelled_by_bradley_terry() -> None:
    reward, ref = words.true_reward(SEEDS), words.reference_log_probs(SEEDS)
    law = words.pair_law("uniform", ref, reward, 1.0)
    prompt, both = words.draw_pairs(law, reward, 40_000, SEEDS)
    own = reward[0, prompt[0]].gather(-1, both[0])
    gap = own[:, 0] - own[:, 1]  # of the chosen over the rejected
    for low, high in ((0.2, 0.6), (0.6, 1.2), (1.2, 2.4)):
        near = (gap.abs() > low) & (gap.abs() < high)
        expected = torch.sigmoid(gap[near].abs()).mean()
        share = (gap[near] > 0).double().mean()
        assert abs(float(share - expected)) < 4 * 0.5 / int(near.sum()) ** 0.5
    share = torch.bincount(both.flatten(), minlength=216) / both.numel()
    assert float((share - 1 / 216).abs().max()) < 6e-4
    few_prompt, few = words.draw_pairs(law, reward, 24, SEEDS)
    assert torch.equal(few, both[:, :24]) and torch.equal(few_prompt, prompt[:, :24])


def test_a_ranking_of_noisy_rewards_is_bradley_terry() -> None:
    """Fresh samples: the reward plus Gumbel noise, anew at each update."""
    problem = Words()
    run = started(problem)
    world = run.world
    prompt = (torch.arange(4000) % 8)[:, None].expand(2, -1, 1)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    drawn = world.policy.sample(prompt, mask, 2, tokens.draws(SEEDS, "pairs"), 3)
    assert world.reward is not None
    noisy = world.reward(drawn)
    assert isinstance(noisy, Tensor)
    gap = reward_at(words.true_reward(SEEDS), drawn, words.VOCAB).diff(dim=-1).squeeze(-1)
    won = noisy.diff(dim=-1).squeeze(-1) > 0
    for r in range(2):
        near = gap[r].abs() > 0.3
        share = torch.where(gap[r] > 0, won[r], ~won[r])[near].double().mean()
        assert float(share) == pytest.approx(
            float(torch.sigmoid(gap[r][near].abs()).mean()), abs=0.03
        )
    again = world.reward(replace(drawn, origin=drawn.origin + 1))
    assert isinstance(again, Tensor) and not torch.equal(again, noisy)


def test_the_worth_of_a_policy_by_enumeration() -> None:
    reward, ref = words.true_reward(SEEDS), words.reference_log_probs(SEEDS)
    best = tilted(ref, reward, 0.1)
    found = words.worth(best, ref, reward, 0.1)
    assert bool((found["suboptimality"].abs() < 1e-12).all())
    plain = sum(
        float(best[0, s, a].exp() * (reward[0, s, a] - 0.1 * (best[0, s, a] - ref[0, s, a])))
        for s in range(8) for a in range(216)
    ) / 8  # fmt: skip
    assert float(found["value"][0]) == pytest.approx(plain)
    other = words.worth(ref, ref, reward, 0.1)
    assert bool((other["suboptimality"] > 0.1).all()) and bool((other["reverse_kl"] == 0).all())


def test_a_reward_is_learned_from_its_own_pairs() -> None:
    """The maximum of the likelihood: no gradient is left, and many pairs give the true reward."""
    reward, ref = words.true_reward(SEEDS), words.reference_log_probs(SEEDS)
    law = words.pair_law("uniform", ref, reward, 1.0)
    seen = words.features()
    prompt, both = words.draw_pairs(law, reward, 200_000, SEEDS)
    wins = words.counts(prompt, both)
    assert int(wins.sum()) == 2 * 200_000
    found = fit_linear_reward(seen, wins[:1, :1], 1e-3)[0, 0]
    share = wins[0, 0] / wins[0, 0].sum()
    pull = share * torch.sigmoid(found[None, :] - found[:, None])
    slope = seen.T @ (pull.sum(0) - pull.sum(1))
    # ridge * w = -slope, and the ridge leaves w nothing in the null space of the features.
    # (lstsq takes the features for full rank on some processors: not the shortest w there.)
    weight = torch.linalg.pinv(seen) @ found
    torch.testing.assert_close(slope, -1e-3 * weight, rtol=1e-6, atol=1e-10)
    true = reward[0, 0] - reward[0, 0].mean()
    plain = ~words._has_rare()
    assert float(torch.corrcoef(torch.stack([found[plain], true[plain]]))[0, 1]) > 0.9


def test_unseen_arms_are_in_no_pair() -> None:
    problem = Unseen(arms=12, seen=5, reward_range=3.0, pairs=400, anti=2.0)
    run = started(problem, rows.given_pairs(0.1))
    drawn = run.world.data.samples(torch.arange(400)).tokens  # type: ignore[union-attr]
    assert int(drawn.max()) == 4
    mass = problem.evaluate(run)["mass_unseen"]
    assert isinstance(run.world.policy, Tree)
    p = run.world.policy.log_joint().exp()[:, 0]
    torch.testing.assert_close(mass, p[:, 5:].sum(-1).double(), rtol=1e-6, atol=1e-8)
    assert REWARDS["r4"]()[70] == 1.0
