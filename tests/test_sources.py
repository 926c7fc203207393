"""Where responses come from: views of the data, pools, kept samples, references that move."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

import tables
from preftune import loop, methods
from preftune import objectives as o
from preftune.collecting import Context, Cursor, Source
from preftune.errors import UserError
from preftune.labellers import BestWorst, GivenPreference, RandomPair, Unlabelled
from preftune.method import Method
from preftune.rounds import Group, World, group_terms, next_minibatch, refill
from preftune.samples import DATA, REFERENCE, Samples, beside, join
from preftune.sources import Offline, OnPolicy, Pool, Reference
from preftune.terms import Term
from tables import STATES, Table, make_world, row_of, scored

CHOSEN = Offline(take="chosen")


@dataclass(frozen=True)
class Repeated(Table):
    """Rows of which several have one prompt, in each run others."""

    prompts: tuple = ()

    def prompts_only(self, index):
        prompt = torch.tensor(self.prompts)[..., index].unsqueeze(-1)
        return prompt, torch.ones_like(prompt, dtype=torch.bool)


def context(world: World, **more) -> Context:
    return Context(**{
        "data": world.data, "policy": world.policy, "reference": world.reference, "version": 7,
        "seed": world.seed, "cursor": Cursor(), "kept": {},
    } | more)  # fmt: skip


def arms(samples: Samples) -> list[list[int]]:
    return samples.tokens.squeeze(-1).tolist()


def group_of(source: Source, labeller=None, **more) -> Group:
    term = Term(source=source, labeller=labeller or Unlabelled(baseline="none"), objective=o.nll)
    return group_terms(Method(name="x", terms=(term,), **more))[0]


# --- Samples


def test_responses_at_places():
    s = scored([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], logp=[[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]],
               finished=[[True, False, True], [False, True, True]])  # fmt: skip
    found = s.at(torch.tensor([[2, 0], [1, 1]]))
    assert found.reward.tolist() == [[3.0, 1.0], [5.0, 5.0]]
    assert found.logp.squeeze(-1).tolist() == [[-3.0, -1.0], [-5.0, -5.0]]
    assert arms(found) == [[2, 0], [1, 1]] and found.ref_logp is None
    assert found.finished.tolist() == [[True, True], [True, True]]
    assert torch.equal(found.row, s.row) and torch.equal(found.prompt, s.prompt)


def test_trimmed_cuts_what_is_padding_everywhere():
    s = scored(logp=[[[-1.0] * 5, [-2.0] * 5]], lengths=[[1, 3]])
    cut = s.trimmed()
    assert cut.tokens.shape == cut.mask.shape == cut.logp.shape == (1, 2, 3)
    assert cut.mask.tolist() == [[[True, False, False], [True, True, True]]]
    empty = scored(logp=[[[-1.0, -1.0]]], lengths=[[0]]).trimmed()
    assert empty.tokens.shape == (1, 1, 1) and not empty.mask.any()


def test_join_pads_prompts_on_the_left_and_responses_on_the_right():
    a = scored([[1.0]], logp=[[[-1.0]]], extra={"margin": [1.0]})
    b = scored([[2.0]], logp=[[[-2.0, -3.0]]], lengths=[[2]])
    b = replace(b, prompt=torch.tensor([[8, 9]]), prompt_mask=torch.ones(1, 2, dtype=torch.bool))
    both = join([a, b])
    assert both.prompt.tolist() == [[0, 0], [8, 9]]
    assert both.prompt_mask.tolist() == [[False, True], [True, True]]
    assert both.mask.tolist() == [[[True, False]], [[True, True]]]
    assert both.logp.tolist() == [[[-1.0, 0.0]], [[-2.0, -3.0]]]
    assert both.reward.tolist() == [[1.0], [2.0]] and both.extra == {}


def test_beside_adds_up_responses_and_drops_what_one_lacks():
    a = scored([[1.0], [2.0]], logp=[[-1.0], [-2.0]], extra={"margin": [0.1, 0.2]})
    b = scored(logp=[[[-3.0, -4.0]], [[-5.0, -6.0]]], lengths=[[2], [1]])
    both = beside([a, b])
    assert both.tokens.shape == (2, 2, 2) and both.reward is None and both.extra == {}
    assert both.logp.tolist() == [[[-1.0, 0.0], [-3.0, -4.0]], [[-2.0, 0.0], [-5.0, -6.0]]]
    assert both.mask.sum(-1).tolist() == [[1, 2], [1, 1]]


def test_beside_keeps_the_wider_type():
    a, b = scored(logp=[[-1.0]]), scored(logp=[[-2.0]])
    narrow = replace(a, logp=a.logp.float())
    assert beside([narrow, b]).logp.dtype == beside([b, narrow]).logp.dtype == torch.float64


# --- views of the data

SCORES = {
    "score_chosen": tuple(10.0 + s for s in range(STATES)),
    "score_rejected": tuple(-1.0 * s for s in range(STATES)),
}


def test_all_responses_with_their_scores_as_rewards():
    found = Offline(scored=True).collect(context(make_world(table=Table(extra=SCORES))), 4)
    rows = found.row.tolist()
    assert arms(found) == [[s % 5, (s + 1) % 5] for s in rows] and len(rows) == 4
    assert found.reward.tolist() == [[10.0 + s, -1.0 * s] for s in rows]
    assert (found.origin == DATA).all() and found.logp is None


def test_scores_are_used_only_where_the_source_says_so():
    """It is told so for the whole data set: which rewards a row gets does not hang on its batch."""
    found = Offline().collect(context(make_world(table=Table(extra=SCORES))), STATES)
    assert found.reward is None
    partial = SCORES | {"score_rejected": (0.0,) * 5 + (math.nan,)}
    with pytest.raises(AssertionError, match="no score"):
        world = make_world(table=Table(extra=partial))
        Offline(scored=True).collect(context(world), STATES)


def test_scores_spare_the_reward():
    group = group_of(Offline(scored=True), BestWorst())
    world = make_world(table=Table(extra=SCORES))
    refill(group, world, 0)
    assert group.queries == 0 and torch.equal(
        group.round.samples.reward[:, 0], 10.0 + group.round.samples.row
    )
    unscored = group_of(Offline(), BestWorst())
    refill(unscored, make_world(), 0)
    assert unscored.queries == 8  # four prompts of two responses


def test_the_chosen_alone():
    source = replace(CHOSEN, scored=True)
    found = source.collect(context(make_world(table=Table(extra=SCORES))), 3)
    assert arms(found) == [[s % 5] for s in found.row.tolist()]
    assert found.reward.tolist() == [[10.0 + s] for s in found.row.tolist()]
    assert CHOSEN.num_responses == CHOSEN.reads == 1


def test_each_response_behind_a_control():
    """Rows one after another, the chosen first; states 2S + s for good, S + s for bad; rewards in
    the same order. Four prompts are two rows."""
    source = Offline(take="conditioned", scored=True)
    world = make_world("binary_reward_conditioning", table=Table(extra=SCORES))
    found = source.collect(context(world), 4)
    a, b = (int(r) for r in found.row[::2])
    assert found.row.tolist() == [a, a, b, b] and source.prompts_per_row == 2
    assert found.prompt.squeeze(-1).tolist() == [
        2 * STATES + a,
        STATES + a,
        2 * STATES + b,
        STATES + b,
    ]
    assert arms(found) == [[a % 5], [(a + 1) % 5], [b % 5], [(b + 1) % 5]]
    assert found.reward.tolist() == [[10.0 + a], [-1.0 * a], [10.0 + b], [-1.0 * b]]


def test_the_control_of_a_completion_follows_its_label():
    table = Table(rows=((0,), (1,), (2,)), extra={"label": (1.0, 0.0, math.nan)})
    world = make_world("binary_reward_conditioning", table=table, shape=(3, 5))
    found = Offline(take="conditioned", responses=1).collect(context(world), 3)
    control = dict(zip(found.row.tolist(), found.prompt.squeeze(-1).tolist(), strict=True))
    assert control == {0: 6, 1: 3 + 1, 2: 6 + 2}


def test_a_mismatched_response_is_the_next_rows_first():
    """Of the data set, not of the minibatch; after the last row comes row 0."""
    source = Offline(take="mismatched")
    found = source.collect(context(make_world()), 3)
    expected = [[s % 5, (s + 1) % 5, ((s + 1) % STATES) % 5] for s in found.row.tolist()]
    assert arms(found) == expected and source.num_responses == 3 and source.reads == 2
    labels = Table(rows=((4,), (3,), (2,)), extra={"label": (0.0, 1.0, 0.0)})
    lone = Offline(take="mismatched", responses=1).collect(context(make_world(table=labels)), 3)
    assert arms(lone) == [[(4, 3, 2)[s], (3, 2, 4)[s]] for s in lone.row.tolist()]
    assert lone.extra["label"].tolist() == [(0.0, 1.0, 0.0)[s] for s in lone.row.tolist()]


def test_a_mismatched_response_is_of_another_prompt():
    """Prompts 0 0 0 1 1 2: behind row 0 comes row 3. Of the last rows it is the first again."""
    prompts = (0, 0, 0, 1, 1, 2)
    table = Repeated(rows=tuple((arm, arm) for arm in range(6)), prompts=prompts)
    world = make_world(table=table, shape=(3, 6))
    found = Offline(take="mismatched").collect(context(world), 6)
    by_row = dict(zip(found.row.tolist(), (a[-1] for a in arms(found)), strict=True))
    assert by_row == {0: 3, 1: 3, 2: 3, 3: 5, 4: 5, 5: 0}


def test_a_mismatched_response_of_one_prompt_alone_is_the_next():
    table = Repeated(rows=tuple((arm, arm) for arm in range(40)), prompts=(0,) * 40)
    found = Offline(take="mismatched").collect(context(make_world(table=table, shape=(1, 40))), 40)
    assert all(a[-1] == (a[0] + 1) % 40 for a in arms(found))
    blocks = Repeated(rows=table.rows, prompts=(0,) * 13 + tuple(range(1, 28)))
    found = Offline(take="mismatched").collect(
        context(make_world(table=blocks, shape=(28, 40))), 40
    )
    assert all(a[-1] >= 13 for a in arms(found) if a[0] < 13)  # far behind a long block too


def test_each_run_of_a_study_looks_for_its_own_mismatched_response():
    """Rows have other prompts in each run: what it is given is what it is given alone."""
    each = ((0, 0, 0, 1), (0, 1, 2, 3), (0, 0, 1, 1))
    rows = tuple((arm, arm) for arm in range(4))
    source = Offline(take="mismatched")
    together = Repeated(rows=rows, runs=(3,), prompts=each)
    found = source.collect(context(make_world(table=together, shape=(4, 4))), 4)
    for r, prompts in enumerate(each):
        alone = Repeated(rows=rows, prompts=prompts)
        own = source.collect(context(make_world(table=alone, shape=(4, 4))), 4)
        assert torch.equal(found.tokens[r], own.tokens)


def test_a_mismatched_response_is_known_behind_its_own_prompt_alone():
    """Log-probs that the data bring do not carry over to another prompt."""

    class Known(Table):
        def samples(self, index, *, responses=None):
            out = super().samples(index, responses=responses)
            return replace(out, ref_logp=torch.full(out.tokens.shape, -3.0, dtype=torch.float64))

    assert (
        Offline(take="mismatched").collect(context(make_world(table=Known())), 3).ref_logp is None
    )


# --- pools


def test_a_pool_sets_answers_to_the_same_prompts_side_by_side():
    source = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=2), Reference(samples_per_prompt=3)))
    table = Table(extra={"margin": (0.5,) * STATES})
    found = source.collect(context(make_world(table=table)), 4)
    assert found.tokens.shape == (4, 6, 1) and source.num_responses == 6
    assert found.origin.tolist() == [[DATA, 7, 7, REFERENCE, REFERENCE, REFERENCE]] * 4
    assert [a[0] for a in arms(found)] == [s % 5 for s in found.row.tolist()]
    assert torch.equal(found.row, found.prompt.squeeze(-1)) and found.extra == {}


def test_a_pools_prompts_are_its_first_members():
    """With the data first they run through the data's epoch; its last round is short."""
    pool = group_of(Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=1))))
    alone = group_of(CHOSEN)
    for _ in range(4):
        for group in (pool, alone):
            refill(group, make_world(), 0)
        assert torch.equal(pool.round.samples.row, alone.round.samples.row)


