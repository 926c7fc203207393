"""What an update logs, each figure worked out by hand on a small round."""

import math
import re
from dataclasses import replace

import pytest
import torch

import tables
from preftune import loop, methods
from preftune import objectives as o
from preftune.labellers import Advantage, AllPairs
from preftune.measures import DOCUMENTED
from preftune.method import Method
from preftune.policies.categorical import Categorical
from preftune.rounds import Group, World, group_terms, refill
from preftune.samples import Samples
from preftune.sources import Offline, OnPolicy, Pool, Reference
from preftune.terms import Term
from tables import Table, f64, make_world, row_of

CLIP = 0.2


def clipped(k: int = 3, **more) -> Method:
    labeller = Advantage(kl=0.1)
    term = Term(source=OnPolicy(samples_per_prompt=k), labeller=labeller, objective=o.ppo_clip,
                settings={"clip": CLIP}, level="token", **more)  # fmt: skip
    return Method(name="x", terms=(term,))


def moved(world: World) -> None:
    """Weights other than those that drew the round."""
    with torch.no_grad():
        world.policy.logits.add_(0.4 * tables.logits(9, *world.policy.logits.shape))


def likelier(group: Group, world: World) -> None:
    """Every response of its round more likely than when it was drawn."""
    s = group.round.samples
    with torch.no_grad():
        for k in range(s.tokens.shape[1]):
            world.policy.logits[s.row, s.tokens[:, k, 0]] += 0.5


def after_a_move(row: Method, world: World, version: int = 5) -> tuple[Group, Samples, dict]:
    """The round collected at version 2, the policy moved since; what the update then measures."""
    groups = group_terms(row)
    refill(groups[0], world, 2)
    moved(world)
    loss, metrics = tables.gradient(groups, world, version)
    return groups[0], groups[0].round.samples, metrics | {"loss": float(loss)}


@pytest.mark.parametrize("budget", [None, 1, 9])
def test_figures_of_a_stale_round(budget):
    """Ratios of 18 responses by hand; the same whatever the micro-batches are."""
    world = make_world("rloo", batch_size=6, micro_batch_tokens=budget)
    start = world.policy.logits.detach().log_softmax(-1).tolist()
    ref = world.reference.logits.detach().log_softmax(-1).tolist()
    _, samples, metrics = after_a_move(clipped(), world)
    now = world.policy.logits.detach().log_softmax(-1).tolist()
    pairs = [(s, a) for s, row in zip(samples.row.tolist(), samples.tokens.tolist(), strict=True)
             for (a,) in row]  # fmt: skip
    ratio = [math.exp(now[s][a] - start[s][a]) for s, a in pairs]
    n = len(ratio)
    assert n == 18
    advantage = [a - 0.1 * (start[s][a] - ref[s][a]) for s, a in pairs]
    clipped_ratio = [min(max(r, 1 - CLIP), 1 + CLIP) for r in ratio]
    by_hand = {
        "loss": -sum(
            min(r * a, c * a) for r, c, a in zip(ratio, clipped_ratio, advantage, strict=True)
        )
        / n,
        "ratio_mean": sum(ratio) / n,
        "ratio_max": max(ratio),
        "effective_sample_size": sum(ratio) ** 2 / (n * sum(r * r for r in ratio)),
        "clip_fraction": sum(abs(r - 1) > CLIP for r in ratio) / n,
        "kl": sum(start[s][a] - ref[s][a] for s, a in pairs) / n,  # at collection
        "logp": sum(now[s][a] for s, a in pairs) / n,
        "reward": sum(a for _, a in pairs) / n,
        "staleness": 3,
        "length": 1,
        "no_end": 0,
    }
    assert 0 < by_hand["clip_fraction"] < 1 and by_hand["effective_sample_size"] < 0.99
    for name, value in by_hand.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name
    assert "sampler_gap" not in metrics and "skipped" not in metrics


def test_a_fresh_round_has_ratio_one():
    _, logged = tables.run(clipped(), make_world("rloo"), 1)
    first = logged[0]
    assert (first["ratio_mean"], first["ratio_max"], first["effective_sample_size"]) == (1, 1, 1)
    assert first["clip_fraction"] == first["staleness"] == first["sampler_gap"] == 0


