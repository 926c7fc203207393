"""Who draws a run's fresh responses: the model itself, or a vLLM server with its weights."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from preftune.asking import LOCAL, Again, Refused, address, once
from preftune.building import decoding_of, pick_device
from preftune.config import Config
from preftune.errors import UserError, nearest
from preftune.huggingface import DEFAULT_MODEL, cache_folder
from preftune.loading import DEFAULT_MAX_LENGTH
from preftune.method import Method
from preftune.policies.transformer import Transformer
from preftune.sampling import vllm_child
from preftune.sampling.vllm import Carrier, Engine, Server
from preftune.sampling.vllm_weights import Folder, Transfer
from preftune.team import current

_PROBE = 64
"""Tokens of a prompt by which the server's weights are compared with the trainer's."""
_APART = 0.25
"""Nats a token, in the mean: bfloat16 makes hundredths of one, other weights make whole ones."""
_NOT_WHOLE = "weights are brought to vLLM whole, and an adapter's are not whole."
_TEXT = "The quick brown fox, 12 + 30 = 42."


def is_asked_for(config: Config, method: Method) -> bool:
    """Whether a server draws for this run."""
    return config.sampler != "local" and any(t.source.on_policy for t in method.terms)


def check(config: Config, method: Method) -> None:
    """Refuse what a server cannot do, before anything is loaded.

    Raises:
        UserError: which setting does not go with it, or that it does not answer.
    """
    if config.sampler == "local":
        if config.max_staleness:
            raise UserError(
                "max_staleness: the model samples by itself, with its weights as they are. It "
                "goes with sampler: vllm."
            )
        return
    if config.sampler != "vllm" and address(config.sampler) is None:
        raise UserError(
            f"sampler '{config.sampler}': is neither local, nor vllm, nor an address as "
            f"http://127.0.0.1:8000.{nearest(config.sampler, ('local', 'vllm'))}"
        )
    if not is_asked_for(config, method):
        return
    _check_settings(config, method)
    if config.sampler == "vllm":
        vllm_child.python()
    else:
        _check_answers(config)


def _check_settings(config: Config, method: Method) -> None:
    """Settings that do not go with a server."""
    if current().size > 1:
        raise UserError(
            "sampler: a server has the weights of one process, and this run has "
            f"{current().size}. Leave sampler out, or train in one process."
        )
    if config.adapter is not None:
        raise UserError(f"sampler: {_NOT_WHOLE} Leave adapter out, or sampler.")
    if config.stop:
        raise UserError(
            "stop: vLLM is given token ids and knows no texts. Leave stop out, or sampler."
        )
    if config.max_staleness and any(t.penalises_kl for t in method.terms):
        raise UserError(
            f"max_staleness: the KL of '{method.name}' needs samples of the policy as it is. Set "
            "it to 0."
        )


def _address(config: Config) -> str:
    return config.sampler.rstrip("/").removesuffix("/v1")


def _command(config: Config, room: int | None = None) -> str:
    """What starts a server for the run."""
    device = pick_device(config.device).type
    dtype = "float32" if config.dtype == "float64" else config.dtype
    given = vllm_child.flags(dtype, device, room or config.max_length or DEFAULT_MAX_LENGTH)
    if device == "cuda":
        given += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    model = config.model
    if model == DEFAULT_MODEL:
        model = str(cache_folder() / "models" / model)
    return vllm_child.by_hand(model, _address(config), given)


def _check_answers(config: Config) -> None:
    """The server is there, and of the kind that can be given weights."""
    url = _address(config)
    parts = address(url)
    assert parts is not None, "checked before"
    where = "" if parts.hostname in LOCAL else " It is on another machine: is it up there?"
    try:
        once(f"{url}/health", timeout=10.0)
        once(f"{url}/weight_info", timeout=10.0)
    except Again as error:
        raise UserError(
            f"sampler '{url}': no answer ({error}).{where} Start it: {_command(config)}"
        ) from error
    except Refused as error:
        raise UserError(
            f"sampler '{url}': it is no vLLM server that takes weights ({error}). Start it as: "
            f"{_command(config)}"
        ) from error


def check_model(config: Config, method: Method, model: Any, tokenizer: Any, room: int) -> None:
    """Compare the run's model with what a server takes, and with one that the user started.

    Args:
        room: tokens of the longest prompt with a response.
    Raises:
        UserError: the model has an adapter; the server has another tokenizer, or too little room.
    """
    if not is_asked_for(config, method):
        return
    if model.trunk.has_adapter:
        raise UserError(f"sampler: {_NOT_WHOLE} Merge it first (`preftune merge`).")
    if config.sampler == "vllm":
        return
    url = _address(config)
    server = Server(url=url)
    has = server.ask("/v1/models")["data"][0]["max_model_len"]
    if has < room:
        raise UserError(
            f"sampler '{url}': it takes {has} tokens, and a prompt with its response has up to "
            f"{room}. Start it with --max-model-len {room}."
        )
    told = str(server.ask("/server_info").get("vllm_config"))
    if "device_config=cpu" in told and "load_format=dummy" not in told:
        raise UserError(
            f"sampler '{url}': on a CPU, vLLM brings the head of some models up to date only if it "
            f"was started for that. Start it as: {_command(config, room)}"
        )
    try:
        body = {"prompt": _TEXT, "add_special_tokens": False}
        theirs = once(f"{url}/tokenize", body, timeout=30.0)["tokens"]
    except (Again, Refused, KeyError, TypeError):
        return  # started without a tokenizer: it needs none
    ours = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    if theirs != ours:
        raise UserError(
            f"sampler '{url}': another model's tokenizer is behind it ({len(theirs)} tokens where "
            f"the run's has {len(ours)}, or other ones). Start it with the run's model."
        )


@contextmanager
def engine(
    config: Config,
    method: Method,
    model: Any,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    note: Callable[[str], None],
) -> Iterator[Engine | None]:
    """The engine of a run, while it runs; None where the model samples by itself.

    Args:
        model: what is trained.
        prompts: token ids, of those that will be answered.
        folder: of the run; weights and the server's log go into its `vllm/`.
    """
    if not is_asked_for(config, method):
        if config.sampler != "local":
            note(f"sampler: '{method.name}' takes no fresh samples of the policy; none is asked.")
        yield None
        return
    assert isinstance(model, Transformer), "what draws is a policy"
    place = folder / "vllm"
    place.mkdir(exist_ok=True)
    narrow = model.autocast or model.model.dtype
    dtype = torch.float32 if narrow == torch.float64 else narrow  # vLLM has no wider one
    on_cpu = model.device.type != "cuda"
    weights = Folder(model.model, place, dtype, head_apart=on_cpu)
    room = max(map(len, prompts)) + config.max_new_tokens
    child = None
    try:
        if config.sampler == "vllm":
            note("sampler: starting vLLM")
            weights.write()
            named = str(dtype).removeprefix("torch.")
            given = vllm_child.flags(named, model.device.type, room)
            given += [] if on_cpu else ["--gpu-memory-utilization", "0.3"]  # the rest is ours
            child = vllm_child.Child(weights.path, given, place / "vllm.log")
            server = Server(url=child.url, gone=child.gone)
        else:
            server = Server(url=_address(config), command=_command(config, room))
        yield Engine(
            server=server, carrier=_carrier(model, weights, child is not None),
            decoding=decoding_of(config), end_ids=model.end_ids,
            max_staleness=config.max_staleness,
            arrived=lambda server: _compare(server, model, list(prompts[0][:_PROBE])),
        )  # fmt: skip
    finally:
        if child is not None:
            child.close()
        weights.clear()


def _carrier(model: Transformer, weights: Folder, own: bool) -> Carrier:
    """Between GPUs vLLM's own transfer, elsewhere files. NCCL has no way from a GPU to itself,
    where a server of our own stands."""
    if model.device.type == "cuda" and vllm_child.is_installed() and not own:
        return Transfer(model.model)
    return weights


def _compare(server: Server, policy: Transformer, tokens: list[int]) -> None:
    """See that the trainer's weights are those that the server now computes with.

    Raises:
        UserError: they are not.
    """
    if len(tokens) < 2:
        return
    ids = torch.tensor([tokens])
    rest = ids[:, None, 1:]
    with torch.no_grad():
        ours = policy.score(ids[:, :1], torch.ones(1, 1, dtype=torch.bool), rest, rest > -1)
    theirs = torch.tensor(server.score(tokens))
    apart = float((ours[0, 0] - theirs).abs().mean())
    if not apart < _APART:
        raise UserError(
            f"sampler '{server.url}': after the weights were brought to it, its log-probs of a "
            f"prompt are {apart:.2f} nats a token from the trainer's. Another model is behind it, "
            "or the weights did not arrive."
        )
