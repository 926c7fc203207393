"""Rows whose settings would mean something else than they say are refused, and the nearest that do
are not."""

from typing import Any

import pytest

from preftune import building, methods, spec
from preftune import objectives as o
from preftune.config import load
from preftune.errors import UserError
from preftune.labellers import (
    AllPairs,
    BestWorst,
    Demonstration,
    GivenPreference,
    Member,
    RewardWeights,
    Unlabelled,
)
from preftune.rounds import group_terms, refill
from preftune.samples import REFERENCE
from preftune.sampling.decoding import Decoding
from preftune.sources import Offline, OnPolicy, Pool, Reference, origins
from preftune.terms import Term
from tables import make_world, row_of

CHOSEN, OWN, THEIRS = (
    Offline(take="chosen"), OnPolicy(samples_per_prompt=1), Reference(samples_per_prompt=1),
)  # fmt: skip
HOT = Decoding(temperature=0.7)


def checked(*terms: Term, batch_size: int = 8, decoding: Decoding | None = None) -> None:
    methods.check(methods.Method(name="x", terms=terms), decoding or Decoding(), batch_size)


def term(source: Any, labeller: Any, objective: Any = o.nll, **settings: Any) -> Term:
    return Term(source=source, labeller=labeller, objective=objective, settings=settings)


def kl(source: Any, objective: Any = o.reverse_kl, labeller: Any = None) -> Term:
    return term(source, labeller or Unlabelled(), objective)


# --- which responses a term takes


@pytest.mark.parametrize("k", [1, 2, 3])
def test_more_samples_leave_the_bonus_to_the_references(k):
    """With K own samples before it, the reference's is at place K."""
    row = row_of("xpo", samples_per_prompt=k)
    methods.check(row, Decoding(), 8)
    (group,) = group_terms(row)
    refill(group, make_world(), 0)
    samples, (_, bonus) = group.round.samples, group.round.batches
    assert bonus.index.tolist() == [[[k]]] * 4
    assert (samples.origin.gather(-1, bonus.index[..., 0]) == REFERENCE).all()


def test_samples_that_nothing_learns_from_are_refused():
    row = row_of("chosen_vs_own", samples_per_prompt=3)
    with pytest.raises(UserError, match="samples_per_prompt: of the 4 responses .* learns from 2"):
        methods.check(row, Decoding(), 8)
    pool = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=3)))
    checked(term(pool, BestWorst(), o.dpo, beta=0.1))
    first = term(Pool(members=(CHOSEN, OWN)), GivenPreference(), o.dpo, beta=0.1)
    checked(first, term(first.source, Demonstration()))  # beside it one that takes less
    checked(term(Offline(), Demonstration()))  # data are there, whether or not they are used


def test_a_place_that_another_number_of_samples_would_move_is_refused():
    """In rows of a user's own, as older files name it: two responses, and then three."""
    pair = Pool(members=(OWN, THEIRS))
    ranked, bonus = (term(pair, x, o.dpo, beta=0.1) for x in (BestWorst(), Member(place=1)))
    row = methods.Method(name="x", terms=(ranked, term(pair, bonus.labeller)))
    methods.check(row, Decoding(), 8)
    more = methods.configure(row, {"samples_per_prompt": 2})
    with pytest.raises(UserError, match="place: 1 .* origin: policy, reference or data"):
        methods.check(more, Decoding(), 8)


@pytest.mark.parametrize(
    ("labeller", "words"),
    [
        (Member(origin="data"), "no response 0 of the origin data"),
        (Member(origin="reference", place=1), "no response 1 of the origin reference"),
    ],
)
def test_a_member_that_is_not_there(labeller, words):
    pool = Pool(members=(OWN, THEIRS))
    with pytest.raises(UserError, match=words):
        checked(term(pool, BestWorst(), o.dpo, beta=0.1), term(pool, labeller))


def test_an_origin_in_yaml():
    both = {"name": "pool", "members": ["on_policy", "reference"]}
    data = {"source": both, "labeller": {"name": "member", "origin": "reference"}}
    row = spec.from_data("mine", [data | {"objective": "nll"}])
    assert row.terms[0].labeller == Member(origin="reference")
    assert spec.from_data("mine", spec.to_data(row)) == row
    data["labeller"] = {"name": "member", "origin": "refrence"}
    with pytest.raises(UserError, match=r"terms.0.labeller.origin: .* Did you mean 'reference'"):
        spec.from_data("mine", [data | {"objective": "nll"}])


