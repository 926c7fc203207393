"""What one gradient step does to a tabular softmax: forward KL, reverse KL and a DPO pair."""

from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.theory.closed_form import kl


class Order(IntEnum):
    """How the reverse-KL change of a log-ratio compares with the forward one (q1 = q2, p1 > p2)."""

    BELOW = 0  # Δ^r < Δ^f < 0: reverse strips arm 1 faster than forward does
    BETWEEN = 1  # Δ^f ≤ Δ^r ≤ 0
    ABOVE = 2  # Δ^f < 0 < Δ^r: reverse raises the arm that is likelier already


def forward_kl_step(
    log_p: Float[Tensor, "... A"], log_q: Float[Tensor, "... A"], lr: float | Tensor
) -> Float[Tensor, "... A"]:
    """Change of softmax logits z in one gradient step on KL(q ‖ p), p = softmax(z).

    Δz_i = −η ∂KL(q ‖ p)/∂z_i = η (q_i − p_i)

    Paper: Tajwar et al. 2024, arXiv 2404.14367, section 6.2; derived.

    Args:
        log_p: [..., A], nats, of the policy, normalised.
        log_q: [..., A], nats, of the target, normalised; −inf allowed.
        lr: η, > 0.

    Returns:
        [..., A], nats; sums to 0 over the last dim.
    """
    return lr * (log_q.exp() - log_p.exp())


def reverse_kl_step(
    log_p: Float[Tensor, "... A"], log_q: Float[Tensor, "... A"], lr: float | Tensor
) -> Float[Tensor, "... A"]:
    """Change of softmax logits z in one gradient step on KL(p ‖ q), p = softmax(z).

    Δz_i = −η ∂KL(p ‖ q)/∂z_i = η p_i (log(q_i / p_i) + KL(p ‖ q))

    Paper: Tajwar et al. 2024, arXiv 2404.14367, section 6.2; derived.

    Args:
        log_p: [..., A], nats, of the policy, normalised, finite.
        log_q: [..., A], nats, of the target, normalised, finite.
        lr: η, > 0.

    Returns:
        [..., A], nats; sums to 0 over the last dim.
    """
    return lr * log_p.exp() * (log_q - log_p + kl(log_p, log_q)[..., None])


