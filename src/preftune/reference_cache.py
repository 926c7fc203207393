"""Log-probs of the data under the reference: computed before the first update, kept on disk.

    <cache folder>/reference/<key>/meta.json     every part of the key, spelled out
                                   values.bin    a checksum a block (0: not filled), then token
                                                 log-probs, block after block

A *block* is what one forward pass scores: rows of about equal length, of those that the run will
visit. The key is a hash of all that a bit of a value depends on, the rows of each block included.
So a run is bit for bit the same whatever other runs left in the folder, and a block that is torn
or was changed is filled again with the values that it had. That is also why no lock is needed: two
processes that fill a cache at once write the same bytes, and bytes that are neither's fail the
checksum. A pass over all rows has the same key in every order of them, so it serves all seeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.block_store import Store
from preftune.collecting import Source
from preftune.data import Renderer
from preftune.errors import UserError
from preftune.fingerprint import Tick, as_json, digest, of_computation
from preftune.huggingface import cache_folder
from preftune.method import Method
from preftune.policies.scoring import by_length, score_all, sizes
from preftune.policies.transformer import Transformer
from preftune.rounds import Group, World, group_terms, read, visited
from preftune.samples import Samples
from preftune.sources import Offline, Pool, Reference
from preftune.team import current

FORMAT = 1
"""Of the files; another number makes every cache anew."""
BLOCK_TOKENS = 16_384
"""Of a forward pass, where the run sets no budget."""
_CHUNK = 256
"""Rows that are read at once for their ids and lengths."""


def obstacle(method: Method, reference: Any) -> str | None:
    """Why log-probs of the reference cannot be kept for this run; None: they can.

    Args:
        reference: the run's reference policy, or None.
    """
    if not _readers(group_terms(method)):
        return f"'{method.name}' takes no log-probs of the data by the reference"
    if method.reference_update != "fixed":
        return f"the reference moves (reference_update: {method.reference_update})"
    if not isinstance(reference, Transformer):
        return "the reference is no language model"
    return None


def _readers(groups: Iterable[Group]) -> list[Group]:
    """Groups whose rounds are a function of the data's rows, and are scored by the reference."""
    return [g for g in groups if type(g.source) is Offline and "ref_logp" in g.needs]


def _asks(group: Group) -> bool:
    """Whether the group's rounds cannot do without the reference itself."""

    def draws(source: Any) -> bool:
        members = source.members if isinstance(source, Pool) else ()
        return isinstance(source, Reference) or any(draws(m) for m in members)

    return "ref_logp" in group.needs or draws(group.source)


def text_settings(renderer: Renderer, truncation: str, max_length: int | None) -> dict[str, Any]:
    """How texts become token ids, as parts of the key."""
    return {
        "tokenizer": type(renderer.tokenizer).__name__,
        "template": digest(json.dumps(renderer.template_text, default=str)),
        "system_prompt": renderer.system_prompt,
        "end_ids": list(renderer.end_ids),
        "truncation": truncation,
        "max_length": max_length,
    }


def attach(
    world: World,
    method: Method,
    updates: int,
    text: Mapping[str, Any],
    *,
    note: Callable[[str], None] = lambda message: None,
    tick: Tick = lambda stage, done, total: None,
) -> World:
    """The world with the reference's log-probs of all data that the run will visit.

    They are read from disk, and computed where they do not stand there. The reference is left out
    of the world where no round asks for it any more.

    Args:
        updates: of the whole run, from its beginning (a resumed run has the same blocks).
        text: see `text_settings`.
        note: told where the log-probs are, or why they could not be kept.
        tick: told of stages that take long: how much is done, and of how much.
    """
    reference = world.reference
    if obstacle(method, reference) is not None:
        return world
    assert isinstance(reference, Transformer), "no obstacle"
    tick = _seldom(tick)
    of_model = of_computation(reference, tick)
    tables: dict[Source, Table] = {}
    for plan in plans(world, method, updates, tick):
        meta = {"format": FORMAT, **of_model, "text": dict(text), "rows": plan.described()}
        if current().size > 1:  # who cut the blocks into other passes, which changes rounding
            meta["processes"] = current().size
        folder = cache_folder() / "reference" / digest(as_json(meta))[:32]
        try:
            store = Store(folder, meta, plan.block_tokens, np.dtype(plan.value_type(reference)))
            scored = _fill(store, plan, world, reference, tick)
        except OSError as error:
            if current().size > 1:  # of which the others may have been able to
                raise UserError(
                    f"reference_cache: '{folder}' cannot be written ({error.strerror or error}). "
                    "Free space, or set reference_cache: off."
                ) from error
            note(
                f"reference log-probs could not be kept in '{folder}' "
                f"({error.strerror or error}): they are computed in every update"
            )
            return world
        note(f"reference log-probs of {len(plan.rows)} rows, {scored} computed now: {folder}")
        tables[plan.group.source] = Table.of(plan, store)

    def known(source: Source, samples: Samples) -> Tensor | None:
        return tables[source].look_up(samples) if source in tables else None

    return replace(world, known=known, reference=reference if still_asked(method) else None)


def still_asked(method: Method) -> bool:
    """Whether some round asks the reference itself, where its log-probs of the data are known."""
    groups = group_terms(method)
    readers = _readers(groups)
    return any(_asks(g) for g in groups if g not in readers)


