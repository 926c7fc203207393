"""Twenty steps of every row in float64, on a table and on a two-layer transformer.

    python tests/golden_curves.py     write tests/golden_curves.json anew

Weights and draws are functions of counters and the model computes in float64 throughout (GPT-2: the
norms of Llama compute in float32), so the losses hold on other processors too.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import loop, methods
from preftune.method import Method
from preftune.numerics import stream_key, uniform
from preftune.policies.categorical import Categorical, TabularReward
from preftune.policies.transformer import Transformer
from preftune.reward_model import RewardModel
from preftune.rounds import World
from preftune.samples import DATA, Samples, pad_stack
from preftune.sampling.decoding import Decoding

FILE = Path(__file__).with_suffix(".json")
STEPS, STATES, ARMS = 20, 6, 5
VOCAB, END = 24, 1


def numbers(name: str, *shape: int) -> Tensor:
    """Numbers in [-1, 1) that are the same everywhere."""
    count = torch.Size(shape).numel()
    return (2 * uniform(stream_key("golden", name), torch.arange(count)) - 1).view(shape)


@dataclass(frozen=True)
class Table:
    """State s prefers arm s to the next."""

    def __len__(self) -> int:
        return STATES

    def prompts_only(self, index: Any) -> tuple[Tensor, Tensor]:
        prompt = torch.as_tensor(index)[:, None]
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Any, *, responses: list[int] | None = None) -> Samples:
        prompt, prompt_mask = self.prompts_only(index)
        arms = torch.cat([prompt % ARMS, (prompt + 1) % ARMS], -1)
        tokens = (arms if responses is None else arms[:, responses]).unsqueeze(-1)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            finished=torch.ones_like(tokens[..., 0], dtype=torch.bool),
            origin=torch.full_like(tokens[..., 0], DATA), row=prompt[:, 0],
        )  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Ragged prompts with two ragged responses each, in token ids."""

    def __len__(self) -> int:
        return 8

    def _ids(self, name: str, row: int, length: int) -> Tensor:
        return (numbers(f"{name}{row}", length).abs() * (VOCAB - 2)).long() + 2

    def prompts_only(self, index: Any) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(index).tolist()
        return pad_stack([self._ids("prompt", i, 2 + i % 3) for i in rows], left=True)

    def samples(self, index: Any, *, responses: list[int] | None = None) -> Samples:
        rows = torch.as_tensor(index)
        take = responses or [0, 1]
        end = torch.tensor([END])
        flat = [
            torch.cat([self._ids(f"response{k}", i, 1 + (i * (k + 2)) % 4), end])
            for i in rows.tolist()
            for k in take
        ]
        tokens, mask = pad_stack(flat)
        shape = (len(rows), len(take))
        prompt, prompt_mask = self.prompts_only(rows)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens.view(*shape, -1),
            mask=mask.view(*shape, -1), finished=torch.ones(shape, dtype=torch.bool),
            origin=torch.full(shape, DATA), row=rows,
        )  # fmt: skip


def by_tokens(samples: Samples) -> Tensor:
    """The reward of a response: its mean token id, less its length."""
    total = torch.where(samples.mask, samples.tokens, 0).sum(-1).double()
    return total / (10.0 * samples.lengths()) - 0.1 * samples.lengths()


def conditions(row: Method) -> bool:
    return any(getattr(t.source, "take", "") == "conditioned" for t in row.terms)


def table_world(row: Method, **more: Any) -> World:
    logits, ref_logits = numbers("policy", STATES, ARMS), numbers("reference", STATES, ARMS)
    policy: Any
    if "score" in row.outputs:
        policy = TabularReward(0.1 * logits)
    else:
        policy = Categorical(logits, value_head="value" in row.needs, controls=conditions(row))
    given = {"micro_batch_tokens": None, "batch_size": 4, "seed": 0} | more
    return World(
        policy=policy, reference=Categorical(ref_logits), data=Table(), prompts=Table(),
        reward=by_tokens, **given,
    )  # fmt: skip


def gpt2(name: str, classifier: bool = False) -> Any:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=END,
        bos_token_id=END, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    kind = GPT2ForSequenceClassification if classifier else GPT2LMHeadModel
    model = kind(config).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(0.3 * numbers(f"{name}{key}", *parameter.shape))
    return model


def transformer_world(row: Method, **more: Any) -> World:
    decoding = Decoding(max_new_tokens=5)
    policy: Any
    if "score" in row.outputs:
        policy = RewardModel(gpt2("policy", classifier=True))
    else:
        policy = Transformer(
            gpt2("policy"), end_ids=[END], decoding=decoding, value_head="value" in row.needs,
            controls=([3], [4]) if conditions(row) else None,
        )  # fmt: skip
    reference = Transformer(gpt2("reference"), end_ids=[END], decoding=decoding).frozen_copy()
    given = {"micro_batch_tokens": None, "batch_size": 4, "seed": 0} | more
    return World(
        policy=policy, reference=reference, data=Texts(), prompts=Texts(), reward=by_tokens, **given
    )


WORLDS = {"table": table_world, "transformer": transformer_world}


def curve(name: str, scale: str, steps: int = STEPS, **more: Any) -> list[float]:
    """The losses of twenty steps, or of the first of them."""
    row = methods.resolve(methods.get(name))
    settings = loop.Settings(max_steps=STEPS, learning_rate=0.01)
    losses: list[float] = []
    state = loop.start(row, WORLDS[scale](row, **more), settings)
    hooks = loop.Hooks(
        log=lambda step, metrics: losses.append(metrics["loss"]), stop=lambda: len(losses) == steps
    )
    loop.advance(state, settings, hooks)
    return losses


def main() -> int:
    """Write the file."""
    found = {s: {name: curve(name, s) for name in methods.table()} for s in WORLDS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