@pytest.mark.parametrize(
    "member", [OnPolicy(samples_per_prompt=8), Reference(samples_per_prompt=8)]
)
def test_equal_members_of_a_pool_draw_differently(member):
    """A member's random stream is keyed by its place too."""
    for prompts in (None, torch.arange(6)):
        found = Pool(members=(member, member)).collect(context(make_world()), 6, prompts)
        assert found.tokens.shape[-2] == 16
        assert not torch.equal(found.tokens[:, :8], found.tokens[:, 8:])


def test_reference_members_keep_their_own_samples():
    source = Pool(members=(Reference(samples_per_prompt=3), Reference(samples_per_prompt=1)))
    ctx = context(make_world())
    found = source.collect(ctx, 6)
    assert source.num_responses == 4 and found.tokens.shape == (6, 4, 1)
    assert torch.equal(source.collect(ctx, 6, found.row).tokens, found.tokens)  # drawn once


@pytest.mark.parametrize("members", [(OnPolicy(samples_per_prompt=9),),
                                     (CHOSEN, OnPolicy(samples_per_prompt=9))])  # fmt: skip
def test_answers_to_a_prompt_are_new_in_each_round(members):
    """Of the only prompt, alone and beside the data."""
    group = group_of(Pool(members=members) if len(members) > 1 else members[0])
    world, found = make_world(table=Table(rows=((0,),)), shape=(1, 5), batch_size=1), []
    for _ in range(3):
        refill(group, world, 0)
        found.append(tuple(arms(group.round.samples)[0][-9:]))
    assert len(set(found)) == 3


