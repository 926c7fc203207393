"""Tiny random models of many architectures, and log-probs by plain one-row-at-a-time forwards."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from preftune.policies.transformer import Transformer
from preftune.samples import Samples, pad_stack

END = 1
"""The end token, and the pad token, of the tokenizer in conftest.py."""
VOCAB = 261
WINDOW = 8
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": END,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160}
_GPT2 |= {"initializer_range": 0.3, "eos_token_id": END, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2, "eos_token_id": END}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE | {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", _SHAPE | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", _GPT2 | {"attn_pdrop": 0.1}),
    "qwen3": ("Qwen3Config", _SHAPE),
    "mistral": ("MistralConfig", _SHAPE | {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3TextConfig", _SHAPE | _MIXED | {"query_pre_attn_scalar": 8}),
    "gemma2": ("Gemma2Config", _SHAPE | _MIXED | {"final_logit_softcapping": 2.0}),
    "granite": ("GraniteConfig", _SHAPE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": ("CohereConfig", _SHAPE | {"logit_scale": 0.25}),
    "bloom": ("BloomConfig", _BLOOM | {"initializer_range": 0.3, "hidden_dropout": 0.1}),
}
ARCHITECTURES = list(_CONFIGS)


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random model; norms and biases, which start at one and zero, are moved too."""
    kind, settings = _CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def policy(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> Transformer:
    return Transformer(make(name, dtype, seed), **({"end_ids": [END]} | options))


@torch.no_grad()
def next_log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """The whole distribution before each response token: one row, no padding, nothing shared."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def plain_log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-prob of each response token."""
    table = next_log_probs(model, prompt, response)
    return table.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def samples(prompts: list[list[int]], responses: list[list[list[int]]]) -> Samples:
    """Padded as the loop has them; the mask is made from lengths."""
    flat = [torch.tensor(r, dtype=torch.long) for group in responses for r in group]
    prompt, prompt_mask = pad_stack([torch.tensor(p) for p in prompts], left=True)
    tokens, mask = pad_stack(flat)
    shape = (len(prompts), len(responses[0]))
    return Samples(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=tokens.view(*shape, -1),
        mask=mask.view(*shape, -1),
        finished=torch.ones(shape, dtype=torch.bool),
        origin=torch.full(shape, -2),
        row=torch.arange(len(prompts)),
    )


def ragged(seed: int = 0, vocab: int = VOCAB) -> Samples:
    """Four prompts of 1 to 13 tokens, three responses each of 1 to 12."""
    g = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, vocab, (length,), generator=g).tolist()

    lengths = [[3, 12, 1], [7, 2, 5], [1, 1, 4], [9, 6, 10]]
    return samples(
        [ids(n) for n in (5, 1, 13, 8)],
        [[[*ids(n - 1), END] for n in group] for group in lengths],
    )


def score(of: Transformer, s: Samples) -> Tensor:
    return of.score(s.prompt, s.prompt_mask, s.tokens, s.mask)


def unpadded(s: Samples) -> list[tuple[int, int, list[int], list[int]]]:
    """(prompt number, response number, prompt ids, response ids) of each response."""
    return [
        (i, k, s.prompt[i][s.prompt_mask[i]].tolist(), s.tokens[i, k][s.mask[i, k]].tolist())
        for i in range(s.tokens.shape[0])
        for k in range(s.tokens.shape[1])
    ]
