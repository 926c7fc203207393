"""Pure losses: tensors in, one loss a sample out.

Nothing here reduces, masks or couples samples: the caller does. Settings are keyword-only and
broadcast against the samples; arguments that are data receive no gradient.
"""

from preftune.objectives.binary import kto
from preftune.objectives.contrastive import bradley_terry, dpo, ipo
from preftune.objectives.divergence import kl_loss, reverse_kl
from preftune.objectives.dpo_variants import chi_po, dpop, robust_dpo, wpo
from preftune.objectives.likelihood import nll, weighted_nll
from preftune.objectives.policy_gradient import ppo_clip, reinforce, value_clip
from preftune.objectives.reference_free import cpo, orpo, simpo

__all__ = [
    "bradley_terry",
    "chi_po",
    "cpo",
    "dpo",
    "dpop",
    "ipo",
    "kl_loss",
    "kto",
    "nll",
    "orpo",
    "ppo_clip",
    "reinforce",
    "reverse_kl",
    "robust_dpo",
    "simpo",
    "value_clip",
    "weighted_nll",
    "wpo",
]