def log_ratio_change(
    step: Float[Tensor, "... A"], first: Int[Tensor, "..."], second: Int[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Change of log(p1 / p2) by a change of logits; the normaliser cancels, so it is exact.

    Forward: Δ^f = η [(q1 − p1) − (q2 − p2)]
    Reverse: Δ^r = η [p1 (log(q1 / p1) + K) − p2 (log(q2 / p2) + K)], K = KL(p ‖ q)

    Paper: Tajwar et al. 2024, arXiv 2404.14367, section 6.2; derived.

    Args:
        step: [..., A], nats, of the logits.
        first: [...], index of arm 1.
        second: [...], index of arm 2.

    Returns:
        [...], nats.
    """
    a = step.gather(-1, first[..., None].long())
    return (a - step.gather(-1, second[..., None].long()))[..., 0]


def logarithmic_mean(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """L(a, b) = (a − b) / (log a − log b), and a where they are equal; between the two.

    Case 1 of three, p1 = p2 = p and q1 > q2: Δ^r > Δ^f if and only if p > L(q1, q2), because
    Δ^r = η p log(q1 / q2) and Δ^f = η (q1 − q2).

    Paper: Tajwar et al. 2024, arXiv 2404.14367, theorem of section 6.2; condition derived.

    Args:
        a: [...], > 0.
        b: [...], > 0, of a's shape.

    Returns:
        [...], in [min(a, b), max(a, b)].
    """
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    gap = (high - low) / low
    # gap / log1p(gap) keeps its digits where a and b nearly agree.
    return low * (gap / torch.log1p(gap)).where(gap > 0, 1.0)


def identric_mean(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """I(a, b) = exp(−1 + (a log a − b log b) / (a − b)), and a where equal; between the two.

    The mean that decides cases 2 and 3 (`equal_target_order`).

    Args:
        a: [...], > 0.
        b: [...], > 0, of a's shape.

    Returns:
        [...], in [min(a, b), max(a, b)].
    """
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    gap = (high - low) / low
    # (h log h − l log l) / (h − l) = log h + log(h / l) / (h / l − 1)
    return high * ((torch.log1p(gap) / gap).where(gap > 0, 1.0) - 1).exp()


def equal_target_order(
    p1: Float[Tensor, "..."],
    p2: Float[Tensor, "..."],
    q: Float[Tensor, "..."],
    divergence: Float[Tensor, "..."],
) -> Int[Tensor, "..."]:
    """Which of the three orders holds for two arms of equal target mass, p1 > p2, q1 = q2 = q.

    Δ^f = −η (p1 − p2) < 0 always, and with I the identric mean, K = KL(p ‖ q):
    case 2: Δ^r > 0 > Δ^f  if and only if  I(p1, p2) < q e^(K−1)
    case 3: Δ^r < Δ^f < 0  if and only if  I(p1, p2) > q e^K
    and Δ^f ≤ Δ^r ≤ 0 otherwise. As p2 < I < p1, p1 < q e^(K−1) suffices for case 2, and so does
    q > e p1; q < e^(−K) p2 suffices for case 3. None of the three is necessary.

    Paper: Tajwar et al. 2024, arXiv 2404.14367, theorem of section 6.2; conditions derived.

    Args:
        p1: [...], policy mass of the likelier arm.
        p2: [...], policy mass of the other, 0 < p2 < p1.
        q: [...], target mass of each, > 0.
        divergence: [...], K, nats, of the whole policy.

    Returns:
        [...], values of `Order`.
    """
    mean = identric_mean(p1, p2).log()
    raised, stripped = mean < q.log() + divergence - 1, mean > q.log() + divergence
    return Order.BETWEEN + raised.long() - stripped.long()


def dpo_first_order(
    log_p: Float[Tensor, "... A"],
    chosen: Int[Tensor, "..."],
    rejected: Int[Tensor, "..."],
    push: float | Tensor,
) -> Float[Tensor, "... A"]:
    """Rate of change of every log-prob when one pair pushes its own two logits by ±g.

    d log π(y) = g (1[y = y⁺] − 1[y = y⁻] − (π(y⁺) − π(y⁻)))

    so an arm outside the pair changes by −g (π(y⁺) − π(y⁻)): it rises if and only if the policy
    ranks the rejected above the chosen. First order in g; `dpo_change` is exact.

    Derived; DPO's g is η β σ(−β Δh), Δh the margin over the reference (arXiv 2305.18290).

    Args:
        log_p: [..., A], nats, normalised.
        chosen: [...], index of y⁺.
        rejected: [...], index of y⁻, another arm.
        push: g, nats, ≥ 0.

    Returns:
        [..., A], nats.
    """
    gap = log_ratio_change(log_p.exp(), chosen, rejected)[..., None]
    return _pair_push(log_p, chosen, rejected, push) - push * gap


def dpo_change(
    log_p: Float[Tensor, "... A"],
    chosen: Int[Tensor, "..."],
    rejected: Int[Tensor, "..."],
    push: float | Tensor,
) -> Float[Tensor, "... A"]:
    """Exact change of every log-prob when one pair pushes its own two logits by ±g.

    Δ log π(y) = g (1[y = y⁺] − 1[y = y⁻]) − log(1 + π(y⁺)(e^g − 1) − π(y⁻)(1 − e^(−g)))

    so an arm outside the pair rises if and only if π(y⁻) > e^g π(y⁺), and the chosen one never
    falls: the logarithm is at most g.

    Derived.

    Args:
        log_p: [..., A], nats, normalised.
        chosen: [...], index of y⁺.
        rejected: [...], index of y⁻, another arm.
        push: g, nats, ≥ 0.

    Returns:
        [..., A], nats.
    """
    g = torch.as_tensor(push, dtype=log_p.dtype, device=log_p.device)
    p = log_p.exp()
    up = p.gather(-1, chosen[..., None].long()) * torch.expm1(g)
    down = p.gather(-1, rejected[..., None].long()) * torch.expm1(-g)
    return _pair_push(log_p, chosen, rejected, push) - torch.log1p(up + down)


def _pair_push(
    like: Float[Tensor, "... A"],
    chosen: Int[Tensor, "..."],
    rejected: Int[Tensor, "..."],
    push: float | Tensor,
) -> Float[Tensor, "... A"]:
    """g on the chosen arm, −g on the rejected, 0 elsewhere."""
    arm = torch.arange(like.shape[-1], device=like.device)
    sign = (arm == chosen[..., None]).to(like.dtype) - (arm == rejected[..., None]).to(like.dtype)
    return push * sign
