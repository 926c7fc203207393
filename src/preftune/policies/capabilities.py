"""What a causal language model allows, read from its configuration and found by trying."""

import sys
from typing import Any

import torch

from preftune.policies.attention import NAME

UNLIMITED = sys.maxsize
_WINDOWED = {"sliding_attention", "chunked_attention"}
_WINDOWS = ("sliding_window", "attention_chunk_size")


@torch.no_grad()
def head_is_a_product(model: Any) -> bool:
    """Whether the logits are the last hidden states times the output embedding, and nothing more.

    Some models scale or cap logits, or leave the output embedding to another module. What enters
    the head must be what the trunk gives, and logits put in the head's place must come out as
    they are: so a cap shows, however small the model's own logits.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # adapters and quantisers replace or derive from it
        return False
    seen: dict[str, torch.Tensor] = {}

    def replace(_: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        seen["hidden"] = args[0]
        seen["logits"] = torch.linspace(-40, 40, out.numel()).view(out.shape).to(out)
        return seen["logits"].clone()

    ids = torch.arange(1, 6, device=head.weight.device)[None] % len(head.weight)
    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    trunk = model.base_model(input_ids=ids, use_cache=False)
    hidden = getattr(trunk, "last_hidden_state", None)
    if not seen or hidden is None or hidden.shape != seen["hidden"].shape:
        return False
    near = 16 * torch.finfo(hidden.dtype).eps
    return torch.equal(logits.double(), seen["logits"].double()) and torch.allclose(
        hidden, seen["hidden"], rtol=near, atol=near
    )


def share_window(model: Any) -> int:
    """Tokens of a prompt with a response up to which responses may share a row; 0 is never.

    The mask of a shared row replaces the model's own. It is boolean, which `sdpa` alone takes
    (eager attention would add it to the scores), and holds no sliding window: it is right only
    where none bites.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", NAME):
        return 0
    kinds = set(getattr(config, "layer_types", None) or _WINDOWED)
    if not kinds <= {"full_attention", *_WINDOWED}:
        return 0  # layers with a state of their own see every response before them
    if not kinds & _WINDOWED:
        return UNLIMITED
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return min((int(w) for w in windows if w is not None), default=UNLIMITED)
