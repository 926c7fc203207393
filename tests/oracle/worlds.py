"""Worlds for the oracle tests: models, tokenizers, rows, and log-probs by plain forwards.

Two architectures (Llama with grouped-query attention and rotary positions, GPT-2 with absolute
positions and a dropout of 0.1 in its configuration) meet two byte-level tokenizers: one without BOS
and pad token, one that adds BOS, has a chat template and uses the end token as its pad token.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

TOLERANCE = 1e-8
"""Largest allowed difference in any element of any parameter's gradient."""
VISIBLE = 1e-6
"""A wrong oracle must differ by more than this in some element."""
BETA = 0.1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": "name a quiet place",
        "chosen": " the old bridge near the sea",
        "rejected": " the sea",
    },
    {"prompt": "say hello", "chosen": " hello", "rejected": " the tall captain sleeps near a fox"},
    {
        "prompt": "why do small birds sing over the old sea",
        "chosen": " a red fox runs over the bridge",
        "rejected": " the captain and the small red birds sing a quiet name",
    },
    {"prompt": "why", "chosen": " small birds sing and", "rejected": " the fox sleeps"},
]
CUT_PAIRS = [
    PAIRS[0] | {"chosen_finished": False, "rejected_finished": True},
    PAIRS[1] | {"chosen_finished": True, "rejected_finished": False},
    PAIRS[2] | {"chosen_finished": False, "rejected_finished": False},
    PAIRS[3] | {"chosen_finished": True, "rejected_finished": True},
]
SFT_ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
PROMPTS = [row["prompt"] for row in PAIRS[:3]]
REWARDS = {2: [[0.2, 0.9], [1.5, -0.5], [-2.0, -1.0]]} | {
    3: [[0.2, 0.9, 0.5], [1.5, -0.5, 1.0], [-2.0, -1.0, -3.0]]
}
TIED = [[0.2, 0.9, 0.5], [1.5, 1.5, 1.5], [-2.0, -1.0, -3.0]]

Ids = list[int]
Response = tuple[Ids, Ids]
"""Token ids of a prompt and of one response to it."""
Pair = tuple[Response, Response]
"""Chosen and rejected response."""


# --- models, tokenizers, data -------------------------------------------------------------------


def train_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE that knows each word of the rows, with its leading space, as one token."""
    texts = [text for row in PAIRS for text in (row["prompt"] + row["chosen"] + row["rejected"],)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer


def build_tokenizer(with_bos: bool) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The raw tokenizer (for the expected ids) and what is saved beside the model."""
    if not with_bos:
        raw = train_tokenizer(["<|end|>"])
        return raw, PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    raw = train_tokenizer(["<s>", "<|end|>", "<|user|>", "<|assistant|>"])
    with_post_processor = Tokenizer.from_str(raw.to_str())
    with_post_processor.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=with_post_processor,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
    return raw, saved


def build_model(architecture: str, raw: Tokenizer, tied: bool, seed: int) -> torch.nn.Module:
    """Two random layers; biases and norms are moved from their defaults too."""
    torch.manual_seed(seed)
    special = {
        "bos_token_id": raw.token_to_id("<s>"),
        "eos_token_id": raw.token_to_id("<|end|>"),
        "tie_word_embeddings": tied,
    }
    if architecture == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=raw.get_vocab_size(),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.2,
                **special,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=raw.get_vocab_size(),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                initializer_range=0.2,
                **special,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class World:
    """One architecture with one tokenizer; folders of a policy, another one, and one near it."""

    architecture: str
    raw: Tokenizer
    policy: Path
    other: Path
    near: Path
    with_bos: bool

    def ids(self, text: str) -> Ids:
        return self.raw.encode(text, add_special_tokens=False).ids

    def token(self, text: str) -> int:
        return self.raw.token_to_id(text)

    @property
    def end(self) -> int:
        return self.token("<|end|>")

    def prompt_ids(self, prompt: str, template: str = "none") -> Ids:
        bos = [self.token("<s>")] if self.with_bos else []
        if template == "none":
            return bos + self.ids(prompt)
        return [*bos, self.token("<|user|>"), *self.ids(prompt), self.token("<|assistant|>")]

    def response(
        self, prompt: str, response: str, finished: bool = True, template: str = "none"
    ) -> Response:
        end = [self.end] if finished else []
        return self.prompt_ids(prompt, template), self.ids(response) + end

    def completions(self, rows: Sequence[Mapping], template: str = "none") -> list[Response]:
        return [self.response(row["prompt"], row["completion"], template=template) for row in rows]

    def pairs(self, rows: Sequence[Mapping], template: str = "none") -> list[Pair]:
        def role(row: Mapping, name: str) -> Response:
            return self.response(
                row["prompt"], row[name], row.get(f"{name}_finished", True), template
            )

        return [(role(row, "chosen"), role(row, "rejected")) for row in rows]

    def samples(
        self,
        rewards: Sequence[Sequence[float]],
        template: str = "none",
        prompts: Sequence[str] = PROMPTS,
    ) -> list[dict[str, Any]]:
        """Random responses of unequal length, the prompts interleaved; the very last is cut.

        The ids need not be what the tokenizer would make of their text, so a round trip through
        text would show.
        """
        generator = torch.Generator().manual_seed(11)
        special = 4 if self.with_bos else 1
        samples: list[dict[str, Any]] = []
        for k in range(len(rewards[0])):
            for n, prompt in enumerate(prompts):
                length = int(torch.randint(1, 7, (), generator=generator))
                tokens = torch.randint(
                    special, self.raw.get_vocab_size(), (length,), generator=generator
                ).tolist()
                samples.append(
                    {
                        "prompt_ids": self.prompt_ids(prompt, template),
                        "response_ids": [*tokens, self.end],
                        "reward": rewards[n][k],
                    }
                )
        samples[-1]["response_ids"].pop()
        return samples


