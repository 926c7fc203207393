"""The losses that TRL keeps in its CPO, ORPO, KTO, reward, GRPO and RLOO trainers.

As in test_trl_parity: TRL's own methods run as they stand, with a model that returns given
log-probs. TRL 1.16 has no XPO, Nash-MD or PPO trainer; PPO's clipping is GRPO's and RLOO's.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_pairs import BETA, LENGTHS, assert_same, make_pairs, stand_in

from preftune import objectives as o
from preftune.objectives.divergence import kl_estimate

pytest.importorskip("trl", reason="trl is not installed: parity with it is not checked")

NUM_PAIRS = LENGTHS.shape[1]


@pytest.fixture(autouse=True)
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def summed(token_logp: Tensor, mask: Tensor) -> Tensor:
    """TRL masks what it sums here, so padding gets no gradient."""
    return token_logp.where(mask, 0.0).sum(-1)


def with_prompt(mask: Tensor) -> Tensor:
    """Pairs [2, n, T] as rows [2n, 1 + T]: one prompt token before the response."""
    return torch.cat([torch.zeros(mask[..., 0].numel(), 1), mask.flatten(0, 1)], dim=1) > 0


def logits_of(token_logp: Tensor, mask: Tensor) -> Tensor:
    """Logits [2n, 1 + T, 2] whose log-softmax at token 0, the label, is the given log-prob; its
    derivative by the given one is 1."""
    logp = token_logp.where(mask, -1.0).flatten(0, 1)
    logits = torch.stack([logp, torch.log(-torch.expm1(logp))], dim=-1)
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)


def pair_trainer_loss(cls: Any, token_logp: Tensor, mask: Tensor, **settings: object) -> Tensor:
    """Mean loss of the CPO and ORPO trainers, which score logits themselves."""
    response = with_prompt(mask)
    attended = response.clone()
    attended[:, 0] = True
    chosen, rejected = torch.arange(2 * mask.shape[1]).chunk(2)
    batch = {
        f"{role}_{key}": value[rows]
        for role, rows in (("chosen", chosen), ("rejected", rejected))
        for key, value in {
            "input_ids": torch.zeros_like(response, dtype=torch.long),
            "attention_mask": attended.long(),
            "labels": torch.where(response, 0, -100),
        }.items()
    }
    trainer = stand_in(
        {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "beta": BETA},
        **settings,
    )
    for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
        if hasattr(cls, name):
            setattr(trainer, name, partial(getattr(cls, name), trainer))
    trainer.concatenated_inputs = cls.concatenated_inputs
    trainer.get_batch_logps = cls.get_batch_logps
    logits = logits_of(token_logp, mask)
    outputs = SimpleNamespace(logits=logits)
    return cls.get_batch_loss_metrics(trainer, lambda *_, **__: outputs, batch, "eval")[0]


def cpo_trainer_loss(token_logp: Tensor, mask: Tensor, **settings: object) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    defaults: dict[str, object] = {"label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 0.0}
    return pair_trainer_loss(CPOTrainer, token_logp, mask, **{**defaults, **settings})


def test_simpo() -> None:
    token_logp, mask, _ = make_pairs(torch.float64)
    loss = o.simpo(*summed(token_logp, mask), *LENGTHS, beta=2.0, gamma=0.7).mean()
    reference = cpo_trainer_loss(token_logp, mask, loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    assert_same(loss, reference, token_logp)


def test_smoothed_bradley_terry_with_a_margin() -> None:
    """TRL's reward trainer has no smoothing; its SimPO has, of the margined log-odds as ours."""
    token_logp, mask, _ = make_pairs(torch.float64)
    score = 2.0 * summed(token_logp, mask) / LENGTHS
    loss = o.bradley_terry(*score, margin=0.7, label_smoothing=0.1).mean()
    reference = cpo_trainer_loss(
        token_logp, mask, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1
    )
    assert_same(loss, reference, token_logp)


def test_cpo_without_nll() -> None:
    token_logp, mask, _ = make_pairs(torch.float64)
    loss = o.cpo(*summed(token_logp, mask), beta=BETA, nll_weight=0.0).mean()
    assert_same(loss, cpo_trainer_loss(token_logp, mask, loss_type="sigmoid"), token_logp)