def test_explained_variance_of_the_values_at_collection():
    """One token, so the target is the reward less its KL; values 0.5 s of state s."""
    world = make_world("ppo", batch_size=6)
    with torch.no_grad():
        world.policy.values.copy_(0.5 * torch.arange(6.0))
    row = row_of("ppo", kl=0.0)
    metrics = tables.gradient(groups := group_terms(row), world, 0)[1]
    s = groups[0].round.samples
    target = [float(a) for a in s.tokens.flatten()]
    value = [0.5 * r for r in s.row.tolist()]

    def variance(x: list[float]) -> float:
        return sum((v - sum(x) / len(x)) ** 2 for v in x) / len(x)

    errors = [t - v for t, v in zip(target, value, strict=True)]
    expected = 1 - variance(errors) / variance(target)
    assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-12)
    off = abs(sum(errors) / len(errors)) / variance(target) ** 0.5
    assert metrics["value_offset"] == pytest.approx(off, abs=1e-12)


def test_no_variance_leaves_nothing_to_explain():
    same = make_world("ppo", reward=lambda s: torch.ones(s.finished.shape, dtype=torch.float64))
    metrics = tables.gradient(group_terms(row_of("ppo", kl=0.0)), same, 0)[1]
    assert metrics["explained_variance"] is None and metrics["value_offset"] is None


def test_ties_are_counted():
    """Rewards (0, 0, 1) of each prompt: of three couples one ties, at a threshold of 1 all do."""

    def two_alike(samples: Samples) -> torch.Tensor:
        return f64([0.0, 0.0, 1.0]).expand(samples.finished.shape)

    for threshold, pairs, tied in ((0.0, 8, 4), (1.0, 0, 12)):
        term = Term(source=OnPolicy(samples_per_prompt=3), labeller=AllPairs(threshold=threshold),
                    objective=o.dpo, settings={"beta": 0.1})  # fmt: skip
        world = make_world(reward=two_alike, batch_size=12)
        loss, metrics = tables.gradient(group_terms(Method(name="x", terms=(term,))), world, 0)
        assert (metrics["pairs"], metrics["tied"]) == (pairs, tied)
        assert (loss is None) == (pairs == 0)


def test_pairs_of_the_data_do_not_tie():
    metrics = tables.gradient(group_terms(row_of("dpo")), make_world(), 0)[1]
    assert metrics["pairs"] == 4 and "tied" not in metrics


def test_margin_and_accuracy_of_the_pairs():
    """Log-ratios of the four pairs by hand."""
    world = make_world()
    _, metrics = tables.gradient(groups := group_terms(row_of("dpo")), world, 0)
    h = (world.policy.logits.log_softmax(-1) - world.reference.logits.log_softmax(-1)).tolist()
    rows = groups[0].round.samples.row.tolist()
    chosen = [h[s][s % 5] for s in rows]
    rejected = [h[s][(s + 1) % 5] for s in rows]
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert metrics["log_ratio_chosen"] == pytest.approx(sum(chosen) / 4, abs=1e-12)
    assert metrics["log_ratio_rejected"] == pytest.approx(sum(rejected) / 4, abs=1e-12)
    assert metrics["margin"] == pytest.approx(sum(gaps) / 4, abs=1e-12)
    assert metrics["accuracy"] == sum(g > 0 for g in gaps) / 4


def test_losses_of_each_term_before_their_weights():
    _, logged = tables.run(row_of("hypo", weight=0.5), make_world("hypo"), 1)
    first = logged[0]
    assert first["loss"] == pytest.approx(first["loss_0"] + 0.5 * first["loss_1"], abs=1e-12)
    assert "loss_0" not in tables.run(row_of("dpo"), make_world(), 1)[1][0]


