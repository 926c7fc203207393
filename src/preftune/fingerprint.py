"""What the log-probs of a language model depend on, as plain data: its weights, how it computes,
and the code that does it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import preftune
from preftune.policies.transformer import Transformer

_CODE = ("numerics.py", "adapters.py", "policies/*.py")
"""What makes log-probs of weights and token ids."""

Tick = Callable[[str, int, int], None]
"""tick(stage, done, total)."""


def of_computation(policy: Transformer, tick: Tick) -> dict[str, Any]:
    """The model and its weights, how it computes, and the code."""
    model = policy.trunk.whole
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    return {
        "model": {
            "class": type(model).__name__,
            "config": digest(as_json(config)),
            "weights": of_weights(policy.model, tick, names=policy.trunk.names_in_use()),
            "dtype": str(model.dtype),
            **({"adapters": on} if (on := policy.trunk.adapters_in_use()) else {}),
        },
        # Most of these change rounding alone. They stand here so that what one run kept changes no
        # bit of another.
        "computed": {
            "autocast": str(policy.autocast),
            "attention": str(getattr(model.config, "_attn_implementation", None)),
            "share_prefix": policy.share_prefix,
            "packing": policy.packing,
            "compiled": policy.trunk.compiled,
            "device": _device_name(policy.device),
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
        },
        "code": {
            "preftune": preftune.__version__,
            "files": _code_digest(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def _code_digest() -> str:
    found, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted(p for pattern in _CODE for p in here.glob(pattern)):
        found.update(path.read_bytes())
    return found.hexdigest()


def of_weights(
    model: torch.nn.Module,
    tick: Tick = lambda stage, done, total: None,
    *,
    frozen: bool = False,
    names: Mapping[str, str] | None = None,
) -> str:
    """A hash of every weight and buffer: name, type, shape and bytes.

    Args:
        frozen: of weights that are not trained alone.
        names: of those alone, by other names.
    """
    weights = {n: p for n, p in model.named_parameters() if not (frozen and p.requires_grad)}
    tensors = weights if frozen else {**weights, **dict(model.named_buffers())}
    if names is not None:
        tensors = {names[n]: t for n, t in tensors.items() if n in names}

    def one(named: tuple[str, Tensor]) -> str:
        name, tensor = named
        found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets other threads run
        found = []
        for one_digest in pool.map(one, sorted(tensors.items())):
            found.append(one_digest)
            tick("hashing weights", len(found), len(tensors))
    return digest("\n".join(found))


def as_json(value: Any) -> str:
    """One spelling of plain data."""
    return json.dumps(value, sort_keys=True, default=str)


def digest(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
