"""A model's folder on disk, looked at before anything in it is loaded."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from preftune.errors import UserError

DEFAULT_MODEL = "smollm2-135m"
SLACK, FREE = 4, 2**24
"""A configuration may describe so many times the numbers in the files (some pack several weights
into one), and so many more."""


def check_folder(name: str, *, allow_pickle: bool = False) -> None:
    """Refuse a path that is not a model folder, before transformers answers with a riddle.

    Raises:
        UserError: no such folder, a file, no config.json, or pickled weights alone.
    """
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if not looks_local:
        return
    if not path.exists():
        raise UserError(
            f"model '{name}': no such folder. Give a model folder, a Hub id or '{DEFAULT_MODEL}'."
        )
    if not path.is_dir():
        raise UserError(f"model '{name}': is a file. Give the folder that holds config.json.")
    if not (path / "config.json").exists():
        hint = ""
        if (path / "adapter_config.json").exists():
            hint = " It holds an adapter: give the base model's folder."
        elif (path / "model" / "config.json").exists():
            hint = f" It is a run's folder: give {path / 'model'}."
        raise UserError(f"model '{name}': the folder holds no config.json, so no model.{hint}")
    _check_index(path)
    if not any(path.glob("*.safetensors")) and not allow_pickle:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
            raise UserError(
                f"model '{name}': has pickled weights only, which can run code when they are read. "
                "Save it with safetensors (model.save_pretrained), and give that folder."
            )
        raise UserError(f"model '{name}': the folder holds no *.safetensors weights.")


def _check_index(folder: Path) -> None:
    """Refuse a list of weights' files that names any outside of its folder."""
    for path in folder.glob("*.index.json"):
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            inside = all(isinstance(f, str) and Path(f).name == f for f in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"model '{folder}': {path.name} cannot be read ({type(error).__name__}: {error}). "
                "Copy or download the folder anew."
            ) from error
        if not inside:
            raise UserError(
                f"model '{folder}': {path.name} names files outside of the folder. Save the model "
                "anew with model.save_pretrained."
            )


def contents(folder: Path) -> tuple[int, int]:
    """Tensors and numbers in a folder's safetensors files, by their headers.

    Raises:
        UserError: a file is none.
    """
    tensors = numbers = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model '{folder}': {path.name} cannot be read as safetensors ({error}). "
                "Copy or download the folder anew."
            ) from error
        tensors += len(shapes)
        numbers += sum(map(math.prod, shapes))
    return tensors, numbers
