"""The one door to peft: adapters made, read, switched, saved and merged.

A model with an adapter serves as policy and as reference: the reference computes with what the
model had before training, which is nothing but the base model, or an earlier adapter. That one
stays frozen under the new one; of one that goes on to be trained, a frozen copy is kept.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from preftune import adapter_folder, huggingface
from preftune.adapter_folder import PREFIX, VALUE_HEAD, WEIGHTS, Described
from preftune.errors import UserError

NAME, EARLIER, KEPT = "default", "earlier", "start"
"""Of the adapter that is trained, of one beneath it, and of its frozen copy."""
_MERGE = "Merge the earlier one first: preftune merge FOLDER --output DIR, then --model DIR."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A new adapter."""

    kind: str
    """lora, rslora or dora."""
    rank: int
    alpha: float
    target_modules: str | list[str]
    """`all-linear`, or names of modules."""
    seed: int
    scores: bool
    """The model gives scores; its head is trained in full."""


def is_adapted(model: Any) -> bool:
    """Whether peft has wrapped a model."""
    return hasattr(model, "disable_adapter")


def load(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model: a folder, a Hub id, or an adapter's folder with its base model.

    An adapter is on and frozen. In eval mode.

    Raises:
        UserError: no such model, or the adapter does not fit its base.
    """
    folder = huggingface.resolve_model(name)
    if not adapter_folder.is_adapter(folder):
        return huggingface.load_model(name, dtype, **options)
    found = adapter_folder.describe(folder)
    if found.scores:
        raise UserError(
            f"model '{name}': is an adapter of a reward model, not of a causal language model. "
            "Give it as --reward."
        )
    return put_on(huggingface.load_model(found.base, dtype, **options), found)


def load_classifier(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A sequence-classification model with one output, and its tokenizer; also by its adapter."""
    folder = huggingface.resolve_model(name)
    if not adapter_folder.is_adapter(folder):
        return huggingface.load_classifier(name, dtype)
    found = adapter_folder.describe(folder)
    if not found.scores:
        raise UserError(
            f"reward '{name}': is an adapter of a causal language model, not of a "
            "sequence-classification model. A reward model has a head with one output."
        )
    model = merged(put_on(huggingface.classifier_from(found.base, dtype), found))
    return model, huggingface.load_tokenizer(name)


def classifier_from(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """A classifier to be trained (`huggingface.classifier_from`). An adapter of one goes on to be
    trained; one of a language model is merged into the weights beneath the head."""
    folder = huggingface.resolve_model(name)
    if not adapter_folder.is_adapter(folder):
        return huggingface.classifier_from(name, dtype, **options)
    found = adapter_folder.describe(folder)
    model = put_on(huggingface.classifier_from(found.base, dtype, **options), found)
    if found.scores:
        return trainable(model)
    return merged(model).requires_grad_(True)


def is_classifier(name: str) -> bool:
    """Whether a model, or the model of an adapter, is a sequence-classification model."""
    folder = huggingface.resolve_model(name)
    if adapter_folder.is_adapter(folder):
        return adapter_folder.describe(folder).scores
    return huggingface.is_classifier(name)


def put_on(base: Any, found: Described, name: str = NAME) -> Any:
    """The base model with a folder's adapter on it, frozen.

    Raises:
        UserError: the adapter is of another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    settings = dict(found.settings)
    if not found.scores and hasattr(base, "score"):  # a language model's, beneath a new head
        settings["task_type"] = None
    tensors = load_file(found.folder / WEIGHTS)
    model: Any = None
    try:
        with _quietly(0):
            model = get_peft_model(base, LoraConfig(**settings), adapter_name=name)
            loaded = set_peft_model_state_dict(model, tensors, adapter_name=name)
        strange = list(loaded.unexpected_keys)
        own = [key for key in loaded.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        strange, own = [str(error).strip().splitlines()[0][:200]], []
    if strange or own:
        raise UserError(
            f"adapter '{found.folder}': it does not fit its base model '{found.base}' "
            f"({(strange + own)[0]}). Name the model that it was trained on."
        )
    model.requires_grad_(False)
    return model.eval()


def load_value_head(name: str, head: torch.nn.Linear) -> None:
    """Start a value head as training left it, where an adapter's folder holds one.

    Raises:
        UserError: it is of another model, or no numbers.
    """
    path = Path(huggingface.resolve_model(name)) / VALUE_HEAD
    if not path.is_file() or not adapter_folder.is_adapter(path.parent):
        return
    try:
        held = load_file(path)
        if not all(bool(t.isfinite().all()) for t in held.values()):
            raise ValueError("it holds what is no number")
        head.load_state_dict(held)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"adapter '{name}': {VALUE_HEAD} does not fit: {why}. Delete it to begin with none."
        ) from error


def attach(model: Any, recipe: Recipe) -> Any:
    """The model with a new adapter, which alone is trained, on top of one that it may have.

    The new one changes nothing to begin with. Its random half follows from the recipe's seed.

    Raises:
        UserError: the modules named are not there, or the two could not be saved as one.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        target_modules=recipe.target_modules,
        use_rslora=recipe.kind == "rslora",
        use_dora=recipe.kind == "dora",
        task_type="SEQ_CLS" if recipe.scores else "CAUSAL_LM",
    )
    beneath = list(model.active_adapters) if is_adapted(model) else []
    name = NAME if NAME not in beneath else "trained"
    try:
        with _quietly(recipe.seed):
            if not beneath:
                return get_peft_model(model, config, adapter_name=name).eval()
            _check_stack(model, beneath, recipe)
            model.add_adapter(name, config)
            model.base_model.set_adapter([*beneath, name])
    except (ValueError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"adapter: peft cannot make it: {first} Set adapter.target_modules to names of this "
            "model's linear layers, or leave it out."
        ) from error
    return trainable(model, [name])


def _check_stack(model: Any, beneath: Sequence[str], recipe: Recipe) -> None:
    """Two adapters are saved as one that holds both; this says which can be."""
    configs = [model.peft_config[name] for name in beneath]
    plain = all(
        str(getattr(c.peft_type, "value", c.peft_type)) == "LORA" and not c.use_dora
        and not c.modules_to_save and c.bias == "none" for c in configs
    )  # fmt: skip
    if not plain or recipe.kind == "dora" or recipe.scores:
        raise UserError(
            "adapter: a new one on top of an earlier one is saved as one adapter that holds both, "
            "which takes plain LoRA or rsLoRA of a language model for each. " + _MERGE
        )


def trainable(model: Any, names: Sequence[str] | None = None) -> Any:
    """Train those adapters (default: the active ones), with the heads that they save; no others."""
    names = list(model.active_adapters) if names is None else names
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not set(names).isdisjoint(key.split(".")))
    return model.eval()


