"""A source's round: collect, score, label, lay out minibatches.

Terms with an equal source form a group: they use the same samples, minibatches and forward pass,
and with an equal labeller one call of it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from preftune.collecting import Context, Cursor, Data, Source, shared_seed
from preftune.kl_control import INTEGRAL, adapt
from preftune.labellers import State
from preftune.labellers.base import KL_SCALE, SEED, log_ratio
from preftune.method import Method
from preftune.numerics import masked_sum, permutation, stream_key
from preftune.phases import phase
from preftune.policies.base import Policy, Sampler, Trainable
from preftune.policies.scoring import LOGP, outputs_all, score_all
from preftune.policies.sharding import gathered
from preftune.samples import Batch, Samples
from preftune.sources import Offline
from preftune.team import current
from preftune.terms import Term, narrows, prompts_per_update, together

RewardFunction = Callable[[Samples], Tensor | tuple[Tensor, dict[str, Tensor]]]
"""Rewards [*R, N, K] of a round's responses; where they are a sum, also its parts by name."""
PART = "reward:"
"""Before a part's name in `Samples.extra`."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What rounds are made from; the same for the whole run."""

    policy: Trainable
    """A policy, or a reward model where no term draws or asks for log-probs."""
    reference: Policy | None
    data: Data | None
    """What sources that read are given."""
    prompts: Data | None
    """What sources that draw are given; often the same."""
    reward: RewardFunction | None
    """Of responses to `prompts`."""
    seed: int | tuple[int, ...]
    """Of a study, one a run."""
    batch_size: int
    """Items an update takes of each source (before `share`)."""
    micro_batch_tokens: int | None
    """Tokens in one forward pass; None: all at once."""
    data_reward: RewardFunction | None = None
    """Of responses to the prompts of `data`; None: `reward` serves both."""
    known: Callable[[Source, Samples], Tensor | None] | None = None
    """Log-probs by the reference of what a source collected, where they were computed beforehand
    (`preftune.reference_cache`)."""
    engine: Sampler | None = None
    """Draws fresh samples in the policy's place. What it draws is not quite the policy's, or older
    than it: the trainer's log-probs count, and the gap is logged."""


@dataclass
class Round:
    """What a source collected, labelled for each term of its group."""

    samples: Samples
    batches: list[Batch]
    minibatches: list[Tensor]
    """Prompts of each minibatch, in the order in which they are taken."""
    taken: int = 0
    trained_logp: bool = False
    """Log-probs at collection are the trainer's, not those of an inexact sampler."""
    sampler_gap: Tensor | None = None
    """[*R, N, K], nats: of each response, its log-prob by the trainer less that by the sampler,
    where the round has both."""

    @property
    def spent(self) -> bool:
        """No minibatch is left."""
        return self.taken >= len(self.minibatches)


@dataclass
class Group:
    """The terms of one source, with the source's state."""

    source: Source
    terms: list[Term]
    places: list[int]
    """Of the terms in the row."""
    cursor: Cursor = field(default_factory=Cursor)
    kept: dict[int, Samples] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)
    """One a term; equal labellers share one call, so theirs are equal."""
    round: Round | None = None
    target_kl: float | None = None
    leads: bool = False
    """The reference follows the policy at its rounds (reference_update: round)."""
    queries: int = 0
    """Responses that the reward was asked about, a run."""

    @property
    def shows_logp(self) -> bool:
        """The KL of its fresh samples and ratios to their policy are figures of its updates."""
        many = self.source.passes > 1 or self.source.prompts_per_round is not None
        return self.source.on_policy and (many or "ref_logp" in self.needs)

    @property
    def steered(self) -> bool:
        """A KL of its terms is held at the budget."""
        if self.target_kl is None or not self.source.on_policy:
            return False
        return any(t.kl_coefficient for t in self.terms)

    def factor(self, i: int) -> float | Tensor:
        """Weight of its term i now: a KL's follows the budget, [*R]."""
        term = self.terms[i]
        factor = term.factor
        if isinstance(factor, tuple):
            factor = torch.tensor(factor, dtype=torch.float64)
        scale = self.states[i].get(KL_SCALE) if term.penalises_kl else None
        return factor if scale is None else factor * scale

    @property
    def needs(self) -> frozenset[str]:
        """What its rounds are scored with."""
        found = frozenset().union(*(t.needs for t in self.terms))
        return found | {"logp", "ref_logp"} if self.steered else found

    @property
    def outputs(self) -> frozenset[str]:
        """What its terms take of the model in an update."""
        return frozenset().union(*(t.outputs for t in self.terms))

    @property
    def idle(self) -> bool:
        """Every term has weight 0: sampled and logged, no backward pass."""
        return all(t.idle for t in self.terms)

    def prompts_per_update(self, batch_size: int, num_responses: int) -> int:
        """See `terms.prompts_per_update`."""
        return prompts_per_update(self.terms, batch_size, num_responses)


