"""Small language models whose tokens are words, trained from nothing by the row `sft`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from preftune import huggingface, training

BATCH, RATE = 32, 3e-3
PLAIN: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "compile": False, "packing": False, "share_prefix": False,
}  # fmt: skip
"""Of a model so small that padded rows on one core are the quickest."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a Llama."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64

    def settings(self) -> dict[str, Any]:
        """As transformers names them."""
        return {
            "hidden_size": self.width, "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "max_position_embeddings": self.context, "tie_word_embeddings": True,
        }  # fmt: skip


def new(folder: Path, words: Sequence[str], shape: Shape, seed: int) -> None:
    """Write a model with random weights and a tokenizer of these words."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(s, special=True) for s in special])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        huggingface.new_model(folder, core, roles, shape.settings())


def trained(place: Path, start: str | Path, rows: Rows, seed: int) -> str:
    """Imitate demonstrations once, unless that was done before.

    Returns:
        the model's folder.
    """
    if not (place / "model" / "config.json").is_file():
        training.train(
            {
                "method": "sft", "model": str(start), "output": str(place), "resume": True,
                "learning_rate": RATE, "batch_size": BATCH, "eval_fraction": 0.0, "seed": seed,
                "log_every": 50, **PLAIN,
            },
            data=[dict(row) for row in rows],
        )  # fmt: skip
    return str(place / "model")


def chain(
    folder: Path, words: Sequence[str], stages: Mapping[str, Rows], *, shape: Shape, seed: int = 0
) -> dict[str, str]:
    """Models by name, each going on from the one before; made once, whoever asks.

    Args:
        stages: what each is shown, once through.

    Returns:
        their folders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    with FileLock(folder / ".lock"):
        start: str | Path = folder / "start"
        if not (folder / next(iter(stages)) / "model" / "config.json").is_file():
            new(folder / "start", words, shape, seed)
        for name, rows in stages.items():
            found[name] = start = trained(folder / name, start, rows, seed)
    return found
