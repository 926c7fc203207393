"""A reward model: a causal language model's trunk under a head with one output."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune import huggingface
from preftune.adapter_saving import save_model
from preftune.policies.sharding import shard
from preftune.policies.trunk import Trunk
from preftune.samples import Samples

OUTPUTS = frozenset({"score"})


class RewardModel:
    """Scores whole responses; the sequence-classification model of transformers, in our layouts."""

    batch_shape: tuple[int, ...] = ()

    def __init__(
        self,
        model: Any,
        *,
        autocast: torch.dtype | None = None,
        share_prefix: bool | None = None,
        packing: bool | None = None,
    ) -> None:
        """
        Args:
            model: a decoder with a head `score` of one output (`huggingface.classifier_from`).
            autocast: compute dtype of the trunk; None computes in the weights' own.
            share_prefix: a prompt once for all of its responses; None decides by trying.
            packing: rows one after another without padding; None decides by trying.
        """
        self.trunk = Trunk(model, autocast=autocast, share_prefix=share_prefix, packing=packing)

    @property
    def model(self) -> Any:
        """The sequence-classification model."""
        return self.trunk.model

    @property
    def autocast(self) -> torch.dtype | None:
        """Compute dtype of the trunk; None is the weights' own."""
        return self.trunk.autocast

    @property
    def share_prefix(self) -> bool:
        """A prompt is computed once for all of its responses, where they fit."""
        return self.trunk.share_prefix

    @property
    def packing(self) -> bool:
        """Rows stand one after another without padding, where they fit."""
        return self.trunk.packing

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.device

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`: of `score` [n, K]."""
        assert names <= OUTPUTS, f"a reward model gives no {', '.join(sorted(names - OUTPUTS))}"
        s = samples
        return {name: self.score(s.prompt, s.prompt_mask, s.tokens, s.mask) for name in names}

    def score(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        tokens: Int[Tensor, "n K T"],
        mask: Bool[Tensor, "n K T"],
    ) -> Float[Tensor, "n K"]:
        """Score of each response, read at its last token (of an empty one: the prompt's last).

        The end token counts; the place is found by length, never by the padding id. Float32 at
        least.
        """
        # a layout leaves the last token out, since nothing is predicted from it: here the score
        # is, so each response gets one more token, of which nothing but the place is used
        length = mask.sum(-1, keepdim=True)
        longer = torch.arange(mask.shape[-1] + 1) <= length
        last = torch.zeros_like(longer).scatter(-1, length, True)
        tokens = torch.nn.functional.pad(tokens, (0, 1))
        layout = self.trunk.layout(prompt, prompt_mask, tokens, longer)
        layout = replace(layout, predict=layout.predict[last[longer]])
        head = self.trunk.whole.score
        flat = self.trunk.through(lambda: self.trunk.one_number(head, self.trunk.hidden(layout)))
        # losses are formed on the CPU: a number a response, wherever the model is
        return flat.cpu().view(mask.shape[:-1])

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """See `Trainable.named_parameters`."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterable[Tensor]:
        """See `Trainable.parameters`."""
        return (p for _, p in self.named_parameters())

    def shard(self, size: int) -> None:
        """Spread the weights over so many processes."""
        shard(self.trunk, [], size)

    def save(self, folder: Path, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
        """Write a folder that transformers' AutoModelForSequenceClassification loads unchanged.

        It reads there what is read here: configuration and tokenizer pad with `padding_id`.

        Args:
            state: the weights by name, in place of the model's own.
        """
        pad = padding_id(self.model, tokenizer)
        self.model.config.get_text_config().pad_token_id = pad
        if tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
            tokenizer.padding_side = "right"  # on the left it would move absolute positions
        save_model(self.model, tokenizer, folder, state=state)


def padding_id(model: Any, tokenizer: Any) -> int | None:
    """The id that a saved classifier pads with.

    Transformers' classifiers read the rightmost token that is not the padding id. Were that an end
    id, as in many models, they would read the token before the end token. So it is the first of
    these that is no end id: the model's own; the tokenizer's; a special token that is named so
    (Pythia and Llama 3 have one, unused); the unknown token (byte-level and byte-fallback
    tokenizers never make it); a special token that the chat template does not write; the begin
    token (it is never last); any special token. None where there is no other: transformers then
    refuses padded batches, and reads single rows rightly.
    """
    ends = set(huggingface.end_ids(model, tokenizer))
    config = model.config.get_text_config()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(i): str(token.content) for i, token in added.items() if token.special}
    template = str(getattr(tokenizer, "chat_template", None))
    begin = getattr(tokenizer, "bos_token_id", None)
    wanted = [
        config.pad_token_id,
        getattr(tokenizer, "pad_token_id", None),
        *(i for i, text in special.items() if "pad" in text.lower()),
        getattr(tokenizer, "unk_token_id", None),
        *(i for i, text in special.items() if text not in template and i != begin),
        begin,
        *special,
    ]
    able = (i for i in wanted if i is not None and i not in ends and 0 <= i < config.vocab_size)
    return next(able, None)