def test_origins_of_a_pool_are_its_members_in_order():
    pool = Pool(members=(THEIRS, CHOSEN, OnPolicy(samples_per_prompt=2)))
    assert origins(pool) == [-1, -2, 0, 0] and origins(Offline()) == [-2, -2]


# --- fresh samples


def test_freshness_is_that_of_the_update_that_the_loop_takes():
    """Six pairs of four samples: batch_size 8 is one prompt an update, for the KL too."""

    def both(prompts: int | None) -> tuple[Term, Term]:
        source = OnPolicy(samples_per_prompt=4, prompts_per_round=prompts)
        return term(source, AllPairs(), o.dpo, beta=0.1), kl(source)

    for prompts in (4, 8):  # the last update would train on samples 3 and 7 updates old
        with pytest.raises(UserError, match="rounds of one update"):
            checked(*both(prompts))
    checked(*both(1))
    checked(*both(None))
    pairs, fresh = both(4)
    checked(pairs, kl(fresh.source, o.kl_loss))  # a plain loss may be stale
    with pytest.raises(UserError, match="4 is less than the 8 prompts of one update"):
        checked(fresh)  # by itself it takes 8


@pytest.mark.parametrize("other", [CHOSEN, THEIRS])
@pytest.mark.parametrize("objective", [o.reverse_kl, o.kl_loss, o.ppo_clip])
def test_a_kl_and_a_ratio_take_the_policys_own_samples_alone(other, objective):
    pool = Pool(members=(other, OnPolicy(samples_per_prompt=1)))
    clip = {"clip": 0.2} if objective is o.ppo_clip else {}
    ranked = term(pool, BestWorst(), o.dpo, beta=0.1)
    everything = term(pool, Unlabelled(), objective, **clip)
    with pytest.raises(UserError, match="fresh samples" if not clip else "what drew them"):
        checked(ranked, everything)
    checked(ranked, term(pool, Member(origin="policy"), objective, **clip))


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_ratio_needs_samples_of_the_policy_itself(method):
    """Log-probs at collection are the policy's own, not those of what a temperature makes of it."""
    with pytest.raises(UserError, match="ppo_clip needs .* temperature 1"):
        building.method_of(load({"method": method, "temperature": 0.7}))


@pytest.mark.parametrize("method", ["rloo", "on_policy_dpo", "rwr", "on_policy_best_of_n"])
def test_a_kl_in_the_reward_needs_samples_of_the_policy_itself(method):
    with pytest.raises(UserError, match="KL in the reward needs .* temperature 1"):
        building.method_of(load({"method": method, "kl": 0.05, "temperature": 0.7}))
    building.method_of(load({"method": method, "temperature": 0.7}))
    building.method_of(load({"method": method, "kl": 0.05}))


def test_rewards_of_data_have_no_temperature():
    checked(term(Offline(), RewardWeights(kl=0.1), o.nll), decoding=HOT)


# --- settings that would be ignored


def test_a_weight_does_not_go_with_the_term_that_a_baseline_leaves_out():
    with pytest.raises(UserError, match="weight: is that of value_clip, which baseline: batch"):
        methods.configure(methods.get("ppo"), {"weight": 0.5, "baseline": "batch"})
    for settings in ({"weight": 0.5}, {"weight": 0.5, "baseline": "value"}):
        assert methods.configure(methods.get("ppo"), settings).terms[-1].weight == 0.5


def test_a_baseline_goes_to_the_labellers_that_know_it():
    row = building.method_of(load({"method": "grpo", "baseline": "batch"}))
    assert [t.labeller.baseline for t in row.terms] == ["batch", "none"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no 'batch'. Give leave_one_out or none"):
        building.method_of(load({"method": "hypo", "baseline": "batch"}))


@pytest.mark.parametrize("method", ["simpo", "orpo", "wpo"])
def test_lengths_are_divided_by_once(method):
    row = load({"method": method})
    building.method_of(row)
    with pytest.raises(UserError, match=r"terms.0.level: .* divides by the length itself"):
        building.method_of(row, {"terms.0.level": "mean"})


@pytest.mark.parametrize("labeller", [AllPairs(ties="keep"), BestWorst(ties="keep")])
def test_ties_are_kept_where_something_is_learnt_of_them(labeller):
    source = OnPolicy(samples_per_prompt=3)
    spec.check_term("terms.0", term(source, labeller, o.dpo, beta=0.1))
    unbiased = term(source, labeller, o.robust_dpo, beta=0.1, label_smoothing=0.1)
    with pytest.raises(UserError, match=r"terms.0.labeller.ties: .* Give ties: drop"):
        spec.check_term("terms.0", unbiased)
