"""A KL budget: the controller by hand, what it holds on a table, and that a run resumes with it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tables
from preftune import checkpoint, loop
from preftune import objectives as o
from preftune.kl_control import adapt
from preftune.labellers import BestWorst, Unlabelled
from preftune.labellers.base import KL_SCALE
from preftune.method import Method
from preftune.rounds import group_terms, refill
from preftune.sources import OnPolicy, Pool, Reference
from preftune.terms import Term
from tables import Table, f64, make_world, row_of

pytestmark = pytest.mark.long

TARGET = 0.3


def test_the_controller_by_hand():
    """Errors (kl - 0.3) / 0.3 within -1 to 1. Below half of the budget (error < -0.5) the integral
    takes 0.02 of the error, else 0.1; the factor is exp(integral + error)."""
    state, integral = {}, 0.0
    steps = (
        (0.0, 0.02),
        (0.1, 0.02),
        (0.135, 0.02),
        (0.15, 0.1),
        (0.24, 0.1),
        (0.3, 0.1),
        (0.45, 0.1),
        (9.0, 0.1),
    )
    for kl, gain in steps:
        error = min(1.0, max(-1.0, (kl - TARGET) / TARGET))
        integral += gain * error
        state = adapt(state, f64(kl), TARGET)
        assert float(state[KL_SCALE]) == pytest.approx(math.exp(integral + error), rel=1e-7)
    assert integral == pytest.approx(-0.02 - 0.04 / 3 - 0.011 - 0.05 - 0.02 + 0.05 + 0.1, abs=1e-12)


def test_on_the_budget_nothing_moves():
    state = adapt({"other": f64(3.0)}, f64(TARGET), TARGET)
    assert float(state[KL_SCALE]) == 1.0 and float(state["other"]) == 3.0


@pytest.mark.parametrize(("kl", "limit"), [(100.0, 6.9 + 1), (-100.0, -6.9 - 1)])
def test_the_factor_has_bounds(kl, limit):
    """A thousand times at most, and the proportional part."""
    state = {}
    for _ in range(600):
        state = adapt(state, f64(kl), TARGET)
    assert math.log(float(state[KL_SCALE])) == pytest.approx(limit, abs=1e-9)


def test_each_run_has_its_own_factor():
    state, alone = {}, [{}, {}, {}]
    for kls in ((0.0, 0.3, 5.0), (0.2, 0.6, 0.1)):
        state = adapt(state, f64(kls), TARGET)
        for r in range(3):
            alone[r] = adapt(alone[r], f64(kls[r]), TARGET)
    assert state[KL_SCALE].tolist() == [float(a[KL_SCALE]) for a in alone]


S, A = 16, 8
TABLE = Table(rows=tuple((s % A, (s + 3) % A) for s in range(S)))


def held(name: str, steps: int, runs: tuple[int, ...] = (), **settings) -> Tensor:
    """Exact KL(policy || reference), the mean over states and over the last quarter of updates."""
    table = replace(TABLE, runs=runs)
    world = make_world(name, table=table, shape=(S, A), batch_size=32, at_reference=True)
    if runs:
        world = replace(world, seed=(0,) * runs[0])
    row = row_of(name, **settings)
    state, how = tables.begin(row, world, steps, 0.05, lr_schedule="constant", warmup_ratio=0.0)
    found: list[Tensor] = []
    loop.advance(
        state, how, loop.Hooks(log=lambda *_: found.append(tables.exact_kl(world).mean(-1)))
    )
    return torch.stack(found[-(steps // 4) :]).mean(0)


def held_at_each(
    name: str, steps: int, coefficient: str, values: tuple[float, ...], **settings
) -> list[float]:
    """Of each value; a term's weight may differ between the runs of one program, which cost little
    more than one of them, a KL in the reward may not."""
    if coefficient == "weight":
        return held(name, steps, (len(values),), weight=values, **settings).tolist()
    return [float(held(name, steps, **{coefficient: v}, **settings)) for v in values]


@pytest.mark.parametrize(
    ("name", "coefficient", "values", "steps"),
    [
        pytest.param("ppo", "kl", (0.05, 1.5), 400, marks=pytest.mark.slow),
        pytest.param("rloo", "kl", (0.05, 1.5), 240, marks=pytest.mark.slow),
        pytest.param("hypo", "weight", (0.005, 0.15), 240, marks=pytest.mark.slow),
    ],
)
def test_the_budget_is_held_from_coefficients_far_apart(name, coefficient, values, steps):
    """A factor of 30 apart: within 40 % of 0.3 nats each; left alone they end far from another."""
    with_budget = held_at_each(name, steps, coefficient, values, target_kl=TARGET)
    without = held_at_each(name, 120, coefficient, values)
    assert all(abs(kl - TARGET) < 0.4 * TARGET for kl in with_budget), with_budget
    assert max(without) > 2 * min(without), without
    assert max(with_budget) < 1.3 * min(with_budget), with_budget


@pytest.mark.parametrize("name", ["ppo", "hypo", "rloo"])
def test_the_factor_is_in_the_state_and_multiplies_the_coefficient(name):
    kl = {} if name == "hypo" else {"kl": 0.05}
    state, logged = tables.run(row_of(name, target_kl=TARGET, **kl), make_world(name), 3)
    group = state.groups[-1]
    assert group.steered
    for term, found in zip(group.terms, group.states, strict=True):
        assert found[KL_SCALE].shape == ()
        coefficient = float(term.kl_coefficient * found[KL_SCALE])
        assert logged[-1]["kl_coefficient"] == pytest.approx(coefficient, rel=1e-12)
    assert "kl_coefficient" not in tables.run(row_of(name, **kl), make_world(name), 1)[1][0]


def test_the_weight_of_a_kl_term_follows_and_others_stay():
    group = group_terms(row_of("hypo", target_kl=TARGET))[1]
    group.states[0] = {KL_SCALE: f64(4.0)}
    assert float(group.factor(0)) == pytest.approx(4 * 0.005, rel=1e-12)
    reward = group_terms(row_of("ppo", target_kl=TARGET))[0]
    reward.states = [{KL_SCALE: f64(4.0)}] * 2
    assert [reward.factor(i) for i in range(2)] == [1.0, 0.1]  # there it scales the reward's KL


def test_offline_terms_are_not_steered():
    assert [g.steered for g in group_terms(row_of("hypo", target_kl=TARGET))] == [False, True]
    assert not any(g.steered for g in group_terms(row_of("hypo")))
    assert not any(g.steered for g in group_terms(row_of("rloo", target_kl=TARGET)))  # kl is 0


def test_the_kl_is_that_of_the_rounds_own_samples():
    """One round by hand: the mean log-ratio, of the round that the coefficient then serves."""
    world = make_world("hypo")
    group = group_terms(row_of("hypo", target_kl=TARGET))[1]
    refill(group, world, 0)
    s = group.round.samples
    kl = sum((s.logp - s.ref_logp).flatten().tolist()) / s.tokens.numel()
    error = min(1.0, max(-1.0, (kl - TARGET) / TARGET))
    gain = 0.02 if error < -0.5 else 0.1
    assert float(group.states[0][KL_SCALE]) == pytest.approx(math.exp(error * (1 + gain)), rel=1e-7)


def test_a_pools_budget_is_measured_on_its_fresh_samples():
    """Not on those of the reference or of the data, whose log-ratio says nothing of the KL."""
    members = (OnPolicy(samples_per_prompt=2), Reference(samples_per_prompt=2))
    term = Term(source=Pool(members=members), labeller=BestWorst(kl=0.1), objective=o.dpo,
                settings={"beta": 0.1})  # fmt: skip
    world = make_world("xpo")
    with torch.no_grad():  # a KL near the budget, so that no bound hides what is measured
        world.policy.logits.copy_(0.7 * world.reference.logits + 0.3 * world.policy.logits)
    (group,) = group_terms(Method(name="x", terms=(term,), target_kl=1.0))
    refill(group, world, 0)
    s = group.round.samples
    fresh = (s.logp - s.ref_logp).squeeze(-1)[s.origin >= 0]
    expected = adapt({}, fresh.mean(), 1.0)
    torch.testing.assert_close(group.states[0][KL_SCALE], expected[KL_SCALE], rtol=0, atol=1e-12)


def test_a_term_with_an_equal_labeller_does_not_reset_the_controller():
    """Two terms on one source with one labeller; the KL's, which is steered, stands second."""
    source = OnPolicy(samples_per_prompt=2)
    other = Term(source=source, labeller=Unlabelled(), objective=o.nll, weight=0.01)
    kl = Term(source=source, labeller=Unlabelled(), objective=o.reverse_kl, weight=0.1)
    for terms in ((kl, other), (other, kl)):
        (group,) = group_terms(Method(name="x", terms=terms, target_kl=TARGET))
        refill(group, make_world("hypo"), 0)
        place = terms.index(kl)
        assert KL_SCALE in group.states[place], place
        assert float(group.factor(place)) != 0.1


def test_the_controller_survives_a_checkpoint(tmp_path):
    """Saved in mid-run, loaded into a fresh one: the same factors, then the same weights."""
    row = row_of("ppo", target_kl=TARGET)
    straight, settings = tables.begin(row, make_world("ppo"), 7)
    for _ in range(4):
        loop.update(straight, settings)
    path = checkpoint.save(straight, tmp_path)
    again, _ = tables.begin(row, make_world("ppo"), 7)
    checkpoint.load(again, path)
    for a, b in zip(straight.groups, again.groups, strict=True):
        for x, y in zip(a.states, b.states, strict=True):
            assert x.keys() == y.keys() >= {KL_SCALE, "kl_integral"}
            assert all(torch.equal(x[k], y[k]) for k in x)
    for _ in range(3):
        metrics = [loop.update(run, settings)["kl_coefficient"] for run in (straight, again)]
        assert metrics[0] == metrics[1]
    assert torch.equal(straight.world.policy.logits, again.world.policy.logits)