def test_cpo_with_nll() -> None:
    """TRL's likelihood term is the mean over all chosen tokens of a batch, ours the sum over a
    response: one pair at a time, TRL's weight is ours times the length."""
    token_logp, mask, _ = make_pairs(torch.float64)
    losses = o.cpo(*summed(token_logp, mask), beta=BETA, nll_weight=0.7 / LENGTHS[0])
    for i in range(NUM_PAIRS):
        one = slice(i, i + 1)
        reference = cpo_trainer_loss(
            token_logp[:, one], mask[:, one], loss_type="sigmoid", cpo_alpha=0.7
        )
        assert_same(losses[i], reference, token_logp)


def test_orpo() -> None:
    """TRL's likelihood term is the mean over the tokens of prompt and response of a batch; of one
    pair after a prompt of one token, which nothing predicts, it is the response's. TRL works in
    float32 here."""
    from trl.experimental.orpo import ORPOTrainer

    token_logp, mask, _ = make_pairs(torch.float32)
    losses = o.orpo(*summed(token_logp, mask), *LENGTHS, odds_weight=BETA)
    for i in range(NUM_PAIRS):
        one = slice(i, i + 1)
        reference = pair_trainer_loss(ORPOTrainer, token_logp[:, one], mask[:, one])
        assert_same(losses[i], reference, token_logp)


@pytest.mark.parametrize("shift", [1.5, -40.0], ids=["positive_kl", "clamped_kl"])
def test_kto(shift: float) -> None:
    """TRL estimates the KL inside its loss, from mismatched responses of the batch, and clamps it;
    ours is given it. Rows 0 and 3 of the chosen, 1 of the rejected are labelled good."""
    from trl import KTOTrainer

    token_logp, mask, ref = make_pairs(torch.float64)
    label = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    rows = token_logp.where(mask, 0.0).flatten(0, 1)
    zeros = torch.zeros_like(rows)
    mismatched = rows.detach().roll(1, 0)
    ref_mismatched = mismatched.sum(-1) - shift
    kl = max(0.0, shift)

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        logp = mismatched if input_ids.any() else rows
        return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros)

    trainer = stand_in(
        {
            "calculate_KL": True,
            "precompute_ref_logps": True,
            "loss_type": "kto",
            "beta": BETA,
            "desirable_weight": 1.3,
            "undesirable_weight": 0.6,
        }
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    response = with_prompt(mask).long()
    batch = {
        "input_ids": torch.zeros_like(response),
        "attention_mask": torch.ones_like(response),
        "completion_mask": response,
        "KL_input_ids": torch.ones_like(response),
        "KL_attention_mask": torch.ones_like(response),
        "KL_completion_mask": response,
        "label": label.flatten(),
        "ref_logps": ref.flatten(),
        "ref_KL_logps": ref_mismatched,
    }
    reference = KTOTrainer._compute_loss(trainer, model, batch, False)
    loss = o.kto(
        summed(token_logp, mask), ref, label, kl, beta=BETA, weight_good=1.3, weight_bad=0.6
    )
    assert_same(loss.mean(), reference, token_logp)


@pytest.mark.parametrize("margin", [None, 0.4])
def test_reward_model(margin: float | None) -> None:
    from trl import RewardTrainer

    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    margins = None if margin is None else margin * torch.arange(5, dtype=torch.float64)
    trainer = stand_in({"args": SimpleNamespace(center_rewards_coefficient=None)})
    reference = RewardTrainer.compute_loss(
        trainer,
        lambda **_: SimpleNamespace(logits=scores.flatten()[:, None]),
        {} if margins is None else {"margin": margins},
    )
    loss = o.bradley_terry(*scores, margin=0.0 if margins is None else margins).mean()
    assert_same(loss, reference, scores)


def token_trainer_loss(
    cls: Any, token_logp: Tensor, mask: Tensor, inputs: dict[str, Tensor], **settings: object
) -> Tensor:
    """Mean loss of the GRPO and RLOO trainers on rows [n, T]."""
    trainer = stand_in(
        {
            "args": SimpleNamespace(delta=None, use_bias_correction_kl=False),
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "max_completion_length": 1,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
        },
        **settings,
    )
    entropy = torch.zeros_like(token_logp)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (token_logp, entropy, None)
    ids = torch.zeros_like(mask, dtype=torch.long)
    rows = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.to(token_logp),
    }
    return cls._compute_loss(trainer, None, rows | inputs)


