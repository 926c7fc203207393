"""What `accelerate launch` was told of the weights: whole in every process, or spread over them.

It tells its processes by environment variables. DeepSpeed's ZeRO is done by FSDP2: its engine would
own the backward pass and the step, and with them the loss's one normaliser over all processes, and
checkpoints that any number of processes can go on from.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.errors import UserError


@dataclass(frozen=True)
class Strategy:
    """How the weights lie on the processes."""

    sharded: bool = False
    """Spread over them (FSDP2); else each has all (DDP)."""
    note: str | None = None
    """What the user should know of it."""


def launched() -> Strategy:
    """What the launcher's variables ask for.

    Raises:
        UserError: a strategy that is not supported.
    """
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "Megatron-LM is not supported. Launch with --multi_gpu (DDP), or with "
            "--use_fsdp --fsdp_version 2."
        )
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return _of_deepspeed()
    if not _is_on("ACCELERATE_USE_FSDP"):
        return Strategy()
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP: version 1 is not supported. Launch with --fsdp_version 2.")
    return Strategy(sharded=True)


def on_cpu() -> bool:
    """Whether processors were asked for."""
    return _is_on("ACCELERATE_USE_CPU")


def _of_deepspeed() -> Strategy:
    zero = _zero()
    stage = _stage(zero)
    for what, variable in _DEVICES.items():
        device = _device(zero.get(f"offload_{what}"), variable)
        if device != "none":
            raise UserError(
                f"DeepSpeed: {what} is not offloaded to '{device}'. Leave offloading out; an "
                "adapter (adapter: lora) needs less memory than it saves."
            )
    if stage == 0:
        return Strategy(note="DeepSpeed without ZeRO: run as DDP")
    return Strategy(
        sharded=True,
        note=f"DeepSpeed's ZeRO-{stage} is done by torch's FSDP2: weights, gradients and moments "
        "are spread over the processes; of DeepSpeed's settings the stage alone counts",
    )


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Accelerate would start DeepSpeed's own communication, and need its package."""
    before = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = before


_DEVICES = {"optimizer": "OFFLOAD_OPTIMIZER_DEVICE", "param": "OFFLOAD_PARAM_DEVICE"}


def _stage(zero: dict[str, Any]) -> int:
    stage = zero.get("stage")
    if stage is None:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    try:
        number = int(stage)
    except (TypeError, ValueError):
        number = -1
    if number not in range(4):
        raise UserError(f"DeepSpeed: ZeRO's stage is {stage!r}. Give --zero_stage 0, 1, 2 or 3.")
    return number


def _device(in_file: Any, variable: str) -> str:
    """Where something is offloaded to: by the file, else by the launcher."""
    found = in_file.get("device") if isinstance(in_file, dict) else None
    return str(found or os.environ.get(f"ACCELERATE_DEEPSPEED_{variable}") or "none")


def _zero() -> dict[str, Any]:
    """ZeRO's settings in DeepSpeed's own file, where one is given."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        return {}
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))["zero_optimization"]
    except KeyError:
        return {"stage": 0}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"DeepSpeed: '{name}' cannot be read: {error}.") from error
    return found if isinstance(found, dict) else {}


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
