"""Pair accuracy, ranks among samples, reward quantiles and best-of-n's reach."""

import itertools

import pytest
import torch
from enumerable import gen, holds, population, prompts, sample, uniform
from torch import Tensor

from preftune.estimators import ranks
from preftune.estimators.estimate import Estimate

P = population()
KINDS = len(P.reward)


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_pair_accuracy_by_hand() -> None:
    """Higher, lower, the same, higher: 2.5 of 4; margins 2, -1, 0, 3."""
    found = ranks.reference_pair_accuracy(f64(-1, -4, -2, -5), f64(-3, -3, -2, -8))
    assert found.accuracy.value == 0.625 and found.margin.value == 1.0


def test_pair_accuracy_is_held() -> None:
    """Pairs from the reference, the one of the higher reward chosen."""
    p = P.log_ref.exp()
    both = p[:, :, None] * p[:, None, :]
    higher = torch.sign(P.log_ref[:, :, None] - P.log_ref[:, None, :])
    better = torch.sign(P.reward[:, :, None] - P.reward[:, None, :])
    exact = 0.5 + 0.5 * (both * higher * better).sum((1, 2)).mean().item()

    def estimate(g: torch.Generator) -> Estimate:
        i = prompts(g, KINDS, 60)
        y = sample(g, P.log_ref[i], 2)
        s, r = P.log_ref[i].gather(1, y), P.reward[i].gather(1, y)
        first = (r[:, 0] >= r[:, 1])[:, None]
        s = s.where(first, s.flip(1))
        return ranks.reference_pair_accuracy(s[:, 0], s[:, 1]).accuracy

    assert exact > 0.55
    holds(estimate, exact)


def test_pit_by_hand() -> None:
    """Among (-5, -3, -3, -1), -3 has one below and two ties: places 2, 3, 4 of 5, so u = 0, ½ and
    nearly 1 give 1/5, (1 + 1.5)/5 and nearly 4/5. Without the last sample, of 4 places."""
    samples = f64(-5, -3, -3, -1).expand(3, 4)
    logp, u = f64(-3, -3, -3), f64(0, 0.5, 1 - 1e-12)
    assert ranks.pit(logp, samples, u).tolist() == pytest.approx([0.2, 0.5, 0.8])
    keep = torch.tensor([True, True, True, False]).expand(3, 4)
    assert ranks.pit(logp, samples, u, keep).tolist() == pytest.approx([0.25, 0.625, 1.0])


def test_the_same_text_ties_by_hand() -> None:
    """The second and third of (-5, -3.01, -2.99, -1) are the response, whose log-prob came out as
    -3: ties as they are above, by token ids."""
    samples = f64(-5, -3.01, -2.99, -1).expand(3, 4)
    logp, u = f64(-3, -3, -3), f64(0, 0.5, 1 - 1e-12)
    same = torch.tensor([False, True, True, False]).expand(3, 4)
    assert ranks.pit(logp, samples, u, same=same).tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert ranks.pit_ranks(logp, samples, u, same=same).rank.tolist() == pytest.approx(
        [0.2, 0.5, 0.8]
    )
    n = torch.ones(3, 4, dtype=torch.long)
    like = ranks.length_matched_ranks(logp, n[:, 0], samples, n, u, same=same)
    assert like.rank.tolist() == pytest.approx([0.2, 0.5, 0.8])


def test_ranks_of_own_samples_are_uniform_with_many_ties() -> None:
    """Responses are drawn from 60, and rounded to 4 values: most samples tie."""
    g = gen(0)
    i = prompts(g, KINDS, 4000)
    s = (P.log_ref[i].gather(1, sample(g, P.log_ref[i], 9)) / 2).round()
    found = ranks.pit_ranks(s[:, 0], s[:, 1:], uniform(g, 4000))
    counts = torch.histc(found.rank, 9, 0, 1) / 4000
    assert counts.tolist() == pytest.approx([1 / 9] * 9, abs=0.02)
    for one in (found.lowest, found.highest):
        assert one.low is not None and one.high is not None and one.low < found.null < one.high