def test_passes_and_rounds_of_a_pool_are_its_fresh_members():
    source = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=1, passes=2, prompts_per_round=6)))
    assert (source.on_policy, source.draws, source.passes, source.prompts_per_round) == (
        True, False, 2, 6,
    )  # fmt: skip
    still = Pool(members=(CHOSEN, Reference()))
    assert (still.on_policy, still.passes, still.prompts_per_round) == (False, 1, None)
    assert Pool(members=(Reference(), CHOSEN)).draws
    group, seen = group_of(source), []
    refill(group, make_world(batch_size=2), 0)
    while not group.round.spent:
        seen.append(next_minibatch(group)[0].row.tolist())
    assert [len(rows) for rows in seen] == [2] * 6
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(6))


def given_for(prompts: list[int]) -> Samples:
    """Own samples: arm 4 to each."""
    out = Table(rows=((4,),) * 50).samples(torch.tensor(prompts))
    return replace(out, origin=torch.zeros_like(out.origin), row=torch.arange(len(prompts)))


def test_given_samples_are_set_beside_the_row_of_their_prompt():
    source = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=1)))
    found = source.collect(context(make_world(), given=given_for([5, 2])), 2)
    assert found.row.tolist() == [5, 2] and arms(found) == [[0, 4], [2, 4]]
    assert OnPolicy().collect(context(make_world(), given=given_for([3])), 9).row.tolist() == [0]