def group_terms(method: Method) -> list[Group]:
    """The row's terms by equal source, in the order of the row."""
    groups = [
        Group(
            source=method.terms[places[0]].source, terms=[method.terms[i] for i in places],
            places=places, states=[{} for _ in places], target_kl=method.target_kl,
        )
        for places in together(method.terms)
    ]  # fmt: skip
    if method.reference_update == "round":
        next((g for g in groups if g.source.on_policy), groups[0]).leads = True
    return groups


def _score(drawn: Samples, group: Group, world: World) -> Round:
    """The round with what the row declares that it needs, each computed once; not yet labelled."""
    budget, needs = world.micro_batch_tokens, group.needs
    own_sampler = world.engine is None and getattr(world.policy, "exact_sampler", False)
    exact = drawn.logp is not None and own_sampler
    own = {"value"} if "value" in needs and drawn.value is None else set()
    if not exact and "logp" in needs:
        own |= {"logp"}
    fresh = _with_outputs(Round(drawn, [], [], trained_logp=exact), world, frozenset(own))
    samples = fresh.samples
    if "ref_logp" in needs and samples.ref_logp is None and world.known is not None:
        samples = replace(samples, ref_logp=world.known(group.source, samples))
    if "ref_logp" in needs and samples.ref_logp is None:
        assert world.reference is not None, "the row needs a reference policy"
        samples = replace(samples, ref_logp=score_all(world.reference, samples, budget))
    if "reward" in needs and samples.reward is None:
        judge = world.reward if group.source.draws else world.data_reward or world.reward
        assert judge is not None, "the row needs a reward"
        with phase("reward"):
            judged = current().judged(judge, samples)
        total, named = judged if isinstance(judged, tuple) else (judged, {})
        extra = samples.extra | {f"{PART}{name}": part for name, part in named.items()}
        samples = replace(samples, reward=total, extra=extra)
        group.queries += samples.row.shape[-1] * samples.tokens.shape[-2]
    return replace(fresh, samples=samples)


def _with_outputs(fresh: Round, world: World, names: frozenset[str]) -> Round:
    """The round with outputs of the policy as it is."""
    if not names:
        return fresh
    drawn = fresh.samples
    found = outputs_all(world.policy, drawn, world.micro_batch_tokens, names)
    fresh = replace(fresh, samples=replace(drawn, **found))
    if "logp" not in found:
        return fresh
    gap = fresh.sampler_gap
    if drawn.logp is not None:
        gap = masked_sum(found["logp"] - drawn.logp, drawn.mask).double()
    return replace(fresh, trained_logp=True, sampler_gap=gap)


def _shown_by_its_update(group: Group, fresh: Round, labelled: list[Batch]) -> bool:
    """Whether the one update of a round computes the log-probs of all of its samples, by the policy
    that drew them: then they need no pass of their own."""
    once = len(fresh.minibatches) == 1 and not group.idle
    return once and not narrows(fresh.samples, labelled)


def _steer(group: Group, samples: Samples) -> None:
    """Move the coefficients of the group's KL towards the budget, by the KL of fresh samples."""
    fresh = samples.origin >= 0  # a pool also holds others
    kl = torch.where(fresh, log_ratio(samples), 0.0).sum((-2, -1)) / fresh.sum((-2, -1))
    for i, term in enumerate(group.terms):
        if term.kl_coefficient:
            assert group.target_kl is not None, "steered groups have a budget"
            group.states[i] = adapt(group.states[i], kl, group.target_kl)


def _context(group: Group, world: World, version: int, given: Samples | None) -> Context:
    """What the group's source may use."""
    source = group.source
    return Context(
        data=world.prompts if source.draws else world.data, policy=world.policy,
        reference=world.reference, version=version, seed=world.seed,
        cursor=group.cursor, kept=group.kept, given=given if source.on_policy else None,
        engine=world.engine,
    )  # fmt: skip


