"""Rewards that explain the same labels: their fits, their disagreement, and when to hear them."""

import pytest
import torch
from enumerable import gen, holds, normal, uniform
from torch import Tensor

from preftune.estimators import ensemble
from preftune.estimators.estimate import Estimate
from preftune.numerics import stream_key

WIDTH = 6


def test_disagreement_by_hand() -> None:
    """Heads' differences on the policy's pairs (0, 2, 4) and (2, 2, 2): variances 4 and 0; on the
    data's (0, 1, 2) and (0, 0, 3): 1 and 3. Ratio 4 / 4."""
    policy = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]], [[4, 0], [2, 0]]])
    pairs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]])
    assert ensemble.disagreement_ratio(policy, pairs).value == pytest.approx(1.0)
    # what a head adds to all rewards of a prompt does not count
    assert ensemble.disagreement_ratio(policy + 5, pairs).value == pytest.approx(1)
    assert "2 heads" in ensemble.disagreement_ratio(policy[:2], pairs[:2]).note
    agreed = ensemble.disagreement_ratio(policy, torch.ones(3, 2))
    assert agreed.value is None and "agree" in agreed.note


def test_only_heads_that_did_not_see_a_pair_are_asked() -> None:
    """Without the last head of the first prompt: 0 and 2 on the policy's pair, squares about the
    mean 2, and 0 and 1 on the data's, .5; the second prompt as above, 0 and 6. Ratio 2 / 6.5."""
    policy = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]], [[4, 0], [2, 0]]])
    pairs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]])
    unseen = torch.tensor([[True, True], [True, True], [False, True]])
    found = ensemble.disagreement_ratio(policy, pairs, unseen)
    assert found.value == pytest.approx(2 / 6.5)
    alone = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert ensemble._scatter(pairs, alone)[0] == 0, "one head agrees with itself"


def test_a_head_is_where_its_gradient_is_zero() -> None:
    """Of the pairs that it drew and the pull to what it took for granted; where pairs never differ
    it stays there, and heads differ by `spread` as they did before."""
    x = normal(gen(0), 60, 4)
    x[:, 3] = 0
    made = ensemble.bradley_terry_heads(x, heads=400, spread=2.0, seed=1)
    precision = float(x.square().sum(-1).mean()) / 4
    drawn = torch.randint(0, 60, (400, 60), generator=gen(stream_key(1, "heads")))
    times = torch.stack([torch.bincount(d, minlength=60) for d in drawn]).double()
    assert torch.equal(times == 0, made.unseen)
    assert made.unseen.double().mean() == pytest.approx(0.368, abs=0.02)
    slope = times * torch.sigmoid(-(made.weight @ x.mT)) @ x
    anchor = made.weight - slope / precision
    assert anchor.var(0) == pytest.approx(torch.full((4,), 1 / precision).double(), rel=0.25)
    assert anchor.mean(0).abs().max() < 4 / (400 * precision) ** 0.5
    assert made.weight[:, 3] == pytest.approx(anchor[:, 3])
    assert made.weight[:, 0].var() < 0.6 * made.weight[:, 3].var(), "labels tell of the others"