def test_given_samples_of_a_prompt_that_stands_twice_take_both_rows():
    class Twice(Table):
        def prompts_only(self, index):
            prompt, mask = super().prompts_only(index)
            return prompt.clamp(max=1), mask

    world = make_world(table=Twice(rows=((0,), (1,), (2,))), shape=(3, 5))
    source = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=1)))
    found = source.collect(context(world, given=given_for([1, 1])), 2)
    assert found.row.tolist() == [1, 2] and arms(found) == [[1, 4], [2, 4]]


def test_given_samples_of_an_unknown_prompt_are_refused():
    source = Pool(members=(CHOSEN, OnPolicy(samples_per_prompt=1)))
    with pytest.raises(UserError, match="prompt 1 stands in no row"):
        source.collect(context(make_world(), given=given_for([5, 40])), 2)


# --- scoring of a round


@pytest.mark.parametrize(
    "source", [Reference(), Pool(members=(OnPolicy(samples_per_prompt=1), Reference()))]
)
def test_log_probs_at_collection_are_the_policys_whoever_drew(source):
    """Not those of the reference that drew the sample: else its log-ratio would always be 0, and a
    KL in the reward, or Mix-P, would say nothing of it."""
    group, world = group_of(source, RandomPair(kl=0.1)), make_world()
    refill(group, world, 0)
    s = group.round.samples
    expected = world.policy.score(s.prompt, s.prompt_mask, s.tokens, s.mask).detach()
    torch.testing.assert_close(s.logp, expected, rtol=0, atol=1e-12)
    anchor = world.reference.score(s.prompt, s.prompt_mask, s.tokens, s.mask).detach()
    torch.testing.assert_close(s.ref_logp, anchor, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["dpo", "kto", "reward", "rloo", "hypo", "ppo", "grpo", "best_of_n", "chosen_vs_own"]
)
def test_runs_of_a_study_have_the_gradients_that_they_have_alone(name):
    """Three runs of one shape in one tensor program, and each by itself."""
    study = make_world(name, table=Table(runs=(3,)))
    tables.gradient(group_terms(row_of(name)), study, 0)
    for r in range(3):
        alone = make_world(name)
        with torch.no_grad():
            if name != "reward":
                alone.policy.logits.copy_(study.policy.logits[r])
            alone.reference.logits.copy_(study.reference.logits[r])
        tables.gradient(group_terms(row_of(name)), alone, 0)
        pairs = zip(study.policy.parameters(), alone.policy.parameters(), strict=True)
        for both, own in pairs:
            torch.testing.assert_close(both.grad[r], own.grad, rtol=0, atol=1e-12)


