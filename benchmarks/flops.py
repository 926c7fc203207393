"""Floating point operations that a DPO step cannot do without, and what this processor can do."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a decoder of Llama's kind."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From a transformers configuration."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            inner=config["intermediate_size"],
            vocabulary=config["vocab_size"],
        )

    @property
    def body(self) -> int:
        """Weights of the layers' products."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the output product."""
        return self.width * self.vocabulary


def attended(prompt: int, responses: tuple[int, ...]) -> int:
    """Pairs of a position and one that it sees, the prompt computed once for all responses."""

    def below(n: int) -> int:
        return n * (n + 1) // 2

    return below(prompt) + sum(prompt * r + below(r) for r in responses)


def useful(shape: Shape, prompt: int, responses: tuple[int, ...]) -> int:
    """Of one forward and backward pass over a prompt and its responses.

    A multiplication and an addition a weight and position forward, twice that backward. The prompt
    goes through once, the head sees response tokens alone, and no reference is computed.
    """
    answers = sum(responses)
    products = 6 * (shape.body * (prompt + answers) + shape.head * answers)
    seen = attended(prompt, responses)
    return products + 12 * shape.layers * shape.heads * shape.head_dim * seen


def products(shape: Shape, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Sizes m, k, n of the matrix products whose rate is the ceiling: two squares, and the model's
    own."""
    return {
        "2048": (2048, 2048, 2048),
        "4096": (4096, 4096, 4096),
        "up": (tokens, shape.width, shape.inner),
        "down": (tokens, shape.inner, shape.width),
        "head": (1024, shape.width, shape.vocabulary),
    }


def rates(sizes: Mapping[str, tuple[int, int, int]], repeats: int = 3) -> dict[str, float]:
    """Operations a second of bfloat16 products of each size: the median of a few, after one."""
    import torch

    found = {}
    for name, (m, k, n) in sizes.items():
        a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
        out, taken = torch.empty(m, n, dtype=torch.bfloat16), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            taken.append(time.perf_counter() - began)
        found[name] = 2 * m * k * n / median(taken[1:])
    return found