def make_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token log-probs [8, 6] (a leaf), mask, the same at collection (some ratios beyond the clip on
    either side), advantages [8] of both signs."""
    token_logp, mask, _ = make_pairs(torch.float64)
    leaf, mask = token_logp.detach().flatten(0, 1).requires_grad_(), mask.flatten(0, 1)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(*leaf.shape, generator=generator, dtype=torch.float64)
    advantage = torch.randn(len(leaf), generator=generator, dtype=torch.float64)
    return leaf, mask, (leaf.detach() + 0.3 * noise).where(mask, 0.0), advantage


def mean_of(loss: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """Our `unit: sequence` is TRL's `dr_grpo` at max_completion_length 1, `unit: token` its `bnpo`.
    TRL's `grpo` averages over each response's tokens first, which we do not offer."""
    total = loss.where(mask, 0.0).sum()
    return total / len(mask) if loss_type == "dr_grpo" else total / mask.sum()


@pytest.mark.parametrize("loss_type", ["dr_grpo", "bnpo"])
def test_ppo_clip_of_tokens(loss_type: str) -> None:
    from trl import GRPOTrainer

    token_logp, mask, old, advantage = make_rows()
    ratio = (token_logp - old).exp()[mask]
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio - 1).abs() < 0.2).any()
    inputs = {"old_per_token_logps": old, "advantages": advantage}
    reference = token_trainer_loss(
        GRPOTrainer, token_logp, mask, inputs, beta=0.0, loss_type=loss_type
    )
    loss = o.ppo_clip(token_logp, old, advantage[:, None].expand_as(old), clip=0.2)
    assert_same(mean_of(loss, mask, loss_type), reference, token_logp)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "bnpo"])
def test_k3_of_tokens(loss_type: str) -> None:
    """At advantage 0 what remains of GRPO is beta times its KL term. The logged KL is the token
    mean of the same estimate."""
    from trl import GRPOTrainer

    token_logp, mask, ref, advantage = make_rows()
    inputs = {"ref_per_token_logps": ref, "advantages": 0 * advantage}
    reference = token_trainer_loss(
        GRPOTrainer, token_logp, mask, inputs, beta=BETA, loss_type=loss_type
    )
    loss = BETA * o.kl_loss(token_logp, ref, estimator="k3")
    assert_same(mean_of(loss, mask, loss_type), reference, token_logp)
    estimate = BETA * kl_estimate(token_logp - ref, "k3")
    torch.testing.assert_close(mean_of(estimate, mask, loss_type), reference)


def test_ppo_clip_of_responses() -> None:
    """TRL's RLOO is the clipped loss on summed log-probs."""
    from trl import RLOOTrainer

    token_logp, mask, old, advantage = make_rows()
    inputs = {"old_logps": old.sum(-1), "advantages": advantage}
    reference = token_trainer_loss(RLOOTrainer, token_logp, mask, inputs)
    loss = o.ppo_clip(summed(token_logp, mask), old.sum(-1), advantage, clip=0.2).mean()
    assert_same(loss, reference, token_logp)


def test_reinforce_is_the_clipped_loss_before_any_update() -> None:
    """With the samples' own log-probs for the old ones, TRL's RLOO has REINFORCE's gradient; the
    values differ, A · ρ against A · log π."""
    from trl import RLOOTrainer

    token_logp, mask, _, advantage = make_rows()
    inputs = {"old_logps": token_logp.detach().sum(-1), "advantages": advantage}
    theirs = token_trainer_loss(RLOOTrainer, token_logp, mask, inputs)
    ours = o.reinforce(summed(token_logp, mask), advantage).mean()
    (our_grad,) = torch.autograd.grad(ours, [token_logp])
    (their_grad,) = torch.autograd.grad(theirs, [token_logp])
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)
