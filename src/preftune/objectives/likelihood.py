"""Likelihood objectives: raise the log-probability of responses, by choice or by weight."""

from jaxtyping import Float
from torch import Tensor


def nll(logp: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Negative log-likelihood, the loss of SFT, Pref-FT, Binary FeedMe and Best-of-N.

    L = −log π(y|x)

    Paper: as compared (Pref-FT, Best-of-N) by Tajwar et al. 2024, arXiv 2404.14367.

    Args:
        logp: [*E], nats, summed over response tokens (or one token each).

    Returns:
        [*E], nats.

    Valid on any responses; which ones the labeller keeps decides what is learnt, and no reference
    is involved.
    """
    return -logp


def weighted_nll(logp: Float[Tensor, "*E"], weight: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Weighted negative log-likelihood, the loss of reward-weighted regression (RWR).

    L = −w · log π(y|x), for RWR w = exp(r / β), limited from above by the labeller

    Papers: Peters and Schaal 2007 (ICML); with an advantage for the reward, Peng et al. 2019, arXiv
    1910.00177; as compared by Tajwar et al. 2024, arXiv 2404.14367.

    Args:
        logp: [*E], nats, summed over response tokens (or one token each).
        weight: [*E], without unit, any sign; data: receives no gradient.

    Returns:
        [*E], nats times the unit of `weight`.

    Valid on any responses: the weight is relative to the distribution that drew them, so on-policy
    samples tilt the current policy and offline ones the policy behind the data.
    """
    return -weight.detach() * logp
