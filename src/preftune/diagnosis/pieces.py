"""Tensors that were computed, kept on disk under what they were computed from."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from preftune.durable import write_bytes

_HASH = 32
"""Bytes of SHA-256 that stand before what they vouch for."""


class Pieces:
    """A folder of named pieces, or none: then everything is computed each time."""

    def __init__(self, folder: Path | None, settings: str) -> None:
        """Args:
        settings: all that the pieces depend on; those of other settings are not taken.
        """
        self._folder, self._settings = folder, settings
        self.found = 0
        """Pieces that were taken from disk."""

    @property
    def key(self) -> str:
        """A short name for what the pieces depend on."""
        return _digest(self._settings)[:8]

    def get(
        self, name: str, index: Tensor, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The piece of that name about the rows `index`, made where it is not there yet."""
        if self._folder is None:
            return make()
        digest = _digest(f"{self._settings}\0{name}\0{index.tolist()}")
        path = self._folder / f"{name}-{digest[:16]}"
        kept = _read(path)
        if kept is None:
            kept = make()
            self._folder.mkdir(parents=True, exist_ok=True)
            data = save({k: v.contiguous() for k, v in kept.items()})
            write_bytes(path, hashlib.sha256(data).digest() + data)
        else:
            self.found += 1
        return kept


def _digest(about: str) -> str:
    return hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        whole = path.read_bytes()
        digest, data = whole[:_HASH], whole[_HASH:]
        return load(data) if hashlib.sha256(data).digest() == digest else None
    except (OSError, SafetensorError, ValueError):
        return None