def test_what_the_reward_was_asked():
    """Responses over the whole run: two passes ask once, scored data and rows without none."""
    _, logged = tables.run(row_of("on_policy_dpo"), make_world(), 4)  # 4 prompts x 2, 2 updates
    assert [m["reward_queries"] for m in logged] == [8, 8, 16, 16]
    _, logged = tables.run(row_of("rloo"), make_world(), 3)
    assert [m["reward_queries"] for m in logged] == [16, 32, 48]
    _, logged = tables.run(row_of("best_of_n"), make_world("best_of_n"), 1)
    assert logged[0]["reward_queries"] == 16
    assert "reward_queries" not in tables.run(row_of("hypo"), make_world("hypo"), 1)[1][0]
    scores = Table(extra={"score_chosen": (1.0,) * 6, "score_rejected": (0.0,) * 6})
    world = make_world("offline_rwr", table=scores, reward=None)
    row = row_of("offline_rwr")
    told = replace(row.terms[0], source=replace(row.terms[0].source, scored=True))
    _, logged = tables.run(replace(row, terms=(told,)), world, 1)
    assert "reward_queries" not in logged[0]


def test_a_pool_shows_its_fresh_samples_alone():
    """KL, length, staleness and ratios are the policy's own samples': here the second of three."""
    members = (
        Offline(take="chosen"),
        OnPolicy(samples_per_prompt=1),
        Reference(samples_per_prompt=1),
    )
    term = Term(source=Pool(members=members), labeller=AllPairs(kl=0.1), objective=o.dpo,
                settings={"beta": 0.1})  # fmt: skip
    world = make_world("xpo", batch_size=18)
    start = world.policy.logits.detach().log_softmax(-1)
    _, s, metrics = after_a_move(Method(name="x", terms=(term,)), world)
    now = world.policy.logits.detach().log_softmax(-1)
    ref = world.reference.logits.log_softmax(-1).detach()
    own = s.tokens[:, 1, 0]
    ratio = (now - start)[s.row, own].exp()
    assert metrics["kl"] == pytest.approx(float((start - ref)[s.row, own].mean()), abs=1e-12)
    assert metrics["staleness"] == 3
    assert metrics["ratio_mean"] == pytest.approx(float(ratio.mean()), abs=1e-12)
    assert metrics["ratio_max"] == pytest.approx(float(ratio.max()), abs=1e-12)
    size = float(ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()))
    assert metrics["effective_sample_size"] == pytest.approx(size, abs=1e-12)


@pytest.mark.parametrize("name", ["on_policy_dpo", "on_policy_best_of_n"])
def test_the_kl_is_of_all_fresh_samples_and_not_of_the_best(name):
    """Of eight samples one or two are trained; those were picked by their reward, so that the mean
    log-ratio over them is no estimate of the KL."""
    kl = {"kl": 0.01} if name == "on_policy_best_of_n" else {}
    row = row_of(name, samples_per_prompt=8, **kl)
    metrics = tables.gradient(groups := group_terms(row), make_world(name), 0)[1]
    s = groups[0].round.samples
    assert metrics["kl"] == pytest.approx(float((s.logp - s.ref_logp).mean()), abs=1e-12)


class Engine(Categorical):
    """Its sampler reports log-probs that are 0.125 nats too high."""

    exact_sampler = False

    def sample(self, *args):
        drawn = super().sample(*args)
        return replace(drawn, logp=drawn.logp + 0.125)


@pytest.mark.parametrize("name", ["rloo", "ppo", "on_policy_dpo", "hypo", "grpo"])
def test_the_gap_of_a_sampler_is_seen_and_the_trainers_log_probs_are_used(name):
    """Where a row needs log-probs at collection they are the trainer's, and the gap is logged all
    the same."""
    world = make_world(name)
    policy = Engine(world.policy.logits, value_head=name == "ppo")
    world = replace(world, policy=policy)
    groups = group_terms(row_of(name))
    metrics = tables.gradient(groups, world, 0)[1]
    s = groups[-1].round.samples
    if "logp" in groups[-1].needs:
        expected = policy.score(s.prompt, s.prompt_mask, s.tokens, s.mask).detach()
        torch.testing.assert_close(s.logp, expected, rtol=0, atol=1e-14)
    assert metrics["sampler_gap"] == pytest.approx(0.125, abs=1e-12)


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_how_uneven_a_samplers_gap_is(name):
    """Of an engine whose log-probs are 0.3 nats too high for each arm's number: the gap's mean, its
    largest, and what is left of the samples, in rows that score a round and in rows that do not."""

    class Uneven(Categorical):
        def sample(self, *args):
            drawn = super().sample(*args)
            return replace(drawn, logp=drawn.logp + 0.3 * drawn.tokens.double())

    world = make_world(name)
    world = replace(world, engine=Uneven(world.policy.logits))
    if name == "ppo":
        world = replace(world, policy=Categorical(world.policy.logits, value_head=True))
    groups = group_terms(row_of(name))
    metrics = tables.gradient(groups, world, 0)[1]
    s = groups[0].round.samples
    if name == "ppo":  # whose ratio is to the trainer's log-probs, not to the engine's
        by_trainer = world.policy.score(s.prompt, s.prompt_mask, s.tokens, s.mask).detach()
        torch.testing.assert_close(s.logp, by_trainer, rtol=0, atol=1e-14)
    off = 0.3 * s.tokens.double().flatten()
    weight = (-off).exp()
    expected = weight.sum() ** 2 / (weight**2).sum() / len(weight)
    assert metrics["sampler_gap"] == pytest.approx(float(off.mean()), abs=1e-12)
    assert metrics["sampler_gap_max"] == pytest.approx(float(off.max()), abs=1e-12)
    assert metrics["sampler_effective_sample_size"] == pytest.approx(float(expected), abs=1e-12)
    assert 0 < expected < 0.99


