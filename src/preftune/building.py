"""From settings to what is trained: the row, the model and its device, the reference."""

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune import adapters, huggingface, methods, spec
from preftune.config import Config, set_path
from preftune.data import (
    Renderer,
    Rows,
)  # fmt: skip
from preftune.errors import UserError
from preftune.method import Method
from preftune.policies.transformer import Transformer
from preftune.reward_model import RewardModel
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding
from preftune.team import current

SMALL_MODEL = 5_000_000
"""Parameters below which bfloat16 gains nothing on a CPU."""


def method_of(config: Config, overrides: Mapping[str, Any] | None = None) -> Method:
    """The row that the settings name, with every setting in its place.

    Args:
        overrides: dotted paths below `terms`, from `--set`.
    """
    if isinstance(config.method, dict):
        row = spec.from_row(config.method)
    else:
        named = methods.table().get(config.method)
        if config.terms is None:
            row = methods.get(config.method)
        else:  # a run's own config.yaml: of a row of the table, or of the user's
            row = spec.from_data(config.method, config.terms, named)
    given = {n: v for n in methods.SETTINGS if (v := getattr(config, n, None)) is not None}
    row = methods.resolve(methods.configure(row, given))
    if overrides:
        data: dict[str, Any] = {"terms": spec.to_data(row)}
        for path, value in overrides.items():
            _set_term(data, path, value)
        row = spec.from_data(row.name, data["terms"], row)
    methods.check(row, decoding_of(config), config.batch_size)
    for i, term in enumerate(row.terms):
        spec.check_term(f"terms.{i}", term)
    return row


def _set_term(data: dict[str, Any], path: str, value: Any) -> None:
    """`terms.0.beta` stands for `terms.0.settings.beta`; settings may be added."""
    parts = path.split(".")
    if len(parts) >= 3 and parts[1].isdigit() and int(parts[1]) < len(data["terms"]):
        term = data["terms"][int(parts[1])]
        if parts[-1] not in term and parts[2] not in ("source", "labeller"):
            term["settings"][parts[-1]] = (
                value  # checked against the objective when the row is built
            )
            return
        if parts[2] in ("source", "labeller") and len(parts) in (4, 5) and parts[3] != "members":
            place = term[parts[2]]
            if len(parts) == 5:  # a part inside, left out of the data where it is as by default
                place = place.setdefault(parts[3], {})
            place[parts[-1]] = value
            return
    set_path(data, path, value)


def decoding_of(config: Config) -> Decoding:
    """How responses are drawn.

    Raises:
        UserError: a stop string is empty, or a response may not end at all.
    """
    if "" in (config.stop or ()):
        raise UserError("stop: a text is empty, which every response holds. Leave it out.")
    if config.min_new_tokens >= config.max_new_tokens:
        raise UserError(
            f"min_new_tokens: {config.min_new_tokens} leaves a response no token to end with. "
            f"Give less than max_new_tokens ({config.max_new_tokens})."
        )
    return Decoding(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, top_k=config.top_k, min_new_tokens=config.min_new_tokens,
        stop=tuple(config.stop or ()),
    )  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device that a setting names; `auto` takes an accelerator where there is one."""
    own = current().device  # one of several processes has its own
    if own is not None:
        if name not in ("auto", own.type):
            raise UserError(
                f"device '{name}': the processes were launched for {own.type}. "
                "Leave device out, or launch them for the other (accelerate launch --cpu)."
            )
        return own
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{name}': not usable here ({str(error).splitlines()[0]}). Give auto or cpu."
        ) from error
    return device


def _faster_in_bfloat16(device: torch.device) -> bool:
    """A GPU and an x86 processor say so; of others, one product is timed in both types: where units
    for bfloat16 are missing, it takes several times longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    # a busy machine must not decide: it would change the numbers of a run
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(20):  # in turn, so that a busy moment meets both
        for dtype in best:
            a, b = torch.randn(256, 512).to(dtype), torch.randn(512, 1024).to(dtype)
            began = time.perf_counter()
            torch.matmul(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] > 1.5 * best[torch.bfloat16]


