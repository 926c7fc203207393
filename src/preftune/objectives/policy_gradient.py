"""Policy-gradient objectives: advantages times log-probabilities, plain or clipped, and the value.

Left out of PPO: the entropy bonus, early stopping and the adaptive KL coefficient, which is the
labeller's (KL in the reward) or a term of its own (KL in the loss).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.objectives._limits import MAX_EXPONENT, clamp


def reinforce(logp: Float[Tensor, "*E"], advantage: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Score-function surrogate; only its gradient has a meaning, not its value.

    L = −A · log π(y|x)

    Papers: Williams 1992 (Machine Learning 8); with the leave-one-out baseline (RLOO), Ahmadian et
    al. 2024, arXiv 2402.14740.

    Args:
        logp: [*E], nats, summed over response tokens (or one token each).
        advantage: [*E], unit of the reward, baseline already subtracted; data: receives no
            gradient.

    Returns:
        [*E], unit of the reward times nats.

    Valid only on samples of the policy as it is now (on-policy, one pass); a baseline must not
    depend on the sample that it is subtracted from.
    """
    return -advantage.detach() * logp


def ppo_clip(
    logp: Float[Tensor, "*E"],
    logp_old: Float[Tensor, "*E"],
    advantage: Float[Tensor, "*E"],
    *,
    clip: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Clipped surrogate of PPO.

    L = −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A),  ρ = π(y|x) / π_old(y|x)

    Paper: Schulman et al. 2017, arXiv 1707.06347, eq. 7.

    Args:
        logp: [*E], nats, now; one token each (or summed over response tokens).
        logp_old: [*E], nats, the same under the policy that drew the sample; data: receives no
            gradient. The log-ratio is limited to 80 nats before exp, so that the loss stays finite
            in float32.
        advantage: [*E], unit of the reward; data: receives no gradient.
        clip: ε, without unit, about 0.2.

    Returns:
        [*E], unit of the reward.

    Valid on samples of the policy of `logp_old`, scored when they were collected; at ratio 1 the
    gradient is that of `reinforce`.
    """
    advantage = advantage.detach()
    # Without the limit an overflowing ratio at advantage 0 would give inf · 0 = NaN.
    ratio = (logp - logp_old.detach()).clamp(max=MAX_EXPONENT).exp()
    clipped = clamp(ratio, 1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_clip(
    value: Float[Tensor, "*E"],
    value_old: Float[Tensor, "*E"],
    target: Float[Tensor, "*E"],
    *,
    clip: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Clipped squared error of PPO's value function.

    L = ½ · max((v − R)², (v_clip − R)²),  v_clip = v_old + clip(v − v_old, −ε, ε)

    The ½ comes from the reference implementation (OpenAI baselines `ppo2`), which every common PPO
    code follows: it makes the unclipped gradient v − R. The weight of the term (there `vf_coef`)
    stands outside.

    Paper: not in Schulman et al. 2017 (eq. 9 has the plain squared error); described by Engstrom et
    al. 2020, arXiv 2005.12729, among the code-level optimizations.

    Args:
        value: [*E], unit of the reward, the value now.
        value_old: [*E], the value at collection; data: receives no gradient.
        target: [*E], the return to be predicted (`gae` gives it); data: receives no gradient.
        clip: ε, unit of the reward.

    Returns:
        [*E], unit of the reward squared.

    Valid on samples of the policy of the current round, with the values that were predicted when
    they were collected.
    """
    value_old, target = value_old.detach(), target.detach()
    step = clamp(value - value_old, -clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (value_old + step - target).square())
