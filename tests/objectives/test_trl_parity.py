"""DPO and IPO give TRL's numbers and gradients on the same log-probs.

TRL keeps its losses inside `DPOTrainer._compute_loss`. That method is run as it stands; only the
model is replaced, by one that returns given token log-probs, and the trainer by its settings.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune import objectives as o

pytest.importorskip("trl", reason="trl is not installed: parity with it is not checked")

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


def trl_loss(token_logp: Tensor, mask: Tensor, ref_logp: Tensor, **settings: object) -> Tensor:
    """TRL's mean loss; pairs [2, n, T] become its rows [2n, T], a prompt token before each."""
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = token_logp.flatten(0, 1)
    zeros = torch.zeros_like(rows)
    response = torch.cat([torch.zeros(len(rows), 1, dtype=torch.bool), mask.flatten(0, 1)], dim=1)
    outputs = SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        loss_weights=[1.0],
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **{
            "beta": BETA,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            **settings,
        },
    )
    inputs = {
        "input_ids": torch.zeros_like(response, dtype=torch.long),
        "completion_mask": response.long(),
        "ref_chosen_logps": ref_logp[0],
        "ref_rejected_logps": ref_logp[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    (our_grad,) = torch.autograd.grad(ours, [leaf], retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, [leaf], retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "alpha"),
    [
        ("reverse_kl", "reverse_kl", None),
        ("forward_kl", "forward_kl", None),
        ("js", "js_divergence", None),
        ("alpha", "alpha_divergence", 0.5),
        ("alpha", "alpha_divergence", 0.2),
        ("alpha", "alpha_divergence", 1.0),
    ],
)
def test_dpo(ours: str, theirs: str, alpha: float | None) -> None:
    # TRL's alpha branch has no float64.
    token_logp, mask, ref = make_pairs(torch.float32 if ours == "alpha" else torch.float64)
    loss = o.dpo(*token_logp.sum(-1), *ref, beta=BETA, divergence=ours, alpha=alpha).mean()
    reference = trl_loss(
        token_logp,
        mask,
        ref,
        loss_types=["sigmoid"],
        f_divergence_type=theirs,
        f_alpha_divergence_coef=alpha,
    )
    assert_same(loss, reference, token_logp)


def test_label_smoothing() -> None:
    """Of TRL's losses only `aot` smooths labels as cDPO does. It sorts a batch before it pairs, so
    one pair at a time it is smoothed DPO."""
    token_logp, mask, ref = make_pairs(torch.float64)
    losses = o.dpo(*token_logp.sum(-1), *ref, beta=BETA, label_smoothing=0.1)
    for i in range(LENGTHS.shape[1]):
        one = slice(i, i + 1)
        reference = trl_loss(
            token_logp[:, one], mask[:, one], ref[:, one], loss_types=["aot"], label_smoothing=0.1
        )
        assert_same(losses[i], reference, token_logp)


def test_ipo_of_token_means() -> None:
    """TRL averages log-probs over tokens and calls tau beta."""
    token_logp, mask, ref = make_pairs(torch.float64)
    logp = token_logp.sum(-1) / LENGTHS
    loss = o.ipo(*logp, *(ref / LENGTHS), tau=BETA).mean()
    assert_same(loss, trl_loss(token_logp, mask, ref, loss_types=["ipo"]), token_logp)