@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_null_share_is_held(end: str) -> None:
    def estimate(g: torch.Generator) -> Estimate:
        i = prompts(g, KINDS, 80)
        s = P.log_ref[i].gather(1, sample(g, P.log_ref[i], 9))
        return getattr(ranks.pit_ranks(s[:, 0], s[:, 1:], uniform(g, 80)), end)

    holds(estimate, 1 / 9)


def matched(g: torch.Generator, count: int, m: int, factor: float) -> ranks.PitRanks:
    i = prompts(g, KINDS, count)
    y = sample(g, P.log_ref[i], m + 1)
    s, n = P.log_ref[i].gather(1, y), P.length[i].gather(1, y)
    u = uniform(g, count)
    return ranks.length_matched_ranks(s[:, 0], n[:, 0], s[:, 1:], n[:, 1:], u, factor)


def test_length_matched_ranks() -> None:
    """Data of a constant long length, otherwise as likely as any: at the bottom by log-prob alone,
    not among samples of like length."""
    g = gen(1)
    length = torch.randint(5, 40, (300, 65), generator=g)
    length[:, 0] = 36
    s = -1.0 * length + 2 * torch.randn(300, 65, generator=g)
    u = uniform(g, 300)
    plain = ranks.pit_ranks(s[:, 0], s[:, 1:], u)
    like = ranks.length_matched_ranks(
        s[:, 0], length[:, 0], s[:, 1:], length[:, 1:], u, factor=1.03
    )
    assert plain.rank.mean() < 0.2 and like.rank.nanmean().item() == pytest.approx(0.5, abs=0.05)
    assert like.lowest.trusted and like.null == 0.2
    assert like.lowest.value == pytest.approx(0.2, abs=0.06)


def test_too_few_of_like_length() -> None:
    few = matched(gen(2), 60, 8, 1.05)
    assert few.lowest.value is None and "cannot tell with 8 samples" in few.lowest.note
    assert matched(gen(2), 60, 40, 1.5).lowest.trusted


def test_reward_quantiles_by_hand() -> None:
    """Samples (1, 2, 3, 4): r >= 3 in two; r >= 5 in none; r >= 1 in all."""
    r = f64(1, 2, 3, 4).expand(2, 4)
    found = ranks.reward_quantiles(r, f64(3, 5), f64(1, 1))
    assert found.chosen.value == 0.25 and found.rejected.value == 1.0


def test_reward_quantiles_and_reach_are_held() -> None:
    """q = Σ_y π(y) P_ref[r >= r(y)] and P_n = 1 - E (1 - q)^n, chosen by the policy."""
    reached = (P.reward[:, :, None] >= P.reward[:, None, :]).double()
    q = (P.log_ref.exp()[:, :, None] * reached).sum(1)
    exact = (P.log_policy.exp() * q).sum(-1).mean().item()
    third = (P.log_policy.exp() * (1 - (1 - q) ** 3)).sum(-1).mean().item()

    def drawn(g: torch.Generator) -> tuple[Tensor, Tensor]:
        i = prompts(g, KINDS, 50)
        r = P.reward[i]
        return r.gather(1, sample(g, P.log_ref[i], 6)), r.gather(1, sample(g, P.log_policy[i], 1))[
            :, 0
        ]

    def quantile(g: torch.Generator) -> Estimate:
        r, chosen = drawn(g)
        return ranks.reward_quantiles(r, chosen, chosen).chosen

    holds(quantile, exact)
    holds(lambda g: ranks.best_of_n_reach(*drawn(g))[2], third)


def test_reach_is_the_mean_over_all_subsets() -> None:
    r, chosen = f64(3, 1, 4, 1, 5).expand(2, 5), f64(4, 4)
    found = ranks.best_of_n_reach(r, chosen)
    assert len(found) == 5
    for n, one in enumerate(found, 1):
        sets = list(itertools.combinations(r[0].tolist(), n))
        assert one.value == pytest.approx(sum(max(s) >= 4 for s in sets) / len(sets))
