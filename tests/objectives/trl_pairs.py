"""The same log-probs for TRL and for us, and a trainer of TRL's that has only its settings."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LENGTHS = torch.tensor([[4, 2, 6, 1], [3, 5, 1, 6]])  # response tokens: chosen, rejected
NUM_TOKENS = 6
BETA = 0.3


def make_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs [2, 4, 6] (a leaf), the response mask, summed reference log-probs [2, 4]."""
    generator = torch.Generator().manual_seed(11)
    mask = torch.arange(NUM_TOKENS) < LENGTHS[..., None]
    token_logp = -torch.rand(2, 4, NUM_TOKENS, generator=generator, dtype=dtype) * 3
    noise = torch.randn(2, 4, generator=generator, dtype=dtype)
    token_logp = token_logp.where(mask, 0.0)
    return token_logp.requires_grad_(), mask, token_logp.detach().sum(-1) + noise


def stand_in(defaults: dict[str, object], **settings: object) -> Any:
    """In a trainer's place, in evaluation mode on one CPU process."""
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **{**defaults, **settings},
    )


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    (our_grad,) = torch.autograd.grad(ours, [leaf], retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, [leaf], retain_graph=True)
    assert our_grad.abs().sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)
