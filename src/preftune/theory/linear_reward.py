"""A reward that is linear in features, by maximum likelihood on pairs (Bradley-Terry)."""

import torch
from jaxtyping import Float
from torch import Tensor

NEWTON_STEPS = 40
TOLERANCE = 1e-10


def fit_linear_reward(
    features: Float[Tensor, "A F"], wins: Float[Tensor, "*E A A"], ridge: float
) -> Float[Tensor, "*E A"]:
    """Reward of every response: argmin_w  mean of -log s(w (f_i - f_j)) + ridge / 2 |w|^2.

    Newton's method, each problem by itself: what one gives does not depend on the others.

    Args:
        features: of each of the A responses.
        wins: how often i was preferred to j.
        ridge: > 0 where features are collinear or wins separable; else no minimum is attained.

    Returns:
        nats (log-odds), with mean 0 over the responses.
    """
    shape = wins.shape[:-2]
    each = [_fit(features, w, ridge) for w in wins.reshape(-1, *wins.shape[-2:])]
    reward = torch.stack(each).reshape(*shape, features.shape[0])
    return reward - reward.mean(-1, keepdim=True)


def _fit(features: Tensor, wins: Tensor, ridge: float) -> Tensor:
    i, j = wins.nonzero(as_tuple=True)
    share = wins[i, j] / wins[i, j].sum()
    gap = features[i] - features[j]
    weight = features.new_zeros(features.shape[1])
    eye = torch.eye(features.shape[1], dtype=features.dtype)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(gap @ weight)
        slope = ridge * weight - gap.T @ (share * (1 - p))
        curve = ridge * eye + gap.T @ (gap * (share * p * (1 - p))[:, None])
        # a flat direction (collinear features, no ridge) has no curvature of its own
        step = torch.linalg.solve(curve + 1e-12 * eye, slope)
        weight = weight - step / max(1.0, float(step.abs().max()) / 4)
        if float(slope.abs().max()) < TOLERANCE:
            break
    return features @ weight