# --- references that move


def follow(row: Method, world: World, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each update: the policy before it, and the reference after it."""
    state, settings = tables.begin(row, world, steps)
    before, reference = [], []
    for _ in range(steps):
        before.append(world.policy.logits.detach().clone())
        loop.update(state, settings)
        reference.append(world.reference.logits.detach().clone())
    return before, reference


def test_the_reference_of_a_round_is_the_policy_at_its_start():
    """Rounds of two updates: the policy before updates 0, 2, 4."""
    row = row_of("on_policy_dpo", reference_update="round", passes=2)
    before, reference = follow(row, make_world(), 6)
    for t in range(6):
        assert torch.equal(reference[t], before[t - t % 2])
    assert not torch.equal(before[0], before[2])


def test_ratios_of_a_round_are_to_the_policy_at_its_start():
    """So in the first update of each round policy and reference are one, later not."""
    row = row_of("on_policy_dpo", reference_update="round", passes=2)
    _, logged = tables.run(row, make_world(), 6)
    assert [m["margin"] == 0 for m in logged] == [True, False] * 3
    assert all(abs(m["kl"]) < 1e-15 for m in logged)  # at collection


def test_the_reference_of_offline_data_moves_with_the_epoch():
    """Six rows in updates of four: epochs begin at updates 0, 2, 4; the first keeps its start."""
    world = make_world()
    start = world.reference.logits.detach().clone()
    before, reference = follow(row_of("dpo", reference_update="round"), world, 6)
    for t in range(6):
        assert torch.equal(reference[t], start if t < 2 else before[t - t % 2])


@pytest.mark.parametrize("kept", [0.99, 0.6])
def test_a_moving_average_of_the_policy(kept: float):
    """Each update: 0.99 of itself and 0.01 of the policy after the step, or as is set."""
    world = make_world()
    by_hand = world.reference.logits.detach().clone()
    own = {} if kept == 0.99 else {"ema_decay": kept}
    before, reference = follow(row_of("dpo", reference_update="ema", **own), world, 5)
    after = [*before[1:], world.policy.logits.detach()]
    for t in range(5):
        by_hand = kept * by_hand + (1 - kept) * after[t]
        torch.testing.assert_close(reference[t], by_hand, rtol=0, atol=1e-14)


def test_a_fixed_reference_stays():
    world = make_world()
    start = world.reference.logits.detach().clone()
    assert all(torch.equal(r, start) for r in follow(row_of("on_policy_dpo"), world, 3)[1])


def test_the_first_fresh_source_leads():
    rounds = {"reference_update": "round"}
    assert [g.leads for g in group_terms(row_of("hypo", **rounds))] == [False, True]
    assert [g.leads for g in group_terms(row_of("dpo", **rounds))] == [True]
    assert not any(g.leads for g in group_terms(row_of("hypo")))
    fresh = [
        Term(source=OnPolicy(samples_per_prompt=k), labeller=BestWorst(), objective=o.dpo,
             settings={"beta": 0.1})
        for k in (2, 3)
    ]  # fmt: skip
    data = Term(
        source=Offline(), labeller=GivenPreference(), objective=o.dpo, settings={"beta": 0.1}
    )
    groups = group_terms(methods.Method(name="x", terms=(data, *fresh), reference_update="round"))
    assert [g.leads for g in groups] == [False, True, False]


def test_moving_references_change_nothing_in_a_round_that_was_scored():
    """ema moves the reference after each update; what the round was scored with stays."""
    row = row_of("on_policy_dpo", reference_update="ema", passes=3)
    world = make_world(batch_size=2)
    state, settings = tables.begin(row, world, 3, rate=1.0)
    seen = []
    for _ in range(3):
        loop.update(state, settings)
        seen.append(state.groups[0].round.samples.ref_logp.clone())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.equal(world.reference.logits, make_world().reference.logits)