def autocast_of(dtype: str, model: Any, device: torch.device | None = None) -> torch.dtype | None:
    """The trunk's compute type under float32 weights; None is the weights' own.

    Args:
        device: where it will be; None: it is there.
    """
    if dtype == "bfloat16":
        return torch.bfloat16
    if dtype != "auto":
        return None
    place = device or next(model.parameters()).device
    large = sum(p.numel() for p in model.parameters()) > SMALL_MODEL
    # what is timed may differ from process to process
    return torch.bfloat16 if large and current().agreed(_faster_in_bfloat16(place)) else None


CONTROLS = ("[bad]\n", "[good]\n")
"""Text behind a prompt that asks for such a response (Offline(take="conditioned"))."""


def controls_of(method: Method | None, tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Ids of the controls, where a source conditions on them."""
    if method is None or not any(
        getattr(t.source, "take", "") == "conditioned" for t in method.terms
    ):
        return None
    bad, good = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in CONTROLS)
    return bad, good


@dataclass(frozen=True)
class Asked:
    """Prompts as a policy with controls is asked for good responses to them."""

    rows: Rows
    policy: Transformer

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        """The data's responses, to plain prompts."""
        return self.rows.samples(index, responses=responses)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [n, P] with the control for good, and their mask."""
        prompt, mask = self.rows.prompts_only(index)
        return self.policy.condition(prompt, mask, torch.ones(len(prompt), dtype=torch.bool))


def as_rendered(tokenizer: Any, renderer: Renderer | None) -> Any:
    """The tokenizer with the chat template that a run rendered by, where that is a file's: whoever
    loads the model, as a reward or to go on, renders as it was trained."""
    text = None if renderer is None else renderer.template_text
    return _templated(tokenizer, text) if isinstance(text, str) else tokenizer


def as_scored(tokenizer: Any, renderer: Renderer | None) -> Any:
    """The same of a reward model, which reads nothing but what others said: without a template
    where text was taken as it is, and with the system prompt in it."""
    if renderer is None:
        return tokenizer
    text, told = renderer.template_text, renderer.system_prompt
    if text is not None and told is not None:
        own = text if isinstance(text, str) else tokenizer.get_chat_template()
        turn = "[{'role': 'system', 'content': " + json.dumps(told, ensure_ascii=False) + "}]"
        text = (
            "{% if messages and messages[0]['role'] not in ['system', 'developer'] %}"
            "{% set messages = " + turn + " + messages %}{% endif %}" + own
        )
    return _templated(tokenizer, text)


def _templated(tokenizer: Any, text: Any) -> Any:
    """The tokenizer with that chat template; the one that is given stays as it is."""
    if text == tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return tokenizer


def asking_for_good(tokenizer: Any) -> Any:
    """The tokenizer with a chat template that asks for good responses, so that whoever loads the
    model does: the control stands behind a prompt, and before the answer of a whole conversation.
    """
    if not isinstance(tokenizer.chat_template, str):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    control = CONTROLS[1]
    before = (
        "{% if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' %}"
        "{% set messages = messages[:-1] + [{'role': 'assistant', 'content': '"
        + control
        + "' + messages[-1]['content']}] %}{% endif %}"
    )
    after = "{% if add_generation_prompt %}" + control + "{% endif %}"
    tokenizer.chat_template = before + tokenizer.chat_template + after
    return tokenizer


def make_model(
    config: Config, model: Any | None, tokenizer: Any | None, method: Method
) -> Transformer | RewardModel:
    """What the method trains: a policy, or where it takes scores alone a reward model; one that is
    made already is taken as it is."""
    if isinstance(model, Transformer | RewardModel):
        return model
    if "score" not in method.outputs:
        return make_policy(config, model, tokenizer, method)
    loaded: Any = model
    if loaded is None:
        loaded = adapters.classifier_from(config.model, _weights(config), **_bits(config))
    if getattr(getattr(loaded, "config", None), "num_labels", None) != 1:
        raise UserError(
            "model: to train a reward model give a folder, or a sequence-classification model "
            "with one output."
        )
    loaded = _adapted(config, _placed(config, loaded), scores=True)
    return RewardModel(
        loaded, autocast=autocast_of(config.dtype, loaded), share_prefix=config.share_prefix,
        packing=config.packing,
    )  # fmt: skip


def _weights(config: Config) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def check_adapter(config: Config) -> None:
    """Refuse an adapter that cannot be trained here, before anything is loaded."""
    if config.adapter is not None and current().sharded:
        raise UserError(
            "adapter: not with FSDP, where the reference is a model of its own. Launch with "
            "--multi_gpu (DDP): an adapter has few weights to spread."
        )
    if config.adapter is not None:
        adapters.check_quantize(config.adapter.quantize, config.device)


def _bits(config: Config) -> dict[str, Any]:
    """Options of loading: the quantisation that an adapter asks for."""
    if config.adapter is None or config.adapter.quantize is None:
        return {}
    return huggingface.in_bits(config.adapter.quantize, pick_device(config.device))


def _placed(config: Config, model: Any) -> Any:
    """The model on its device, in the type that weights are kept in."""
    if getattr(model, "quantization_method", None) is not None:
        return model  # it is where it was loaded, in types of its own
    return model.to(device=pick_device(config.device), dtype=_weights(config))


def _adapted(config: Config, model: Any, *, scores: bool = False) -> Any:
    """`adapted`, in its place and type."""
    return (
        model if config.adapter is None else _placed(config, adapted(config, model, scores=scores))
    )


def adapted(config: Config, model: Any, *, scores: bool = False) -> Any:
    """The model with the adapter that is asked for."""
    asked = config.adapter
    if asked is None:
        return model
    recipe = adapters.Recipe(
        kind=asked.kind, rank=asked.rank, alpha=asked.alpha, seed=config.seed, scores=scores,
        target_modules=asked.target_modules,
    )  # fmt: skip
    return adapters.attach(model, recipe)


def make_policy(
    config: Config, model: Any | None, tokenizer: Any | None, method: Method | None = None
) -> Transformer:
    """The policy, its weights in float32 (or float64), with what the method needs on top."""
    named = model is None
    if named:
        model = adapters.load(config.model, _weights(config), **_bits(config))
        if method is not None and config.adapter is None and adapters.is_adapted(model):
            model = adapters.trainable(model)
    model = _placed(config, model)
    if method is not None:
        model = _adapted(config, model)
    ends = huggingface.end_ids(model, tokenizer)
    if not ends:
        raise UserError(
            f"model '{config.model}': has no end token. Set eos_token_id in its configuration."
        )
    if config.stop and tokenizer is None:
        raise UserError("stop: needs the model's tokenizer. Give `tokenizer` beside `model`.")
    policy = Transformer(
        model, end_ids=ends, decoding=decoding_of(config),
        autocast=autocast_of(config.dtype, model), share_prefix=config.share_prefix,
        packing=config.packing,
        value_head=method is not None and "value" in method.outputs | method.needs,
        controls=controls_of(method, tokenizer),
        decode=None if tokenizer is None else lambda ids: huggingface.text_of(tokenizer, ids),
    )  # fmt: skip
    if named and policy.value_head is not None:
        adapters.load_value_head(config.model, policy.value_head)
    return policy


def make_reference(config: Config, policy: Transformer) -> Transformer:
    """The reference policy: a model of its own, or a frozen copy of the policy as it starts."""
    if config.reference is None:
        return policy.frozen_copy()
    dtype = next(policy.model.parameters()).dtype
    model = adapters.load(config.reference, dtype).to(policy.device)
    if model.config.vocab_size != policy.model.config.vocab_size:
        raise UserError(
            f"reference '{config.reference}': has {model.config.vocab_size} tokens, the model "
            f"{policy.model.config.vocab_size}. The reference must share the model's tokenizer."
        )
    return policy.with_model(model)


def make_renderer(config: Config, tokenizer: Any, model: Transformer | RewardModel) -> Renderer:
    """The renderer of the model's own tokenizer, as the settings ask."""
    return Renderer(
        tokenizer, template=config.template, system_prompt=config.system_prompt,
        end_ids=huggingface.end_ids(model.model, tokenizer),
    )  # fmt: skip


def context_of(model: Any) -> int | None:
    """Tokens that a model can take."""
    return getattr(model.config, "max_position_embeddings", None)
