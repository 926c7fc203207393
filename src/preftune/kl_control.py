"""Hold the measured reverse KL at the user's budget by moving the KL's coefficient.

People have a KL budget, not a coefficient. A proportional-integral controller works on the
logarithm of a factor of every KL coefficient, once a round; the adaptive coefficient of Ziegler et
al. 2019 (arXiv 1909.08593, section 2.2) is its integral part alone, and reaches a budget late.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.labellers.base import KL_SCALE, State

INTEGRAL = "kl_integral"
GAIN = 0.1
"""Of the integral part, a round at full error."""
CLIMB = 0.2
"""Of the gain, where the KL is below half of the budget."""
PROPORTION = 1.0
MOST = 6.9
"""The integral stays within exp(-6.9) to exp(6.9), a thousandth to a thousand times."""


def adapt(state: State, kl: Float[Tensor, "*R"], target: float) -> State:
    """The state of a labeller or term whose KL is steered, after one more round.

    Args:
        kl: mean log-ratio of the round's fresh samples, nats.
        target: the budget, nats.
    """
    zero = torch.zeros(kl.shape, dtype=torch.float64)
    error = ((kl.double() - target) / target).clamp(-1.0, 1.0)
    # on the long climb from KL 0 the integral hardly moves: it would wind up and overshoot
    gain = torch.full_like(error, GAIN).masked_fill(error < -0.5, CLIMB * GAIN)
    integral = (state.get(INTEGRAL, zero) + gain * error).clamp(-MOST, MOST)
    return state | {INTEGRAL: integral, KL_SCALE: (integral + PROPORTION * error).exp()}
