"""From rewards to advantages: baselines, generalized advantage estimation, whitening.

Pure functions of one round's tensors. They couple samples, which objectives must not, so labellers
call them on the whole round, before it is cut into minibatches.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_EPS = 1e-8


def leave_one_out(x: Float[Tensor, "*E K"]) -> Float[Tensor, "*E K"]:
    """For each sample of a prompt, the mean of the prompt's other samples: a baseline.

    b_k = 1/(K−1) · Σ_{j≠k} x_j

    Paper: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.
    2024, arXiv 2402.14740 (RLOO).

    Args:
        x: [*E, K], any unit; the last dim holds the K ≥ 2 samples of one prompt.

    Returns:
        [*E, K], the same unit.

    Raises:
        ValueError: K < 2.

    Valid as a baseline when the K samples of a prompt are independent given the prompt: then it
    leaves the expected gradient as it is.
    """
    num_samples = x.shape[-1]
    if num_samples < 2:
        raise ValueError(
            f"leave_one_out needs at least 2 samples a prompt, got {num_samples}: "
            "set samples_per_prompt to 2 or more"
        )
    # Sums of what stands before and after each sample. (sum − x) would let a large x drown the
    # others in rounding, and an infinite one turn its own baseline into NaN.
    before = F.pad(x[..., :-1].cumsum(-1), (1, 0))
    after = F.pad(x[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return (before + after) / (num_samples - 1)


def gae(
    reward: Float[Tensor, "*E T"],
    value: Float[Tensor, "*E T"],
    mask: Bool[Tensor, "*E T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "*E T"], Float[Tensor, "*E T"]]:
    """Generalized advantage estimation, and the target of the value function.

    A_t = Σ_{i≥0} (γλ)^i δ_{t+i},  δ_t = r_t + γ V_{t+1} − V_t,  target_t = A_t + V_t

    Paper: Schulman et al. 2015, arXiv 1506.02438, eq. 16.

    Args:
        reward: [*E, T], a token; a reward of the whole response stands at its last token.
        value: [*E, T], unit of the reward, the value before the token is drawn, at collection.
        mask: [*E, T], True at response tokens, right-padded; V after the last one is 0, since the
            response is over there.
        gamma: γ, discount a token, in [0, 1].
        lam: λ, weight of later values, in [0, 1].

    Returns:
        advantage and target, [*E, T] each, unit of the reward; 0 where masked, whatever the inputs
        hold there. No gradient flows through them.

    Valid on samples of the policy whose values these are.
    """
    reward = reward.detach().where(mask, 0.0)
    value = value.detach().where(mask, 0.0)
    delta = reward + gamma * F.pad(value[..., 1:], (0, 1)) - value
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[..., :0].sum(-1))
    for t in reversed(range(delta.shape[-1])):
        following = delta[..., t] + gamma * lam * following
        advantage[..., t] = following
    # delta is 0 behind the last token, so padding adds nothing to the tokens before it.
    return advantage, advantage + value


def whiten(x: Float[Tensor, "*E"], mask: Bool[Tensor, "*E"] | None = None) -> Float[Tensor, "*E"]:
    """Shift and scale to mean 0 and standard deviation 1 over all entries.

    y = (x − mean) / √(var + 10⁻⁸), var the population variance (divisor n, not n − 1)

    The divisor n gives a lone entry variance 0 instead of NaN, and the 10⁻⁸ turns entries that are
    all alike into 0 (up to rounding). Entries of different runs must not be mixed: with a leading
    run axis, apply this through `torch.vmap`.

    Args:
        x: [*E], any unit.
        mask: [*E], True at the entries that count; None counts all.

    Returns:
        [*E], without unit; 0 where masked, whatever `x` holds there.

    Valid on a whole round: whitened in minibatches, a sample's advantage would depend on its
    neighbours.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = mask.sum().clamp(min=1)
    centred = x - x.where(mask, 0.0).sum() / count
    centred = centred.where(mask, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + _EPS)
