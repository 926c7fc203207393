"""DPO, IPO and their relatives give TRL's numbers and gradients on the same log-probs.

TRL keeps its losses inside `DPOTrainer._compute_loss`. That method is run as it stands; only the
model is replaced, by one that returns given token log-probs, and the trainer by its settings.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl_pairs import BETA, LENGTHS, assert_same, make_pairs, stand_in

from preftune import objectives as o

pytest.importorskip("trl", reason="trl is not installed: parity with it is not checked")


def trl_loss(
    token_logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor,
    collision: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """TRL's mean loss; pairs [2, n, T] become its rows [2n, T], a prompt token before each."""
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = token_logp.flatten(0, 1)
    zeros = torch.zeros_like(rows)
    response = torch.cat([torch.zeros(len(rows), 1, dtype=torch.bool), mask.flatten(0, 1)], dim=1)
    outputs = SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    if collision is not None:
        outputs.log_sum_sq_probs = collision.flatten(0, 1)
    trainer = stand_in(
        {
            "ld_alpha": None,
            "precompute_ref_logps": True,
            "use_weighting": False,
            "loss_weights": [1.0],
            "beta": BETA,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
        },
        **settings,
    )
    inputs = {
        "input_ids": torch.zeros_like(response, dtype=torch.long),
        "completion_mask": response.long(),
        "ref_chosen_logps": ref_logp[0],
        "ref_rejected_logps": ref_logp[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


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


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_robust_dpo(epsilon: float) -> None:
    token_logp, mask, ref = make_pairs(torch.float64)
    loss = o.robust_dpo(*token_logp.sum(-1), *ref, beta=BETA, label_smoothing=epsilon).mean()
    reference = trl_loss(token_logp, mask, ref, loss_types=["robust"], label_smoothing=epsilon)
    assert_same(loss, reference, token_logp)


def test_wpo() -> None:
    """TRL weighs any of its losses; `sigmoid` is WPO. It multiplies two exponentials, without our
    limit of 80 nats on their sum."""
    token_logp, mask, ref = make_pairs(torch.float64)
    generator = torch.Generator().manual_seed(2)
    collision = -2 * torch.rand(*mask.shape, generator=generator, dtype=torch.float64)
    summed = collision.where(mask, 0.0).sum(-1)
    loss = o.wpo(*token_logp.sum(-1), *ref, *summed, *LENGTHS, beta=BETA).mean()
    reference = trl_loss(
        token_logp, mask, ref, collision, loss_types=["sigmoid"], use_weighting=True
    )
    assert_same(loss, reference, token_logp)


def test_wpo_of_smoothed_labels() -> None:
    """TRL has no smoothed `sigmoid`, and refuses weights with `aot`; the loss body takes them all
    the same, one pair at a time as above."""
    token_logp, mask, ref = make_pairs(torch.float64)
    collision = -torch.ones_like(token_logp).detach()
    summed = collision.where(mask, 0.0).sum(-1)
    losses = o.wpo(*token_logp.sum(-1), *ref, *summed, *LENGTHS, beta=BETA, label_smoothing=0.1)
    for i in range(LENGTHS.shape[1]):
        one = slice(i, i + 1)
        reference = trl_loss(
            token_logp[:, one],
            mask[:, one],
            ref[:, one],
            collision[:, one],
            loss_types=["aot"],
            label_smoothing=0.1,
            use_weighting=True,
        )
        assert_same(losses[i], reference, token_logp)


def test_sppo_is_ipo_of_each_response_alone() -> None:
    """(h_w - 1/(2β))² + (h_l + 1/(2β))²: IPO of the chosen and of the rejected response, each
    against a response at the reference, and of sums, where TRL's `ipo` has means."""
    token_logp, mask, ref = make_pairs(torch.float64)
    (chosen, rejected), zero = token_logp.sum(-1), torch.zeros_like(ref[0])
    loss = o.ipo(chosen, zero, ref[0], zero, tau=BETA) + o.ipo(
        zero, rejected, zero, ref[1], tau=BETA
    )
    reference = trl_loss(token_logp, mask, ref, loss_types=["sppo_hard"])
    assert_same(loss.mean(), reference, token_logp)


def test_length_normalised_dpo_is_simpo_of_log_ratios() -> None:
    """TRL's `sigmoid_norm`: SimPO with log-ratios for log-probs and no margin."""
    token_logp, mask, ref = make_pairs(torch.float64)
    loss = o.simpo(*(token_logp.sum(-1) - ref), *LENGTHS, beta=BETA, gamma=0.0).mean()
    reference = trl_loss(token_logp, mask, ref, loss_types=["sigmoid_norm"])
    assert_same(loss, reference, token_logp)


def test_apo_zero_is_kto_at_kl_zero() -> None:
    token_logp, mask, ref = make_pairs(torch.float64)
    label = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    loss = o.kto(
        token_logp.sum(-1), ref, label, 0.0, beta=BETA, weight_good=1.0, weight_bad=1.0
    ).sum(0)
    assert_same(loss.mean(), trl_loss(token_logp, mask, ref, loss_types=["apo_zero"]), token_logp)