@pytest.mark.parametrize("name", ["on_policy_dpo", "ppo", "hypo"])
def test_a_samplers_gap_is_no_kl_and_no_staleness(name):
    """At the reference, before the first step: KL 0 and ratio 1, whatever the sampler reports, also
    where the row itself asks for no log-probs at collection."""
    world = make_world(name, at_reference=True)
    world = replace(world, policy=Engine(world.policy.logits, value_head=name == "ppo"))
    metrics = tables.gradient(group_terms(row_of(name)), world, 0)[1]
    assert metrics["kl"] == pytest.approx(0, abs=1e-12)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-12)


def test_an_update_is_left_out_where_its_ratio_is_too_large():
    """Weights, optimizer and version stay; the step counts."""
    world = make_world("rloo", batch_size=6)
    state, settings = tables.begin(clipped(max_ratio=1.001), world, 3)
    refill(state.groups[0], world, 0)
    likelier(state.groups[0], world)
    before = world.policy.logits.detach().clone()
    metrics = loop.update(state, settings)
    assert metrics["ratio_mean"] > 1.001 and metrics["skipped"] == 1
    assert torch.equal(world.policy.logits, before)
    assert (state.step, state.version) == (1, 0) and not state.optimizer.state_dict()["state"]
    metrics = loop.update(state, settings)  # a fresh round
    assert metrics["skipped"] == 0 and (state.step, state.version) == (2, 1)
    assert not torch.equal(world.policy.logits, before)


def test_a_moving_average_waits_while_updates_are_left_out():
    world = make_world("rloo", batch_size=6)
    row = replace(clipped(max_ratio=1.001), reference_update="ema")
    state, settings = tables.begin(row, world, 1)
    refill(state.groups[0], world, 0)
    likelier(state.groups[0], world)
    before = world.reference.logits.detach().clone()
    assert loop.update(state, settings)["skipped"] == 1
    assert torch.equal(world.reference.logits, before)


def test_only_a_term_with_a_limit_can_leave_an_update_out():
    world = make_world("rloo", batch_size=6)
    state, settings = tables.begin(clipped(), world, 1)
    refill(state.groups[0], world, 0)
    likelier(state.groups[0], world)
    assert "skipped" not in loop.update(state, settings) and state.version == 1


@pytest.mark.parametrize("name", list(methods.table()))
def test_every_figure_that_a_row_logs_is_documented(name):
    kl = {"kl": 0.05} if name in ("rloo", "reinforce", "rwr", "on_policy_dpo", "xpo") else {}
    row = methods.resolve(methods.configure(methods.get(name), kl))
    fresh = any(t.source.on_policy and t.kl_coefficient for t in row.terms)
    row = replace(row, target_kl=0.3 if fresh else None)
    _, logged = tables.run(row, make_world(name), 2)
    names = {re.sub(r"^loss_\d+$", "loss_I", n) for metrics in logged for n in metrics}
    assert names - {"step"} <= set(DOCUMENTED)
    assert {"loss", "learning_rate", "grad_norm", "seconds"} <= names
    assert ("kl_coefficient" in names) == fresh
