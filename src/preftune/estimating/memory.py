"""Bytes that a run takes, from shapes and from the largest of what it does.

The peak is that of the fullest stage. What a stage holds beside the models is what its largest
step keeps: a training pass its activations, and behind the first one the gradients with them;
decoding the prepared weights, keys, values and logits; a checkpoint a copy of what it writes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preftune import automatic, reference_cache
from preftune.estimating.counts import (
    Counts,
    Rehearsal,
    checkpoint_bytes,
    reference_bytes,
    tensor_bytes,
)
from preftune.estimating.hollow import Draw, Log, Pass, activation_bytes
from preftune.numerics import CHUNK_ELEMENTS
from preftune.parts import blocks_are, keeps_reference
from preftune.policies.blocks import blocks_of
from preftune.sampling.local import MAX_ROWS

BASE = {"cpu": 0.75e9, "cuda": 0.9e9}
"""Bytes of the process itself: Python with its libraries, and what these set aside; on a GPU, of
its memory, the context."""
ROW_TOKEN = 40
"""Bytes of a token of the data, which is a number of Python's in a list."""
_PREFILL = 4096
"""Tokens of prompts that are read together, about."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, part by part, of the fullest stage; and the peak of every stage."""

    parts: dict[str, int]
    stages: dict[str, int]
    free: int
    """What there is now."""
    fixed: dict[str, int] = field(default_factory=dict)
    """Exact sizes: weights, gradients, optimizer, reference, checkpoint, model."""

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.stages.values())

    @property
    def fits(self) -> bool:
        """The run needs no more than there is."""
        return self.peak <= self.free


def memory(of: Rehearsal, counts: Counts) -> Memory:
    """Of a run that was counted."""
    parts, sizes = of.parts, _Sizes.of(of)
    kept = sizes.base + sizes.data + sizes.policy
    reference = 0 if _cache_alone(of) else sizes.reference
    training = {
        "process": sizes.base, "data": sizes.data, "weights": sizes.policy,
        "optimizer": sizes.optimizer, "reference": reference,
    }  # fmt: skip
    stages = {"load": {"process": sizes.base, "data": sizes.data, "weights": sizes.loading}}
    if counts.cache.passes or counts.baseline.passes or counts.baseline.draws:
        before = {"weights": sizes.policy, "reference": sizes.reference}
        logs = [counts.cache, counts.baseline]
        stages["before"] = {**stages["load"], **before, **_scratch(sizes, logs)}
    held: dict[str, int] = {}
    for update in counts.updates:
        found = _training(sizes, [p for p in update.done.passes if p.trains])
        held = max(held, found, key=lambda x: sum(x.values()))
    stages["train"] = training | held
    done = [u.done for u in counts.updates]
    scored = _scratch(sizes, done)
    if scored:
        stages["collect"] = training | scored
    if counts.evaluations:
        logs = [counts.evaluation, counts.last_evaluation]
        stages["evaluate"] = (
            training | {"reference": sizes.reference, "gradients": sizes.gradients}
            | _scratch(sizes, logs)
        )  # fmt: skip
    if counts.checkpoints:
        copied = {"gradients": sizes.gradients, "copies": checkpoint_bytes(parts)}
        stages["checkpoint"] = training | copied
    totals = {name: sum(stage.values()) for name, stage in stages.items()}
    fullest = stages[max(totals, key=lambda name: totals[name])]
    device = of.model.trunk.device
    assert kept <= max(totals.values()), "the models alone take less than a run of them"
    return Memory(
        parts={name: size for name, size in fullest.items() if size}, stages=totals,
        free=automatic.free_memory(device), fixed=sizes.fixed(of, counts),
    )  # fmt: skip


