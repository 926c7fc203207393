"""What measurements hang on, as plain data: those of anything else are not taken for them."""

from typing import Any

import preftune
from preftune import fingerprint, judges
from preftune.config import Config
from preftune.data import Rows
from preftune.policies.transformer import Transformer
from preftune.rewards import Reward


def of_models(reference: Transformer, rows: Rows) -> dict[str, Any]:
    """What a run from the reference on the rows hangs on: weights, token ids."""
    ids = fingerprint.as_json([rows.prompts, rows.responses, rows.finished])
    return {"model": fingerprint.of_weights(reference.model), "rows": fingerprint.digest(ids)}


def of_pieces(
    config: Config,
    models: dict[str, Any],
    reference: Transformer,
    policy: Transformer | None,
    rows: Rows,
    reward: Reward | None,
) -> dict[str, Any]:
    """What pieces hang on.

    Args:
        models: `of_models`.
    """
    return {
        **models,
        "policy": None if policy is None else fingerprint.of_weights(policy.model),
        "computed": [_computed(p) for p in (reference, policy) if p is not None],
        "length": config.max_new_tokens,
        "seed": config.seed,
        "reward": None if reward is None else [judges.digest_of(reward), _read(rows)],
        "version": preftune.__version__,
    }


def _computed(policy: Transformer) -> list[Any]:
    """How its weights become log-probs and answers."""
    config = policy.model.config.to_dict()
    plain = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    shape = fingerprint.digest(fingerprint.as_json(plain))
    weights = next(policy.model.parameters())
    return [shape, policy.end_ids, str(weights.dtype), str(policy.autocast), policy.device.type]


def _read(rows: Rows) -> str:
    """Of what a reward reads of the data besides responses."""
    return fingerprint.digest(fingerprint.as_json([rows.texts, rows.columns]))
