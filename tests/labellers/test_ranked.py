"""Labellers that rank: which pairs they make, in which order, and what becomes of ties."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

import tables
from preftune import objectives as o
from preftune import spec
from preftune.errors import UserError
from preftune.labellers import AllPairs, Best, BestWorst, Labeller, RandomPair, Shaping
from preftune.labellers.base import KL_SCALE
from preftune.method import Method
from preftune.rounds import group_terms, refill
from preftune.samples import Batch
from preftune.sources import OnPolicy
from preftune.terms import Term, bind, loss_sum
from tables import scored

PAIRING = (BestWorst, AllPairs, RandomPair)


def pairs(labeller: Labeller, reward: list[list[float]], **more) -> Batch:
    return labeller(scored(reward, **more), {})[0]


def couples_of(batch: Batch) -> list[list[tuple[int, int]]]:
    """Of each prompt, which couples its items are, in the order (lower, higher)."""
    return [[(min(p), max(p)) for p in items] for items in batch.index.tolist()]


def test_best_and_worst_by_hand():
    """Best is place 3 and worst place 1 of (2, -1, 0, 5); of (4, 1, 4, 1) the first of equals."""
    batch = pairs(BestWorst(), [[2.0, -1.0, 0.0, 5.0], [4.0, 1.0, 4.0, 1.0]])
    assert batch.index.tolist() == [[[3, 1]], [[0, 1]]]
    assert batch.roles == ("chosen", "rejected")
    assert batch.keep is not None and batch.keep.tolist() == [[True], [True]]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_all_pairs_are_every_couple_once_the_better_first(k):
    reward = [[(7 * i) % 11 - 3.0 for i in range(k)], [float(-i) for i in range(k)]]
    batch = pairs(AllPairs(), reward)
    count = k * (k - 1) // 2
    assert batch.index.shape == (2, count, 2) and AllPairs().items(k) == count
    for items, values in zip(batch.index.tolist(), reward, strict=True):
        assert {frozenset(p) for p in items} == {
            frozenset(c) for c in itertools.combinations(range(k), 2)
        }
        assert all(values[chosen] > values[rejected] for chosen, rejected in items)


def test_items_that_each_makes_of_k_responses():
    assert [AllPairs().items(k) for k in (2, 3, 4, 8)] == [1, 3, 6, 28]
    assert BestWorst().items(9) == RandomPair().items(9) == Best().items(9) == 1


@pytest.mark.parametrize("labeller", PAIRING)
def test_a_pair_needs_two(labeller):
    assert labeller().least == 2 and labeller().given == 0 and labeller().labelled


def test_a_gap_of_exactly_the_threshold_is_a_tie():
    """Gaps 0.5, 0.75 and 0 against 0.5: only the second is above."""
    reward = [[1.0, 0.5], [0.25, 1.0], [3.0, 3.0]]
    for labeller in PAIRING:
        batch = pairs(labeller(threshold=0.5), reward)
        assert batch.keep is not None and batch.keep.tolist() == [[False], [True], [False]]
        assert batch.index[1].tolist() == [[1, 0]]


def test_without_a_threshold_only_equals_tie():
    batch = pairs(AllPairs(), [[1.0, 1.0, 1.0 + 1e-12]])
    by_couple = dict(zip(couples_of(batch)[0], batch.keep[0].tolist(), strict=True))
    assert by_couple == {(0, 1): False, (0, 2): True, (1, 2): True}


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_ties_that_are_kept_are_half_a_preference(own):
    """Label smoothing 0.5; the other couples have the objective's own. At a threshold of 1
    rewards (0, 1, 3) decide two of three."""
    labeller = AllPairs(ties="keep", threshold=1.0)
    term = Term(source=OnPolicy(samples_per_prompt=3), labeller=labeller, objective=o.dpo,
                settings={"beta": 0.1, "label_smoothing": own})  # fmt: skip
    samples = scored([[0.0, 1.0, 3.0]], ref_logp=[[0.0, 0.0, 0.0]])
    batch, _ = labeller(samples, {})
    bound = bind(term, samples, batch, {"logp": torch.zeros(1, 3, 1, dtype=torch.float64)})
    by_couple = dict(zip(couples_of(batch)[0], bound["label_smoothing"][0].tolist(), strict=True))
    assert batch.keep is None and by_couple == {(0, 1): 0.5, (0, 2): own, (1, 2): own}
    dropped = pairs(AllPairs(threshold=1.0), [[0.0, 1.0, 3.0]])
    assert "label_smoothing" not in dropped.data
    assert dropped.keep.tolist() == [[False, True, True]]


def test_of_equals_the_best_and_the_worst_are_two_responses():
    """A tie that is kept pulls the margin to 0: log-ratios (1, -2) at beta 0.1 have the gradient
    0.1 (s(0.3) - 1/2) and its opposite; one response against itself would have none."""
    labeller = BestWorst(ties="keep")
    term = Term(source=OnPolicy(samples_per_prompt=3), labeller=labeller, objective=o.dpo,
                settings={"beta": 0.1})  # fmt: skip
    samples = scored([[2.0, 2.0, 2.0], [2.0, 1.0, 2.0]], ref_logp=[[0.0, 0.0, 0.0]] * 2)
    batch, _ = labeller(samples, {})
    assert batch.index.tolist() == [[[0, 2]], [[0, 1]]]
    logp = torch.tensor([[[1.0], [9.0], [-2.0]], [[0.0]] * 3], dtype=torch.float64)
    total, _ = loss_sum(term, samples, batch, {"logp": logp.requires_grad_()})
    total.backward()
    assert logp.grad is not None
    expected = 0.1 * (1 / (1 + math.exp(-0.3)) - 0.5)
    torch.testing.assert_close(logp.grad[0, :, 0], tables.f64([expected, 0.0, -expected]))


@pytest.mark.parametrize("objective", [o.ipo, o.simpo])
def test_ties_cannot_be_kept_by_an_objective_without_label_smoothing(objective):
    """It would take the first of two equals for the better one."""
    settings = {"tau": 0.1} if objective is o.ipo else {"beta": 2.0, "gamma": 1.0}
    term = Term(source=OnPolicy(samples_per_prompt=3), labeller=AllPairs(ties="keep"),
                objective=objective, settings=settings)  # fmt: skip
    with pytest.raises(UserError, match="ties"):
        spec.check_term("terms.0", term)


def test_kl_in_the_reward_changes_the_order():
    """Rewards (2, 1.5), log-ratios (3, 0.5), kl 0.4: 2 - 1.2 = 0.8 against 1.5 - 0.2 = 1.3."""
    round_ = {"logp": [[-1.0, -2.0]], "ref_logp": [[-4.0, -2.5]]}
    for labeller in PAIRING:
        assert pairs(labeller(), [[2.0, 1.5]], **round_).index.tolist() == [[[0, 1]]]
        assert pairs(labeller(kl=0.4), [[2.0, 1.5]], **round_).index.tolist() == [[[1, 0]]]
        assert labeller().needs == {"reward"}
        assert labeller(kl=0.4).needs == {"reward", "logp", "ref_logp"}
    assert Best(kl=0.4)(scored([[2.0, 1.5]], **round_), {})[0].index.tolist() == [[[1]]]


def test_the_budgets_scale_multiplies_the_kl_of_a_ranking():
    """kl 0.1: 2 - 0.3 = 1.7 > 1.45. Scaled by 4: 2 - 1.2 = 0.8 < 1.3."""
    round_ = scored([[2.0, 1.5]], logp=[[-1.0, -2.0]], ref_logp=[[-4.0, -2.5]])
    for scale, order in ((1.0, [0, 1]), (4.0, [1, 0])):
        state = {KL_SCALE: torch.tensor(scale, dtype=torch.float64)}
        batch, after = BestWorst(kl=0.1)(round_, state)
        assert batch.index.tolist() == [[order]]
        assert after[KL_SCALE] == scale


def test_the_kl_is_of_the_response_without_its_padding():
    """Log-ratios 1 + 1 = 2 and 0.5; what stands behind the end of the second must not count."""
    round_ = scored(
        [[1.0, 1.0]],
        logp=[[[-1.0, -1.0], [-1.0, 99.0]]],
        ref_logp=[[[-2.0, -2.0], [-1.5, -99.0]]],
        lengths=[[2, 1]],
    )
    assert BestWorst(kl=1.0)(round_, {})[0].index.tolist() == [[[1, 0]]]


def test_shaping_comes_before_the_comparison():
    """Limited to 2, (5, 9, 1) is (2, 2, 1): the first best, and a tie of 0 and 1."""
    limited = Shaping(limit=2.0)
    assert Best(shaping=limited)(scored([[5.0, 9.0, 1.0]]), {})[0].index.tolist() == [[[0]]]
    batch = pairs(AllPairs(shaping=limited), [[5.0, 9.0, 1.0]])
    assert dict(zip(couples_of(batch)[0], batch.keep[0].tolist(), strict=True))[(0, 1)] is False


def test_a_cut_response_pays_before_it_is_ranked():
    round_ = scored([[3.0, 2.0]], finished=[[False, True]])
    penal = Shaping(no_end_penalty=1.5)
    assert Best(shaping=penal)(round_, {})[0].index.tolist() == [[[1]]]
    assert Best()(round_, {})[0].index.tolist() == [[[0]]]


def test_best_and_worst_of_n_and_of_equals_the_first():
    round_ = scored([[1.0, 4.0, 4.0, -2.0], [0.0, -7.0, -7.0, -1.0]])
    best, worst = Best()(round_, {})[0], Best(worst=True)(round_, {})[0]
    assert best.index.tolist() == [[[1]], [[0]]] and best.roles == () and best.keep is None
    assert worst.index.tolist() == [[[3]], [[1]]]
    assert Best().least == 2


def test_a_random_pair_is_drawn_uniformly():
    """Six couples of four, 6000 draws: each within 4 standard errors of 1000."""
    batch = pairs(RandomPair(), [[0.0, 1.0, 2.0, 3.0]] * 6000)
    found = Counter(items[0] for items in couples_of(batch))
    assert set(found) == set(itertools.combinations(range(4), 2))
    error = math.sqrt(6000 * (1 / 6) * (5 / 6))
    assert all(abs(n - 1000) < 4 * error for n in found.values())
    assert all(chosen > rejected for ((chosen, rejected),) in batch.index.tolist())


def test_a_random_pair_is_new_each_round_and_repeats_from_its_state():
    round_ = scored([[0.0, 1.0, 2.0, 3.0, 4.0]] * 40)
    labeller, state, seen = RandomPair(), {}, []
    for _ in range(3):
        batch, state = labeller(round_, state)
        seen.append(batch.index)
    assert int(state["rounds"]) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    again, _ = labeller(round_, {"rounds": torch.tensor(1)})
    assert torch.equal(again.index, seen[1])


def test_a_random_pair_has_draws_of_its_own_for_each_prompt():
    batch = pairs(RandomPair(), [[0.0, 1.0, 2.0, 3.0]] * 50)
    assert len({items[0] for items in couples_of(batch)}) == 6


def test_a_random_pair_follows_the_seed_of_the_run():
    """Draws are functions of (seed, stream, counter): another seed pairs other places."""
    term = tables.row_of("on_policy_dpo", samples_per_prompt=8).terms[0]
    drawn = []
    for seed in (0, 1):
        row = Method(name="x", terms=(replace(term, labeller=RandomPair()),))
        (group,) = group_terms(row)
        refill(group, tables.make_world("dpo", seed=seed, batch_size=6), 0)
        drawn.append(couples_of(group.round.batches[0]))
    assert drawn[0] != drawn[1]


REWARDS, SCALE = (0.0, 1.0, 3.0), 0.7


def _joint(values: tuple[float, ...], scale: float) -> dict[tuple[int, int], float]:
    """2 + e^d + e^-d of each couple, normalised; and that it is 1 / (s(d) s(-d))."""
    weight = {}
    for i, j in itertools.combinations(range(len(values)), 2):
        d = scale * (values[i] - values[j])
        weight[i, j] = 2 + math.exp(d) + math.exp(-d)
        s = 1 / (1 + math.exp(-d))
        assert weight[i, j] == pytest.approx(1 / (s * (1 - s)), rel=1e-12)
    total = sum(weight.values())
    return {c: w / total for c, w in weight.items()}


@pytest.mark.parametrize("by", ["reward", "log_ratio"])
def test_the_mixture_draws_couples_by_their_distance(by):
    """Mix-R and Mix-P: couples of (0, 1, 3) at scale 0.7, with probability in proportion to
    2 + e^d + e^-d, within 4 standard errors of 8000 draws."""
    n = 8000
    if by == "reward":
        round_ = scored([list(REWARDS)] * n, logp=[[0.0] * 3] * n, ref_logp=[[0.0] * 3] * n)
    else:  # the reward then only says which one is better
        round_ = scored([[3.0, 2.0, 1.0]] * n, logp=[list(REWARDS)] * n, ref_logp=[[0.0] * 3] * n)
    labeller = RandomPair(mix=by, mix_scale=SCALE)
    assert labeller.needs == ({"reward"} if by == "reward" else {"reward", "logp", "ref_logp"})
    found = Counter(items[0] for items in couples_of(labeller(round_, {})[0]))
    for couple, p in _joint(REWARDS, SCALE).items():
        assert abs(found[couple] - n * p) < 4 * math.sqrt(n * p * (1 - p)), (couple, p)


def test_a_mixture_of_far_rewards_stays_finite():
    """Differences of thousands: the farthest couple, and of two as far both."""
    batch = pairs(RandomPair(mix="reward"), [[0.0, 5000.0, -4000.0]] * 50)
    assert {items[0] for items in couples_of(batch)} == {(1, 2)}
    batch = pairs(RandomPair(mix="reward"), [[0.0, 9000.0, 9000.0]] * 50)
    assert {items[0] for items in couples_of(batch)} == {(0, 1), (0, 2)}


@pytest.mark.parametrize(
    "labeller",
    [
        BestWorst(threshold=0.5),
        AllPairs(ties="keep"),
        AllPairs(kl=0.3),
        RandomPair(kl=0.3),
        RandomPair(mix="reward"),
        RandomPair(mix="log_ratio"),
        Best(kl=0.3),
        Best(worst=True, shaping=Shaping(standardise="prompt", limit=0.7)),
        BestWorst(shaping=Shaping(standardise="running")),
    ],
)
def test_each_run_of_a_study_is_labelled_as_alone(labeller):
    """Two rounds of shape [R, N, K]: what run r gets is what it would get by itself."""
    runs, n, k = 3, 5, 4
    rounds = [
        scored(
            (torch.randint(0, 4, (runs, n, k), generator=g).double() * 0.5).tolist(),
            logp=torch.randn(runs, n, k, generator=g).tolist(),
            ref_logp=torch.randn(runs, n, k, generator=g).tolist(),
        )
        for g in (torch.Generator().manual_seed(s) for s in (1, 2))
    ]
    state, alone = {}, [{} for _ in range(runs)]
    for round_ in rounds:
        batch, state = labeller(round_, state)
        for r in range(runs):
            single = scored(
                round_.reward[r].tolist(),
                logp=round_.logp[r].tolist(),
                ref_logp=round_.ref_logp[r].tolist(),
            )
            own, alone[r] = labeller(single, alone[r])
            assert torch.equal(batch.index[r], own.index)
            assert (batch.keep is None) == (own.keep is None)
            assert own.keep is None or torch.equal(batch.keep[r], own.keep)
            for name, x in own.data.items():
                assert torch.equal(batch.data[name][r].nan_to_num(), x.nan_to_num())
