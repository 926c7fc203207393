"""The gradient of one update: a minibatch of every source, in micro-batches that fit the memory."""

import copy
import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.errors import UserError
from preftune.measures import Measures
from preftune.phases import phase
from preftune.policies.scoring import micro_batches, sizes
from preftune.rounds import Group, World, next_minibatch, refill
from preftune.samples import Batch, Samples
from preftune.team import Team, current
from preftune.terms import count, loss_sum, narrow, trimmed

log = logging.getLogger("preftune")


@dataclass
class Minibatch:
    """What one source brings to an update."""

    group: Group
    samples: Samples
    labelled: list[Batch]
    counts: list[Tensor]
    """Items of each term, [*R]: what its sum is divided by."""


@dataclass
class Found:
    """What a gradient came with."""

    loss: Tensor | None
    """[*R], float64; None where no item remains in any run."""
    items: Tensor
    """[*R]: some item remains in this run."""
    measures: Measures
    minibatches: list[Minibatch]
    micro_batch_tokens: int | None
    """What fitted: the world's, or less."""


def gradient(
    groups: Sequence[Group],
    world: World,
    version: int,
    given: Samples | None = None,
    measure: bool = True,
) -> Found:
    """Accumulate one update's gradient in the policy's parameters, which have none before.

    Each term is normalised by its own count over the whole minibatch, known before the first
    forward, so neither the size of the micro-batches nor the number of processes matters.

    Raises:
        UserError: not even one prompt with its responses fits the memory.
    """
    shape = world.policy.batch_shape
    found = torch.zeros(shape, dtype=torch.bool)
    measures = Measures(shape, on=measure)
    for group in sorted(groups, key=lambda g: not g.leads):  # it brings the reference along
        if group.round is None or group.round.spent:
            refill(group, world, version, given)
    todo: list[Minibatch] = []
    for group in groups:
        samples, labelled = next_minibatch(group)
        measures.minibatch(group, samples, labelled, version)
        samples, labelled = narrow(samples, labelled)
        counts = [count(t, samples, b) for t, b in zip(group.terms, labelled, strict=True)]
        left = torch.stack(counts).amax(0) > 0
        if bool(left.any()):
            found = found if group.idle else found | left
            todo.append(Minibatch(group, samples, labelled, counts))
    total, measures, budget = _as_it_fits(todo, world, measures)
    return Found(total if bool(found.any()) else None, found, measures, todo, budget)


def _as_it_fits(
    todo: list[Minibatch], world: World, measures: Measures
) -> tuple[Tensor, Measures, int | None]:
    """The loss, what was measured, and the budget: halved, and all done again, while memory runs
    out in some process."""
    budget, team = world.micro_batch_tokens, current()
    while True:
        measured = copy.deepcopy(measures)
        own = measured if team.size == 1 else measured.apart()
        total = None
        try:
            total = _accumulate(todo, world, budget, own)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if team.sharded:  # the others are in the middle of this pass
                raise UserError(
                    f"out of memory in passes of {budget} tokens. Lower micro_batch_tokens, or set "
                    "activation_checkpointing: on."
                ) from error
        # behind the handler, whose traceback holds the activations
        shares = [(x, m) for x, m in team.gather((total, own)) if x is not None]
        if len(shares) == team.size:
            return _summed(shares, world, measured, team), measured, budget
        for parameter in world.policy.parameters():
            parameter.grad = None
        budget = _smaller(todo, budget)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        log.warning("out of memory: micro-batches of %d tokens from here on", budget)


def _summed(
    shares: list[tuple[Tensor, Measures]], world: World, measured: Measures, team: Team
) -> Tensor:
    """The whole loss from the processes' shares; their measures and gradients put together.

    One sum of the gradients after the last pass is what DDP's hooks would come to; these ask for
    as many backward passes in every process, which minibatches of whole prompts do not give.
    """
    if team.size > 1:
        measured.absorb(m for _, m in shares)
        team.add_gradients(list(world.policy.parameters()))
    return sum((x for x, _ in shares[1:]), shares[0][0])


def out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _smaller(todo: list[Minibatch], budget: int | None) -> int:
    """Half of the largest micro-batch's tokens.

    Raises:
        UserError: it is one prompt.
    """
    parts = [
        [sizes(m.samples)[i] for i in index.tolist()]
        for m in todo
        for index in micro_batches(m.samples, budget)
    ]
    largest = max(parts, key=sum)
    if len(largest) == 1:
        raise UserError(
            f"out of memory in a batch of one prompt with its responses ({largest[0]} tokens). "
            "Lower max_length, max_new_tokens or samples_per_prompt, or set "
            "activation_checkpointing: on."
        )
    return sum(largest) // 2


def _accumulate(
    todo: list[Minibatch], world: World, budget: int | None, measures: Measures
) -> Tensor:
    """Gradients of this process's share of it; its share of the loss, [*R]."""
    shape, team = world.policy.batch_shape, current()
    total = torch.zeros(shape, dtype=torch.float64)
    work: list[tuple[Minibatch, Samples, list[Batch]]] = []
    for m in todo:
        parts = micro_batches(m.samples, budget)
        for index in parts:
            part, items = m.samples, m.labelled
            if len(parts) > 1:
                part, items = part.take(index), [b.take(index) for b in items]
            work.append((m, *trimmed(part, items)))
    if not shape:
        # most memory is taken by the largest: it goes first, while there are no gradients yet
        work.sort(key=lambda w: -sum(sizes(w[1])))
    trained, idle = ([w for w in work if w[0].group.idle == x] for x in (False, True))
    for (m, part, items), counts in [*team.turns(trained), *team.turns(idle)]:
        with phase("train", 0 if shape else sum(sizes(part))):
            loss = _micro_batch(m.group, world, part, items, m.counts, measures if counts else None)
        total = total + loss if counts else total
    return total


def _micro_batch(
    group: Group,
    world: World,
    samples: Samples,
    labelled: list[Batch],
    counts: list[Tensor],
    measures: Measures | None,
) -> Tensor:
    """Forward and backward pass of some of a minibatch's prompts; its share of the loss, [*R].

    Args:
        measures: None for a pass that does not count: nothing is measured, its gradient is 0.
    """
    with torch.set_grad_enabled(not group.idle):
        now = world.policy.outputs(samples, group.outputs)
        if measures is None:
            loss = 0 * torch.stack([x.sum() for x in now.values()]).sum()
        else:
            measures.outputs(group, samples, now)
            loss = _loss(group, samples, labelled, counts, measures, now)
    if not group.idle:
        loss.sum().backward()
    return loss.detach().double()


def _loss(
    group: Group,
    samples: Samples,
    labelled: list[Batch],
    counts: list[Tensor],
    measures: Measures,
    now: Mapping[str, Tensor],
) -> Tensor:
    """Weighted sum of the terms' means, [*R], of which these samples are a part."""
    dtype = next(iter(now.values())).dtype
    loss = torch.zeros(counts[0].shape, dtype=dtype)
    for i, (term, batch, n) in enumerate(zip(group.terms, labelled, counts, strict=True)):
        summed, arguments = loss_sum(term, samples, batch, now)
        mean = summed / n.clamp(min=1).to(dtype)
        measures.term(group, i, samples, batch, arguments, mean)
        loss = loss + group.factor(i) * mean if not term.idle else loss
    return loss
