"""How the trainer's weights reach a vLLM server.

    Folder    a safetensors folder, written whole, that the server's workers read: on any device
    Transfer  vLLM's own weight transfer over NCCL, from one GPU to others

`Transfer` has never been run: no machine with two GPUs was at hand. It is written against vLLM
0.32, and is taken only where a server of the user's was started for it.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from preftune import durable
from preftune.sampling.vllm import Server
from preftune.sampling.vllm_child import free_port


class Folder:
    """Weights on a disk that both see."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype, *, head_apart: bool) -> None:
        """
        Args:
            model: as transformers gives it, without an adapter.
            folder: where `weights/` is written, anew each time.
            dtype: of the numbers in it; what the trainer computes in.
            head_apart: a head that shares the embedding's weights is written like one of its own,
                for a server that was started so (`vllm_child.flags` has the reason).
        """
        self.model, self.dtype, self.head_apart = model, dtype, head_apart
        self.path = (folder / "weights").resolve()
        self._reads = False

    def carry(self, server: Server) -> None:
        """See `Carrier.carry`."""
        self.write()
        if not self._reads:  # started empty, it would fill itself with random numbers again
            _call(server, "update_config", {"overrides": {"load_config": {"load_format": "auto"}}})
            self._reads = True
        _call(server, "reload_weights", {"weights_path": str(self.path)})

    def write(self) -> None:
        """Write the weights as they are."""
        durable.write_folder(self.path, self._fill)

    def clear(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _fill(self, work: Path) -> None:
        narrow: dict[int, torch.Tensor] = {}  # by address: tied weights stay one
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in narrow:
                narrow[tensor.data_ptr()] = tensor.to("cpu", self.dtype, copy=True)
            state[name] = narrow[tensor.data_ptr()]
        self.model.save_pretrained(work, state_dict=dict(state), max_shard_size="1000GB")
        if self.head_apart and (name := self._shared_head()):
            save_file({name: state[name]}, work / "head.safetensors", metadata={"format": "pt"})

    def _shared_head(self) -> str:
        """The name of a head's weights that are the embedding's too."""
        head = self.model.get_output_embeddings()
        if head is None or head.weight is not self.model.get_input_embeddings().weight:
            return ""
        return next(f"{name}.weight" for name, m in self.model.named_modules() if m is head)


def _call(server: Server, method: str, options: dict[str, Any]) -> None:
    """Have each of the server's workers do something."""
    server.ask("/collective_rpc", {"method": method, "kwargs": options})


class Transfer:
    """Weights from one GPU to others. Never run; see above."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._engine: Any = None

    def carry(self, server: Server) -> None:
        """See `Carrier.carry`."""
        if self._engine is None:
            self._engine = self._connected(server)
        self._engine.send_weights()

    def _connected(self, server: Server) -> Any:
        """vLLM's sender, once it has met the server's workers."""
        from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
            ModuleSource,
        )
        from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
        )

        workers = int(server.ask("/get_world_size")["world_size"])
        meeting = NCCLTrainerInitInfo(
            rank=0, master_address="127.0.0.1", master_port=free_port(), world_size=1 + workers
        )
        return WeightTransferTrainerFactory.trainer_init(
            meeting, client=_Control(server), source=ModuleSource(self.model)
        )


class _Control:
    """What vLLM's sender asks of a server (`VLLMWeightSyncClient`), asked in our way."""

    def __init__(self, server: Server) -> None:
        # a broadcast is met once by all, or by none
        self.server = replace(server, patience=replace(server.patience, tries=1))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server.ask("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self.server.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.ask("/finish_weight_update", {"weight_version": weight_version})