def plans(
    world: World,
    method: Method,
    updates: int,
    tick: Tick = lambda stage, done, total: None,
) -> Iterator["Plan"]:
    """What is scored before so many updates: a plan for each source that reads the data."""
    readers = _readers(group_terms(method))
    for source in dict.fromkeys(g.source for g in readers):
        yield _plan([g for g in readers if g.source == source], world, updates, tick)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows that a run will take of a source, in blocks."""

    group: Group
    rows: Int[Tensor, " M"]
    """Numbers of rows of the data, ascending."""
    tokens: Int[Tensor, " M"]
    """Response tokens of each: of all responses that the source makes of it."""
    blocks: list[Tensor]
    """Places in `rows`, a block each."""
    ids: str
    """Digest of all token ids, by row."""

    @cached_property
    def block_tokens(self) -> list[int]:
        """Response tokens of each block."""
        return [int(self.tokens[block].sum()) for block in self.blocks]

    def described(self) -> dict[str, Any]:
        """Its part of the key."""
        source: Any = self.group.source
        return {
            "take": source.take,
            "count": len(self.rows),
            "ids": self.ids,
            "blocks": digest(as_json([block.tolist() for block in self.blocks])),
            "block_count": len(self.blocks),
            "tokens": sum(self.block_tokens),
        }

    @staticmethod
    def value_type(reference: Transformer) -> str:
        """What log-probs are kept in: the type that they are computed in."""
        return str(reference.trunk.wide).removeprefix("torch.")


def _plan(groups: Sequence[Group], world: World, updates: int, tick: Tick) -> Plan:
    """The rows that groups of one source will visit, and how they are scored together."""
    assert world.data is not None, "a source that reads has data"
    rows = torch.cat([visited(g, world, updates) for g in groups]).unique()
    ids, tokens, size = hashlib.sha256(), [], []
    for i, part in enumerate(rows.split(_CHUNK)):
        s = read(groups[0], world, part)
        each = s.lengths()
        tokens.append(each.view(len(part), -1).sum(-1))
        size.append(torch.tensor(sizes(s)).view(len(part), -1).sum(-1))
        for x in (s.prompt_mask.sum(-1), s.prompt[s.prompt_mask], each, s.tokens[s.mask]):
            ids.update(x.numpy().tobytes())
        ids.update(s.finished.numpy().tobytes())
        tick("reading rows", i * _CHUNK + len(part), len(rows))
    # a power of two: free memory may decide the run's budget, and a little less changes no key
    budget = 1 << ((world.micro_batch_tokens or BLOCK_TOKENS).bit_length() - 1)
    return Plan(
        group=groups[0], rows=rows, tokens=torch.cat(tokens), ids=ids.hexdigest(),
        blocks=by_length(torch.cat(size).tolist(), budget),
    )  # fmt: skip


def _fill(store: Store, plan: Plan, world: World, reference: Transformer, tick: Tick) -> int:
    """Score every block that the store lacks; how many rows these were.

    Several processes score each block together, and each keeps it: on several machines their
    folders may be different ones.
    """
    team = current()
    own = {i for i in range(len(plan.blocks)) if not store.holds(i)}
    lacking = sorted(set().union(*team.gather(own)))
    total = sum(len(plan.blocks[i]) for i in lacking)
    done = scored = 0
    for i in lacking:
        block = plan.blocks[i]
        if team.size > 1 or not store.holds(i):  # another run may have been here in the meantime
            samples = read(plan.group, world, plan.rows[block])
            logp = score_all(reference, samples, None)
            store.put(i, logp[samples.mask].numpy())
            scored += len(block)
        done += len(block)
        tick("reference log-probs", done, total)
    return scored


@dataclass(frozen=True, kw_only=True)
class Table:
    """Log-probs by row of the data, in a memory map."""

    values: np.ndarray
    first: Int[Tensor, " D"]
    """Where each row of the data begins among the values; -1 for a row that is not there."""
    tokens: Int[Tensor, " D"]
    prompts_per_row: int

    @classmethod
    def of(cls, plan: Plan, store: Store) -> "Table":
        """The table of a filled store."""
        order = torch.cat(plan.blocks)
        rows, tokens = plan.rows[order], plan.tokens[order]
        count = int(plan.rows.max()) + 1
        first = torch.full((count,), -1).index_put((rows,), tokens.cumsum(0) - tokens)
        by_row = torch.zeros(count, dtype=torch.long).index_put((rows,), tokens)
        return cls(
            values=store.values, first=first, tokens=by_row,
            prompts_per_row=plan.group.source.prompts_per_row,
        )  # fmt: skip

    def look_up(self, samples: Samples) -> Float[Tensor, "N K T"]:
        """Token log-probs of what the source collected; 0 where masked."""
        rows = samples.row[:: self.prompts_per_row]
        first, tokens = self.first[rows], self.tokens[rows]
        here = samples.lengths().view(len(rows), -1).sum(-1)
        assert bool((first >= 0).all()) and torch.equal(here, tokens), "rows that were not planned"
        spans = zip(first.tolist(), tokens.tolist(), strict=True)
        flat = torch.from_numpy(np.concatenate([self.values[a : a + n] for a, n in spans]))
        return torch.zeros(samples.mask.shape, dtype=flat.dtype).masked_scatter(samples.mask, flat)


def _seldom(tick: Tick) -> Tick:
    """The tick a second after the last at the earliest, ever more seldom in a long stage, and at
    the end of every stage that was told of."""
    began = last = time.perf_counter()
    told = ""

    def passed(stage: str, done: int, total: int) -> None:
        nonlocal last, told
        now = time.perf_counter()
        if now - last > max(1.0, (now - began) / 50) or (told == stage and done == total):
            last, told = now, stage
            tick(stage, done, total)

    return passed
