"""Pure losses: tensors in, one loss a sample out.

Nothing here reduces, masks or couples samples: the caller does. Settings are keyword-only and
broadcast against the samples; arguments that are data receive no gradient.
"""

from preftune.objectives.contrastive import bradley_terry, dpo, ipo
from preftune.objectives.divergence import reverse_kl
from preftune.objectives.likelihood import nll, weighted_nll
from preftune.objectives.policy_gradient import ppo_clip, reinforce, value_clip

__all__ = [
    "bradley_terry",
    "dpo",
    "ipo",
    "nll",
    "ppo_clip",
    "reinforce",
    "reverse_kl",
    "value_clip",
    "weighted_nll",
]