def _cache_alone(of: Rehearsal) -> bool:
    """The reference is let go of once its log-probs are known."""
    parts = of.parts
    known = keeps_reference(parts) and not reference_cache.still_asked(parts.method)
    return known and parts.held_out is None


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of what does not depend on the rows, and of a token."""

    base: int
    data: int
    policy: int
    loading: int
    """Of the policy while it is read from its files, which stand in memory as well."""
    reference: int
    gradients: int
    optimizer: int
    casts: int
    """Of weights in the type that products are computed in, kept from the forward pass on."""
    prepared: int
    """Of weights as decoding takes them."""
    token: float
    """Of a token in a training pass."""
    beside: float
    """Of a token in one block, which a pass without gradients holds too."""
    vocabulary: int
    width: int
    head: int
    head_trained: int
    chunk: int
    cache_token: int
    """Of keys and values of one token."""

    @classmethod
    def of(cls, of: Rehearsal) -> "_Sizes":
        """Those of a run."""
        parts, trunk = of.parts, of.model.trunk
        model, device = trunk.model, trunk.device
        text = model.config.get_text_config()
        policy, half = tensor_bytes(list(model.parameters())), trunk.autocast is not None
        trained = tensor_bytes(list(parts.model.parameters()))
        linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
        head = trunk.whole.get_output_embeddings()
        wide = [m for m in linear if m is not head and m.weight.dtype == torch.float32]
        cast = 2 * sum(m.weight.numel() for m in wide) if half else 0
        layouts = half and (device.type == "cpu" or bool(wide))
        blocks = max(1, len(blocks_of(trunk.whole.base_model)))
        plain = trunk.activation_bytes()
        recomputed = blocks_are(parts, of.settings)["activation_checkpointing"]
        token = plain
        if recomputed:
            token = activation_bytes(model, trunk.autocast, recomputed=True) + plain / blocks
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rows = [parts.data, parts.prompts, parts.held_out]
        different = {id(r): r for r in rows if r is not None}.values()
        tokens = sum(
            sum(map(len, r.prompts)) + sum(len(x) for xs in r.responses for x in xs)
            for r in different
        )
        quantised = _quantised(of, linear)
        return cls(
            base=int(BASE.get(device.type, BASE["cpu"])), data=ROW_TOKEN * tokens,
            policy=policy - quantised, loading=policy - quantised + policy // 2,
            reference=reference_bytes(parts, of.named_reference), gradients=trained,
            optimizer=2 * trained, casts=cast, token=token, beside=plain / blocks,
            prepared=2 * sum(m.weight.numel() for m in linear) if layouts else 0,
            vocabulary=text.vocab_size, width=text.hidden_size,
            head=0 if head is None else head.weight.numel(),
            head_trained=0 if head is None else head.weight.numel() * head.weight.requires_grad,
            chunk=CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]),
            cache_token=2 * blocks * heads * each * (2 if half else 4),
        )  # fmt: skip

    def fixed(self, of: Rehearsal, counts: Counts) -> dict[str, int]:
        """What is exact."""
        return {
            "weights": self.policy, "gradients": self.gradients, "optimizer": self.optimizer,
            "reference": self.reference, "checkpoint": counts.checkpoint_bytes,
            "model": counts.model_bytes,
        }  # fmt: skip

    def logits(self, rows: int) -> int:
        """Bytes of float32 logits that are held at once."""
        return 4 * min(rows * self.vocabulary, self.chunk)


def _quantised(of: Rehearsal, linear: Sequence[Any]) -> int:
    """Bytes that a quantised base saves; its scales are a small part of a bit a weight."""
    asked = of.parts.config.adapter
    if asked is None or asked.quantize is None:
        return 0
    bits = {"4bit": 4.5, "8bit": 8.1}[asked.quantize]
    frozen = [m.weight for m in linear if not m.weight.requires_grad]
    return int(sum(w.numel() * (w.element_size() - bits / 8) for w in frozen))


def _training(sizes: _Sizes, passes: Sequence[Pass]) -> dict[str, int]:
    """What an update's passes hold, beside models and optimizer, where that is most.

    The largest comes first. Its activations go as its gradients come; those after it find the
    gradients there. The head's gradient is there before any activation goes.
    """
    if not passes:
        return {"gradients": sizes.gradients}

    def held(one: Pass) -> dict[str, int]:
        logits = sizes.logits(one.read)
        head = (logits + logits // 2 + 2 * sizes.head + 4 * sizes.head_trained) if one.read else 0
        states = 8 * sizes.width * one.read
        return {
            "activations": int(sizes.token * one.tokens) + states, "head": head,
            "casts": sizes.casts,
        }  # fmt: skip

    first = held(passes[0]) | {"gradients": 4 * sizes.head_trained}
    found = [first, {"gradients": sizes.gradients}]
    if len(passes) > 1:
        most = max(passes[1:], key=lambda p: sum(held(p).values()))
        found.append(held(most) | {"gradients": sizes.gradients})
    return max(found, key=lambda x: sum(x.values()))


def _scratch(sizes: _Sizes, logs: Sequence[Log]) -> dict[str, int]:
    """What passes without gradients and draws hold, where that is most."""
    found: list[dict[str, int]] = [{}]
    for one in _forwards(logs):
        states = int(2 * sizes.beside * one.tokens) + 8 * sizes.width * one.read
        found.append({"activations": states, "head": 2 * sizes.logits(one.read)})
    found += [_decoding(sizes, d) for log in logs for d in log.draws]
    return max(found, key=lambda x: sum(x.values()))


def _forwards(logs: Sequence[Log]) -> Iterator[Pass]:
    return (p for log in logs for p in log.passes if not p.trains)


def _decoding(sizes: _Sizes, draw: Draw) -> dict[str, int]:
    """Of responses that are drawn together; a row leaves for another once there are many."""
    rows = min(draw.rows, MAX_ROWS)
    together = -(-draw.prompts * rows // draw.rows)
    tokens = together * draw.longest + rows * draw.most
    return {
        "decoder": sizes.prepared, "caches": tokens * sizes.cache_token,
        "logits": 10 * rows * sizes.vocabulary,
        "activations": int(2 * sizes.beside * min(draw.prompt, _PREFILL)),
    }  # fmt: skip