WORLDS = {
    "llama": ("llama", False, False),
    "llama-tied-bos": ("llama", True, True),
    "gpt2": ("gpt2", True, False),
    "gpt2-bos": ("gpt2", True, True),
}


def build_world(folder: Path, number: int, architecture: str, tied: bool, with_bos: bool) -> World:
    raw, saved = build_tokenizer(with_bos)
    roles = {
        "policy": build_model(architecture, raw, tied, 2 * number),
        "other": build_model(architecture, raw, tied, 2 * number + 1),
    }
    roles["near"] = copy.deepcopy(roles["policy"])
    with torch.no_grad():
        for parameter in roles["near"].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for role, model in roles.items():
        model.save_pretrained(folder / role)
        saved.save_pretrained(folder / role)
    return World(architecture, raw, *(folder / role for role in roles), with_bos)


@cache
def load(folder: Path) -> torch.nn.Module:
    """The float32 values of the folder in float64, dropout off; shared, so never changed."""
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


def most_likely(
    model: torch.nn.Module, prompt: Ids, end: int, limit: int, certain: bool = False
) -> Ids:
    """The greedy continuation, which ends with the end token or at `limit` tokens.

    Args:
        certain: each of its tokens must be all but certain.
    """
    tokens: Ids = []
    with torch.no_grad():
        while len(tokens) < limit and (not tokens or tokens[-1] != end):
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            log_probs = logits.log_softmax(dim=-1)
            assert not certain or log_probs.max() > -1e-9
            tokens.append(int(log_probs.argmax()))
    return tokens


def write_rows(path: Path, rows: Iterable[Mapping]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def exact_norm(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    """Llama's norm in the dtype of its input; transformers' own computes in float32 always.

    In its place on both sides, nothing is left but the loss: a difference is never rounding.
    """
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


# --- the oracle's log-probs ---------------------------------------------------------------------


@dataclass
class Forward:
    """Policy, reference and, for the tests that must fail, one deliberate flaw."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    end: int
    flaw: str | None = None
    beta: float = BETA
    settings: dict[str, float] = field(default_factory=dict)

    def predictions(self, model: torch.nn.Module, response: Response) -> tuple[Tensor, Tensor]:
        """Log-probs of the vocabulary [T, V] by the position before each token, and the tokens."""
        prompt, tokens = response
        if self.flaw == "end_left_out" and tokens[-1] == self.end:
            tokens = tokens[:-1]
        ids = torch.tensor(prompt + tokens)
        all_log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        first = len(prompt)
        if self.flaw == "prompt_counted":
            first = 1
        if self.flaw == "first_token_left_out":
            first = len(prompt) + 1
        if self.flaw == "unshifted":
            return all_log_probs[first:], ids[first:]
        return all_log_probs[first - 1 : -1], ids[first:]

    def of_tokens(self, model: torch.nn.Module, response: Response) -> Tensor:
        """log pi(y_t | x, y_<t) of each response token."""
        log_probs, tokens = self.predictions(model, response)
        return log_probs.gather(1, tokens[:, None])[:, 0]

    def log_prob(self, model: torch.nn.Module, response: Response) -> Tensor:
        """log pi(y | x): sum over the response's tokens."""
        of_tokens = self.of_tokens(model, response)
        return of_tokens.mean() if self.flaw == "mean_over_tokens" else of_tokens.sum()

    def log_ratio(self, response: Response) -> Tensor:
        with torch.no_grad():
            of_reference = self.log_prob(self.reference, response)
        return self.log_prob(self.policy, response) - of_reference


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def ids_of(sample: Mapping) -> Response:
    return sample["prompt_ids"], sample["response_ids"]


def grouped(samples: Sequence[Mapping]) -> list[list[Mapping]]:
    """Samples of equal prompts together, prompts in the order of their first appearance."""
    groups: dict[tuple[int, ...], list[Mapping]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample["prompt_ids"]), []).append(sample)
    return list(groups.values())


def gradient(policy: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*policy.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float64, name
        assert actual[name].shape == value.shape, name
        assert torch.isfinite(actual[name]).all(), name
    differences = {
        name: float((actual[name] - value).abs().max()) for name, value in expected.items()
    }
    worst = max(differences, key=differences.__getitem__)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3, f"the expected gradient is all but zero: {largest:.3g}"
    assert differences[worst] <= TOLERANCE, (
        f"{worst} differs by {differences[worst]:.3g}; largest expected element {largest:.3g}"
    )
