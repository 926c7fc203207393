"""`preftune merge`: the full model that an adapter and its base make."""

import shutil
from pathlib import Path
from typing import Any

import torch

from preftune import adapter_folder, adapters, durable, huggingface
from preftune.adapter_folder import Described
from preftune.errors import UserError


def merge(
    name: str, output: Path, base: str | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the full model of a run or of a PEFT folder, with its tokenizer; the folder.

    Args:
        name: a run's folder, or a PEFT folder.
        output: a folder that is not there, or is empty.
        base: the base model, where it is not the one that the adapter names.
        dtype: of the weights. In bfloat16 much of what a small adapter changes is rounded away.
    Raises:
        UserError: no adapter, a base that it does not fit, or a folder that holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output '{output}': is there already. Give a folder that is not.")
    found = _described(name, base)
    model = _whole(found, dtype)
    tokenizer = _tokenizer(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.parent / f".tmp-{output.name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        if found.scores and tokenizer is not None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        huggingface.save_model(model, tokenizer, work)
        durable.reach("merged")
        if output.exists():
            output.rmdir()
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output


def _described(name: str, base: str | None) -> Described:
    """What is merged.

    Raises:
        UserError: it holds no adapter.
    """
    folder = huggingface.resolve_model(name)
    if adapter_folder.is_adapter(folder):
        return adapter_folder.describe(folder, base)
    if not Path(folder).is_dir():
        raise UserError(f"merge '{name}': no such folder. Give a run's folder or a PEFT folder.")
    whole = " It is a whole model already." if (Path(folder) / "config.json").is_file() else ""
    raise UserError(f"merge '{name}': holds no adapter.{whole} Give the folder of one.")


def _whole(found: Described, dtype: torch.dtype) -> Any:
    """The model with the adapter in its weights: computed in float32, then rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    load = huggingface.classifier_from if found.scores else huggingface.load_model
    model = adapters.merged(adapters.put_on(load(found.base, wide), found))
    return model.to(dtype)


def _tokenizer(found: Described) -> Any:
    """The adapter's own tokenizer, else its base model's; None where neither has one."""
    place = str(found.folder) if huggingface.has_tokenizer(found.folder) else found.base
    try:
        return huggingface.load_tokenizer(place)
    except UserError as error:
        if "holds no tokenizer" not in str(error):
            raise
        return None
