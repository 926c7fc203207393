"""PEFT folders written: of one adapter, or of two as one that holds both."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from preftune import huggingface
from preftune.adapter_folder import PREFIX, VALUE_HEAD, WEIGHTS
from preftune.adapters import is_adapted


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    value_head: Any = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder that transformers loads unchanged: of a model with an adapter, a PEFT
    folder of what is on: one adapter, or two of LoRA as one that holds both; with the value head
    in a file of its own, from which training goes on.

    Args:
        state: the weights by name of a model without an adapter, in place of its own.
    """
    if not is_adapted(model):
        huggingface.save_model(model, tokenizer, folder, state)
        return
    _save_adapter(model, folder)
    if value_head is not None:
        state = {k: t.detach().cpu().contiguous() for k, t in value_head.state_dict().items()}
        save_file(state, folder / VALUE_HEAD)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_adapter(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    active = list(model.active_adapters)
    if len(active) > 1:
        config, tensors = joined(model, active)
    else:
        config = copy.deepcopy(model.peft_config[active[0]])
        tensors = get_peft_model_state_dict(
            model, adapter_name=active[0], save_embedding_layers=False
        )
    config.base_model_name_or_path = _place(model)
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def _place(model: Any) -> str | None:
    """Where the base model is, so that it is found from any working folder."""
    name = getattr(model.get_base_model(), "name_or_path", None) or None
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def joined(model: Any, names: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
    """Several adapters of LoRA as one: their ranks one after another, their scales in B."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for place, module in model.get_base_model().named_modules():
        here = [n for n in names if n in getattr(module, "lora_A", {})]
        if not here:
            continue
        a = [module.lora_A[n].weight for n in here]
        b = [module.lora_B[n].weight * module.scaling[n] for n in here]
        tensors[f"{PREFIX}{place}.lora_A.weight"] = torch.cat(a, 0)
        tensors[f"{PREFIX}{place}.lora_B.weight"] = torch.cat(b, 1)
        ranks[place] = sum(len(x) for x in a)
    rank = max(ranks.values())
    other: Mapping[str, int] = {place: r for place, r in ranks.items() if r != rank}
    config = copy.deepcopy(model.peft_config[names[-1]])
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    config.rank_pattern, config.alpha_pattern = dict(other), dict(other)
    config.target_modules = set(ranks)
    return config, tensors