def trained(model: Any) -> list[str]:
    """Names of the active adapters that are trained."""
    learns = (n for n, p in model.named_parameters() if p.requires_grad)
    learning = {part for name in learns for part in name.split(".")}
    return [name for name in model.active_adapters if name in learning]


def untrained(model: Any) -> tuple[str, ...]:
    """Names of the active adapters that stay as they are."""
    learning = trained(model)
    return tuple(name for name in model.active_adapters if name not in learning)


@contextmanager
def only(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Compute with those adapters, or with the base model alone."""
    if not names:
        with model.disable_adapter():
            yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    changed = [(m, m._active_adapter) for m in model.modules() if isinstance(m, kinds)]
    try:
        for module, _ in changed:
            here = getattr(module, "_adapters", names)
            module._active_adapter = [name for name in names if name in here]
        yield
    finally:
        for module, before in changed:
            module._active_adapter = before


def keep_copy(model: Any) -> tuple[str, ...]:
    """Add frozen copies of the active adapters; their names. They are not active."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    flags = [(p, p.requires_grad) for p in model.parameters()]
    active, made = list(model.active_adapters), []
    for name in active:
        twin = f"{KEPT}_{name}"
        while twin in model.peft_config:
            twin += "_"
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        state = {key: tensor.clone() for key, tensor in state.items()}
        with _quietly(0):
            model.add_adapter(twin, copy.deepcopy(model.peft_config[name]))
            set_peft_model_state_dict(model, state, adapter_name=twin)
        made.append(twin)
    model.requires_grad_(False)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.eval()
    return tuple(made)


def names_beneath(model: Any, on: Sequence[str]) -> dict[str, str]:
    """Weights and buffers but those of other adapters, to their names without the wrapping."""
    off = set(model.peft_config) - set(on)
    found = {}
    for name in (n for named in (model.named_parameters, model.named_buffers) for n, _ in named()):
        if off.isdisjoint(name.split(".")):
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            found[name] = plain.replace(".original_module.", ".")
    return found


def described(model: Any, name: str) -> dict[str, Any]:
    """The settings of an adapter of a model, as plain data: the same in every process."""
    left_out = ("base_model_name_or_path", "peft_version", "inference_mode", "task_type")
    settings = model.peft_config[name].to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in settings.items()
        if key not in left_out
    }


def takes_norms(model: Any) -> bool:
    """Whether an adapter computes with the base's weights, and not with what they give alone."""
    return any(getattr(config, "use_dora", False) for config in model.peft_config.values())


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Random draws of peft from a seed of their own, and its advice left out."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        yield


def merged(model: Any) -> Any:
    """A plain model whose weights have the active adapters in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload(safe_merge=True, adapter_names=list(model.active_adapters))


def check_quantize(quantize: str | None, device: str) -> None:
    """Refuse a quantised base where it cannot be, before anything is loaded.

    Raises:
        UserError: no CUDA device, or no bitsandbytes.
    """
    if quantize is None:
        return
    lacks = []
    if not torch.cuda.is_available() or device.split(":")[0] not in ("auto", "cuda"):
        lacks.append("a CUDA device")
    if util.find_spec("bitsandbytes") is None:
        lacks.append("the package bitsandbytes (pip install bitsandbytes)")
    if lacks:
        raise UserError(
            f"adapter.quantize: {quantize} needs {' and '.join(lacks)}. "
            "Leave it out to train the adapter over the whole weights."
        )
