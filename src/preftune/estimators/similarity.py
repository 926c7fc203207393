"""Can a classifier tell the policy's samples from the data? A cheap stand-in for a density ratio.

An AUC near 1 comes from style cues already, and then says nothing about how far apart the two are:
density ratios beyond about 5 nats are out of reach.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.estimators.estimate import Estimate, cannot_tell, share
from preftune.estimators.features import LEAST_PROMPTS, MOST_FEATURES, compressed, fold_of
from preftune.figures import wins


def two_sample_auc(
    policy: Float[Tensor, "N K F"],
    data: Float[Tensor, "N J F"],
    ridge: float = 1e-2,
    folds: int = 2,
    width: int = MOST_FEATURES,
    seed: int = 0,
) -> Estimate:
    """How well a linear classifier tells a policy's responses from the data's, to one prompt.

    AUC = P[f(y) > f(y')] + ½ P[f(y) = f(y')],  y ∼ π(· | x), y' ∼ D(· | x)

    f is the ridge-logistic score, fitted on the other folds' prompts to features less their
    prompt's mean, and compared within prompts: what prompts have in common cannot help. ½ where
    the two are the same; a lower bound of what a better classifier would reach. The ends of the
    interval are √folds further out: where there is little to be found, chance that sets one fold's
    classifier right sets the other's right too, and a plain bootstrap holds ½ in 82 % of draws.

    Args:
        policy: [N, K, F], features of the policy's samples.
        data: [N, J, F], of the data's responses to the same prompts.
        ridge: on the squared coefficients of features on one scale, > 0.
        folds: ≥ 2.
        width: dimensions that more features are projected to at random.

    Returns:
        not trusted with under 20 prompts.
    """
    assert folds >= 2, "two folds at least"
    count, own = policy.shape[:2]
    if count < LEAST_PROMPTS:
        return cannot_tell(f"cannot tell with {count} prompts: {LEAST_PROMPTS} are needed")
    both = torch.cat([policy.double(), data.double()], 1)
    (x,) = compressed([both - both.mean(1, keepdim=True)], width, seed)
    label = (torch.arange(x.shape[1]) < own).double().expand(count, -1)
    fold = fold_of(count, folds, seed)
    won = torch.zeros(count, dtype=torch.float64)
    for held in range(folds):
        out = fold == held
        w = logistic_ridge(x[~out].flatten(0, 1), label[~out].flatten(), ridge)
        score = x[out] @ w
        won[out] = wins(score[:, :own, None], score[:, None, own:]).mean((1, 2))
    return _wider(share(won[:, None], seed), folds**0.5)


def _wider(found: Estimate, factor: float) -> Estimate:
    if found.value is None or found.low is None or found.high is None:
        return found
    low = max(0.0, found.value - factor * (found.value - found.low))
    return replace(found, low=low, high=min(1.0, found.value + factor * (found.high - found.value)))


def logistic_ridge(
    x: Float[Tensor, "M d"], label: Float[Tensor, " M"], ridge: float, steps: int = 50
) -> Float[Tensor, " d"]:
    """Coefficients of a logistic regression without intercept, both classes of equal weight.

    argmin_w mean_{classes} mean log(1 + e^{−±x·w}) + ½ ridge ‖w‖²

    By Newton's method, whose steps are shortened while they are long.
    """
    share_of = label / label.sum() / 2 + (1 - label) / (1 - label).sum() / 2
    w = torch.zeros(x.shape[-1], dtype=x.dtype)
    eye = torch.eye(len(w), dtype=x.dtype)
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        gradient = x.mT @ (share_of * (p - label)) + ridge * w
        curve = (x * (share_of * p * (1 - p))[:, None]).mT @ x + ridge * eye
        step = torch.linalg.solve(curve, gradient)
        moved = float((x @ step).abs().max())
        w = w - step / max(1.0, moved / 4)
        if moved < 1e-8:
            break
    return w