def visited(group: Group, world: World, updates: int) -> Tensor:
    """Rows of the data, ascending, that so many updates from the beginning at most take of a
    source that reads them."""
    source = group.source
    assert isinstance(source, Offline), "only such a source goes through the data by itself"
    ctx = _context(replace(group, cursor=Cursor()), world, 0, None)
    per_update = group.prompts_per_update(world.batch_size, source.num_responses)
    taken = torch.zeros(len(ctx.rows), dtype=torch.bool)
    for _ in range(updates):
        taken[source.next_rows(ctx, per_update)] = True
        if ctx.cursor.epoch:  # one takes every row
            break
    return taken.nonzero().squeeze(-1)


def read(group: Group, world: World, rows: Tensor) -> Samples:
    """What a source that reads the data makes of these rows; its place in them stays."""
    apart = replace(group, cursor=Cursor(), kept={})
    return group.source.collect(_context(apart, world, 0, None), len(rows), rows)


def _collect(group: Group, world: World, version: int, given: Samples | None) -> Samples:
    """The next round's samples, unscored; a leading group first brings the reference along."""
    source = group.source
    ctx = _context(group, world, version, given)
    new_epoch = group.cursor.position == 0 and group.cursor.epoch > 0
    if group.leads and (source.on_policy or new_epoch):
        assert world.reference is not None, "reference_update needs a reference"
        world.reference.follow(world.policy, 0.0)
    per_update = group.prompts_per_update(world.batch_size, source.num_responses)
    return source.collect(ctx, source.prompts_per_round or per_update)


def refill(group: Group, world: World, version: int, given: Samples | None = None) -> None:
    """A new round for the group: collect, score, label, lay out passes x minibatches.

    `given` stands in for what an on-policy source would draw.
    """
    asked = group.source.on_policy or bool(group.needs & {"logp", "value"})
    with gathered(world.policy) if asked else nullcontext():
        group.round = _filled(group, world, version, given)


def _filled(group: Group, world: World, version: int, given: Samples | None) -> Round:
    """The round of `refill`."""
    drawn = group.cursor.drawn
    fresh = _score(_collect(group, world, version, given), group, world)
    samples, labelled = fresh.samples, fresh.batches
    if group.steered:
        _steer(group, samples)
    num_responses = samples.tokens.shape[-2]
    per_update = group.prompts_per_update(world.batch_size, num_responses)

    for i, term in enumerate(group.terms):
        twin = next((j for j in range(i) if group.terms[j].labeller == term.labeller), None)
        own = {SEED: torch.as_tensor(world.seed), **group.states[i]}
        if twin is None:
            batch, group.states[i] = term.labeller(samples, own)
        else:  # what steers a term stays its own
            steering = {k: v for k, v in own.items() if k in (KL_SCALE, INTEGRAL)}
            batch, group.states[i] = labelled[twin], {**group.states[twin], **steering}
        labelled.append(batch)

    num_prompts = samples.row.shape[-1]
    for number in range(group.source.passes):
        # the first pass keeps the order of collection, which is already shuffled
        key = stream_key(shared_seed(world.seed), group.source, "passes", drawn)
        order = permutation(key, number, num_prompts) if number else torch.arange(num_prompts)
        fresh.minibatches.extend(order.split(per_update))
    shown = fresh.trained_logp or _shown_by_its_update(group, fresh, labelled)
    if group.shows_logp and not shown:
        fresh = _with_outputs(fresh, world, LOGP)
    return fresh


def next_minibatch(group: Group) -> tuple[Samples, list[Batch]]:
    """The group's next minibatch: whole prompts, their samples and each term's items."""
    current = group.round
    assert current is not None and not current.spent, "refilled before each update"
    index = current.minibatches[current.taken]
    current.taken += 1
    if len(current.minibatches) == 1:
        return current.samples, current.batches
    return current.samples.take(index), [b.take(index) for b in current.batches]


def updates_per_epoch(method: Method, num_prompts: int, batch_size: int) -> int:
    """Updates that go once through the data: those of the row's first source."""
    group = group_terms(method)[0]
    source = group.source
    per_update = group.prompts_per_update(batch_size, source.num_responses)
    rows = max(1, (source.prompts_per_round or per_update) // source.prompts_per_row)
    # a row is taken whole, though it may make more prompts than an update takes
    updates = -(-rows * source.prompts_per_row // per_update)
    return -(-num_prompts // rows) * source.passes * updates
