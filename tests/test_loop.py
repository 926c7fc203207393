"""The loop on a table of logits, where every number can be worked out."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tables
from preftune import alarms, loop, methods
from preftune import objectives as o
from preftune.errors import GuardStop
from preftune.labellers import BestWorst, GivenPreference, Unlabelled
from preftune.policies.categorical import Categorical, TabularReward
from preftune.rounds import World, group_terms, next_minibatch, refill, updates_per_epoch
from preftune.samples import DATA, Samples
from preftune.sources import Offline, OnPolicy, Reference
from preftune.terms import Term

STATES, ARMS = 6, 5


@dataclass(frozen=True)
class Pairs:
    """State s prefers arm s % ARMS to the next."""

    def __len__(self) -> int:
        return STATES

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        prompt = torch.as_tensor(index)[:, None]
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        prompt, prompt_mask = self.prompts_only(index)
        arms = torch.stack([prompt[:, 0] % ARMS, (prompt[:, 0] + 1) % ARMS], -1)
        arms = arms if responses is None else arms[:, responses]
        tokens = arms.unsqueeze(-1)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            finished=torch.ones_like(arms, dtype=torch.bool),
            origin=torch.full_like(arms, DATA), row=prompt[:, 0],
        )  # fmt: skip


def by_arm(samples: Samples) -> Tensor:
    """The reward of an arm is its number."""
    return samples.tokens.squeeze(-1).double()


def equal(samples: Samples) -> Tensor:
    """Every response is as good as another."""
    return torch.zeros(samples.finished.shape, dtype=torch.float64)


def make_world(
    reward=by_arm, seed: int = 0, batch_size: int = 4, name: str = "dpo", **more
) -> World:
    """A table with what the row of that name needs."""
    generator = torch.Generator().manual_seed(seed)
    row = methods.get(name)
    logits, ref_logits = torch.randn(2, STATES, ARMS, generator=generator, dtype=torch.float64)
    if "score" in row.outputs:
        policy = TabularReward(torch.zeros_like(logits))
    else:
        controls = any(getattr(t.source, "take", "") == "conditioned" for t in row.terms)
        policy = Categorical(logits, value_head="value" in row.needs, controls=controls)
    reference = Categorical(ref_logits)
    return World(
        policy=policy, reference=reference, data=Pairs(), prompts=Pairs(), reward=reward, seed=seed,
        batch_size=batch_size, micro_batch_tokens=None, **more,
    )  # fmt: skip


def settings(**more) -> loop.Settings:
    return loop.Settings(**{"max_steps": 6, "learning_rate": 0.05, **more})


def run(name: str, world: World, **more) -> tuple[loop.State, list[dict]]:
    row = methods.resolve(methods.configure(methods.get(name), more.pop("row", {})))
    logged: list[dict] = []
    state = loop.start(row, world, settings(**more))
    loop.advance(
        state, settings(**more), loop.Hooks(log=lambda step, m: logged.append({"step": step, **m}))
    )
    return state, logged


@pytest.mark.parametrize("name", list(methods.table()))
def test_every_row_runs_on_a_table(name):
    state, logged = run(name, make_world(name=name))
    assert [m["step"] for m in logged] == list(range(1, 7))
    assert all(math.isfinite(m["loss"]) for m in logged)


def test_hypo_at_weight_zero_is_dpo_bit_for_bit():
    zero, with_zero = run("hypo", make_world(), row={"weight": 0.0})
    plain, alone = run("dpo", make_world())
    assert torch.equal(zero.world.policy.logits, plain.world.policy.logits)
    assert [m["loss"] for m in with_zero] == [m["loss"] for m in alone]
    assert with_zero[0]["kl"] is not None  # still sampled and logged


def test_weight_moves_hypo():
    some, _ = run("hypo", make_world(), row={"weight": 0.5})
    none, _ = run("dpo", make_world())
    assert not torch.equal(some.world.policy.logits, none.world.policy.logits)


def test_binary_choice_of_the_first_dpo_step():
    """With policy = reference the loss is ln 2 and the accuracy one half (all ties)."""
    world = make_world()
    world = replace(world, reference=world.policy.frozen_copy())
    _, logged = run("dpo", world, max_steps=1)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert logged[0]["margin"] == 0 and logged[0]["accuracy"] == 0.5


def test_a_round_of_ties_makes_no_update():
    said: list[alarms.Fired] = []
    world = make_world(reward=equal)
    before = world.policy.logits.detach().clone()
    row = methods.resolve(methods.get("on_policy_dpo"))
    state = loop.start(row, world, settings())
    logged: list[dict] = []
    loop.advance(
        state, settings(), loop.Hooks(log=lambda s, m: logged.append(m), alarm=said.append)
    )
    assert torch.equal(before, world.policy.logits)
    assert all(m["loss"] is None and m["pairs"] == 0 for m in logged)
    assert state.step == 6 and state.version == 0
    assert [a.alarm for a in said] == ["ties"] and "tied" in said[0].message


def test_a_tied_pair_is_masked_and_the_mean_is_over_the_others():
    """Three of four prompts tie: the gradient is that of the one left, not a quarter of it."""

    def one_differs(samples: Samples) -> Tensor:
        reward = torch.zeros(samples.finished.shape, dtype=torch.float64)
        reward[0, 0] = 1.0
        return reward

    world = make_world(reward=one_differs)
    groups = group_terms(methods.get("on_policy_dpo"))
    refill(groups[0], world, 0)
    samples, (batch,) = groups[0].round.samples, groups[0].round.batches
    assert batch.keep.sum() == 1
    loop.gradient(groups, world, 0)
    got = world.policy.logits.grad.clone()

    logp = world.policy.log_probs(samples.prompt)[0]
    ref = world.reference.log_probs(samples.prompt)[0].detach()
    first, second = samples.tokens[0, :, 0]
    h = (logp - ref)[first] - (logp - ref)[second]
    (expected,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.1 * h), world.policy.logits)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


def test_group_shares_samples_and_one_labelling():
    term = Term(
        source=OnPolicy(samples_per_prompt=3),
        labeller=BestWorst(),
        objective=o.dpo,
        settings={"beta": 0.1},
    )
    other = replace(term, objective=o.ipo, settings={"tau": 0.1}, weight=0.5)
    kl = Term(source=OnPolicy(samples_per_prompt=3), labeller=Unlabelled(), objective=o.reverse_kl)
    groups = group_terms(methods.Method(name="x", terms=(term, other, kl)))
    assert len(groups) == 1 and groups[0].places == [0, 1, 2]
    refill(groups[0], make_world(), 0)
    batches = groups[0].round.batches
    assert batches[0] is batches[1] and batches[2] is not batches[0]


def test_rounds_passes_and_staleness():
    """6 prompts in updates of 2, twice: six updates, staleness 0 to 5, each prompt twice."""
    world = make_world(batch_size=2)
    row = methods.configure(methods.get("on_policy_dpo"), {"prompts_per_round": 6, "passes": 2})
    _, logged = run("on_policy_dpo", world, row={"prompts_per_round": 6, "passes": 2})
    assert [m["staleness"] for m in logged] == [0, 1, 2, 3, 4, 5]
    (group,) = group_terms(row)
    refill(group, make_world(batch_size=2), 0)
    taken = [next_minibatch(group)[0].row.tolist() for _ in range(6)]
    assert group.round.spent
    assert sorted(sum(taken[:3], [])) == sorted(sum(taken[3:], [])) == list(range(6))
    assert updates_per_epoch(row, 6, 2) == 6


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_an_epoch_is_as_many_updates_as_the_loop_takes(batch_size):
    """Each row behind its controls is two prompts, which are not parted: at batch_size 1 six rows
    are twelve updates."""
    row = methods.get("binary_reward_conditioning")
    world = tables.make_world("binary_reward_conditioning", batch_size=batch_size)
    (group,), updates = group_terms(row), 0
    while group.cursor.epoch == 0 or not group.round.spent:
        if group.round is None or group.round.spent:
            refill(group, world, 0)
        next_minibatch(group)
        updates += 1
    assert updates_per_epoch(row, 6, batch_size) == updates
    assert updates == {1: 12, 2: 6, 3: 6, 4: 3}[batch_size]


def test_offline_epochs_take_every_row_once_and_end_short():
    world = make_world(batch_size=4)
    (group,) = group_terms(methods.get("dpo"))
    rows = []
    for _ in range(4):
        refill(group, world, 0)
        rows.append(group.round.samples.row.tolist())
    assert [len(r) for r in rows] == [4, 2, 4, 2]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == list(range(6))
    assert rows[:2] != rows[2:]  # a fresh order each epoch


def test_order_does_not_depend_on_the_terms_place():
    first = Term(
        source=Offline(), labeller=GivenPreference(), objective=o.dpo, settings={"beta": 0.1}
    )
    fresh = Term(source=OnPolicy(), labeller=Unlabelled(), objective=o.reverse_kl)
    found = []
    for terms in ((first, fresh), (fresh, first)):
        groups = group_terms(methods.Method(name="x", terms=terms))
        world = make_world()
        for group in groups:
            refill(group, world, 0)
        by_source = {type(g.source).__name__: g.round.samples.tokens for g in groups}
        found.append(by_source)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


def test_reference_samples_are_drawn_once():
    world = make_world(batch_size=6)
    (group,) = group_terms(methods.get("best_of_n"))
    assert isinstance(group.source, Reference)
    refill(group, world, 0)
    first = dict(
        zip(group.round.samples.row.tolist(), group.round.samples.tokens.tolist(), strict=True)
    )
    with torch.no_grad():
        world.reference.logits.zero_()  # whatever happens to it, the samples stay
    refill(group, world, 5)
    second = dict(
        zip(group.round.samples.row.tolist(), group.round.samples.tokens.tolist(), strict=True)
    )
    assert first == second
    assert (group.round.samples.origin == -1).all()


def test_leave_one_out_baseline_of_the_round():
    """Baseline of sample j is the mean log-ratio of the other samples of its prompt, by hand."""
    world = make_world(batch_size=2)
    row = methods.configure(methods.get("hypo"), {"samples_per_prompt": 3})
    group = group_terms(row)[1]
    refill(group, world, 0)
    samples, (batch,) = group.round.samples, group.round.batches
    ratio = (samples.logp - samples.ref_logp).squeeze(-1)
    for n in range(2):
        for j in range(3):
            others = [float(ratio[n, i]) for i in range(3) if i != j]
            assert float(batch.data["baseline"][n, 0, j]) == pytest.approx(
                sum(others) / 2, abs=1e-14
            )


def test_expected_gradient_of_the_kl_term_is_the_exact_one():
    """Averaged over many rounds, the loop's KL gradient is that of KL(policy || reference)."""
    world = make_world(batch_size=6)
    row = methods.configure(methods.get("hypo"), {"weight": 1.0})
    groups = group_terms(methods.Method(name="kl", terms=(row.terms[1],)))
    runs, rounds = 1000, 20  # runs of other seeds at once: an update of all costs what one costs
    table, policy = tables.Table(runs=(runs,)), world.policy.logits.expand(runs, -1, -1)
    many = replace(
        world, policy=Categorical(policy), seed=tuple(range(runs)), data=table, prompts=table,
        reference=Categorical(world.reference.logits.expand(runs, -1, -1)),
    )  # fmt: skip
    for _ in range(rounds):  # each adds to the gradient
        loop.gradient(groups, many, 0)
    found = many.policy.logits.grad.sum(0) / (runs * rounds)
    logp, ref = world.policy.logits.log_softmax(-1), world.reference.logits.detach().log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum(-1).mean()
    (expected,) = torch.autograd.grad(exact, world.policy.logits)
    error = (found - expected).abs().max()
    assert error < 0.005 < 0.05 < expected.abs().max()


def test_learning_rate_by_hand():
    s = settings(max_steps=10, learning_rate=1.0, warmup_ratio=0.2)
    assert [loop.learning_rate(s, i) for i in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert loop.learning_rate(replace(s, lr_schedule="constant"), 9) == 1.0
    assert loop.learning_rate(replace(s, lr_schedule="cosine"), 6) == pytest.approx(0.5)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    world = make_world()
    with torch.no_grad():
        world.reference.logits[:, 0] = float("nan")
    before = world.policy.logits.detach().clone()
    with pytest.raises(GuardStop, match="step 1"):
        run("dpo", world)
    assert torch.equal(before, world.policy.logits)


def test_an_update_moves_the_pairs_apart():
    world = make_world()
    world = replace(world, reference=world.policy.frozen_copy())
    _, logged = run("dpo", world, max_steps=40)
    assert logged[-1]["margin"] > 1 and logged[-1]["accuracy"] == 1.0