def labelled(
    g: torch.Generator, scale: Tensor, count: int = 60, strength: float = 2.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Three policy samples a prompt, N(0, 1); a pair's difference, N(0, 2 scale²), turned by the
    label of a linear reward; and the places of the pairs."""
    own = normal(g, count, 3, len(scale))
    pairs = normal(g, count, len(scale)) * 2**0.5 * scale
    w = strength * torch.ones(len(scale)).double() / len(scale) ** 0.5
    chosen = torch.sigmoid(pairs @ w) > uniform(g, count)
    return own, torch.where(chosen[:, None], pairs, -pairs), torch.arange(count)


def ratio(own: Tensor, pairs: Tensor, place: Tensor) -> Estimate:
    return ensemble.ensemble_coverage(own, pairs, place).ratio


def test_samples_with_the_law_of_the_data_have_a_ratio_of_one() -> None:
    holds(lambda g: ratio(*labelled(g, torch.ones(WIDTH))), 1.0, trusted=0.9)


def test_samples_off_the_span_of_the_data() -> None:
    """Half of the features never differ in pairs: no label speaks of them, heads keep what they
    took for granted, and that is more than they disagree by where they have learnt."""
    scale = (torch.arange(WIDTH) < WIDTH / 2).double()
    found = ratio(*labelled(gen(0), scale, 120))
    assert found.trusted and found.low is not None and found.low > 2, found
    spanned = labelled(gen(0), scale, 120)
    inside = ratio(spanned[0] * scale, *spanned[1:])
    assert inside.low is not None and inside.high is not None and inside.low < 1 < inside.high


def test_pairs_that_a_head_was_fitted_to_flatter_it() -> None:
    """Of twenty features and sixty pairs with the policy's law; held out: 1."""
    inside, outside = [], []
    for seed in range(12):
        own, pairs, place = labelled(gen(seed), torch.ones(20))
        heads = ensemble.bradley_terry_heads(pairs, seed=seed)
        rewards = torch.einsum("ed,nkd->enk", heads.weight, own)
        data = heads.weight @ pairs.mT
        seen = [ensemble.disagreement_ratio(rewards, data, u).value for u in (~heads.unseen, None)]
        held = ensemble.disagreement_ratio(rewards, data, heads.unseen).value
        assert held is not None and all(x is not None and x > held for x in seen)
        inside.append(seen[0])
        outside.append(held)
    assert sum(outside) / 12 == pytest.approx(1, abs=0.12)
    assert sum(x or 0.0 for x in inside) / 12 > 1.25


def test_random_labels_are_not_heard() -> None:
    """Heads order held-out pairs at chance; in few of many such sets it looks otherwise."""
    found = [
        ensemble.ensemble_coverage(*labelled(gen(s), torch.ones(WIDTH), 60, 0.0)) for s in range(40)
    ]
    trusted = [f for f in found if f.ratio.trusted]
    assert len(trusted) <= 4, len(trusted)
    silent = next(f for f in found if not f.ratio.trusted)
    assert silent.ratio.value is None and silent.ratio.low is None
    assert "no better than chance" in silent.ratio.note
    assert silent.accuracy.trusted, "that itself is a figure"
    mean = sum(f.accuracy.value or 0.0 for f in found) / len(found)
    assert mean == pytest.approx(0.5, abs=0.04)


def test_gates() -> None:
    own, pairs, place = labelled(gen(0), torch.ones(WIDTH))
    few = ensemble.ensemble_coverage(own[:19], pairs, place[:19])
    assert few.ratio.value is None and "19 prompts" in few.ratio.note
    thin = ensemble.ensemble_coverage(own[:30], pairs[:39], place[:30])
    assert (
        thin.ratio.value is None and thin.accuracy.value is None and "39 pairs" in thin.ratio.note
    )
    same = ensemble.ensemble_coverage(own, torch.zeros_like(pairs), place)
    assert same.ratio.value is None and "same features" in same.ratio.note
    some = ensemble.ensemble_coverage(own[:25], pairs, place[30:55])
    assert some.ratio.trusted, "the other prompts' pairs help to fit"


def test_accuracy_counts_held_out_pairs_alone() -> None:
    """Heads that are right about what they saw and wrong about the rest."""
    unseen = torch.tensor([[True, False, False], [False, True, False]])
    pairs = torch.tensor([[1.0], [1.0], [1.0]])
    heads = ensemble.Heads(weight=torch.tensor([[1.0], [-1.0]]).double(), unseen=unseen)
    found = ensemble.held_out_accuracy(heads, pairs)
    assert found.value == 0.5, "right about the first, wrong about the second; the third was seen"
