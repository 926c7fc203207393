"""What `study_gpu.py` is made of: its settings, a language of known lengths, and how a run is
logged and a model kept.

All of it follows from the study's settings and a seed, so what is not at hand is made anew. On a
GPU sums may be taken in another order: then it is equal up to rounding, and its fingerprint tells.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import gpu  # noqa: F401  # first: it finds the library
import torch
from torch import Tensor

from preftune import durable, loop
from preftune.method import Method
from preftune.numerics import stream_key, uniform
from preftune.rounds import World
from preftune.samples import DATA, Samples, pad_stack

BEGIN, END, FIRST = 0, 1, 2
"""Of the generated language: what a prompt begins with, the end token, the first word."""
TOPICS, FOLLOWERS, FOLLOW = 16, 4, 0.8
"""A word is followed by one of so many, with this probability; else by any word of the topic."""
PROBLEMS = ("min", "mode", "skew")


class OutOfTime(Exception):
    """The limit is reached in the middle of something, which is not kept."""


Stop = Callable[[], bool]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all pieces of a study share."""

    model: str = ""
    """A folder with a causal language model; empty: one is trained on the generated language."""
    prompts: str = ""
    """JSONL with `prompt` or `instruction`, for a model from a folder."""
    shape: str = "4x576"
    """Layers x width of the model that is trained, heads of 64: 16.5 million weights."""
    vocabulary: int = 1024
    median: float = 16.0
    """Words of an answer of the generated language; the logarithm is normal."""
    spread: float = 0.5
    """Deviation of that logarithm."""
    max_new_tokens: int = 48
    sft_steps: int = 1500
    sft_batch: int = 128
    sft_rate: float = 1e-3
    texts: int = 32768
    """Of the generated language, gone through several times."""
    pairs: int = 2000
    """Prompts that are trained on, with two answers of the reference each; ties are left out."""
    held_out: int = 128
    samples: int = 2
    """To each held-out prompt at a checkpoint."""
    skew: float = 0.5
    """Skew Length: answers are cut to exponential lengths of this share of the reference's mean."""
    reward: str = "learned"
    """learned: fresh samples are judged by a model of the run's own pairs; true: by the length."""
    reward_steps: int = 150
    reward_rate: float = 1e-4
    steps: int = 200
    batch: int = 64
    checkpoints: int = 8
    schedule: str = "constant"
    """Constant: every checkpoint is then that of a shorter run."""
    dtype: str = "float32"
    """bfloat16: autocast over float32 weights."""
    pass_tokens: int = 2048
    """In one forward and backward pass."""
    layout: str = "packed"
    """packed: as the library does by itself. padded: a row a response; for rows this short it costs
    little, and nothing is compiled, which on a GPU packed rows of each new length are."""

    def __post_init__(self) -> None:
        known = {"reward": ("learned", "true"), "dtype": ("float32", "bfloat16"),
                 "schedule": ("constant", "linear", "cosine"),
                 "layout": ("packed", "padded")}  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: '{getattr(self, name)}' is none of {', '.join(values)}")

    @property
    def autocast(self) -> torch.dtype | None:
        """As policies are given it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    @property
    def layouts(self) -> dict[str, bool]:
        """As policies and reward models are given them."""
        return {"packing": False, "share_prefix": False} if self.layout == "padded" else {}

    @property
    def eval_every(self) -> int:
        """Updates between checkpoints."""
        return max(1, self.steps // self.checkpoints)


TINY: dict[str, Any] = {
    "shape": "2x64", "vocabulary": 96, "median": 5.0, "max_new_tokens": 12, "sft_steps": 40,
    "sft_batch": 32, "sft_rate": 3e-3, "texts": 512, "pairs": 48, "held_out": 64, "samples": 1,
    "reward_steps": 12, "reward_rate": 1e-3, "steps": 4, "batch": 8, "checkpoints": 2,
}  # fmt: skip
"""Settings that try the script out."""


def opened(folder: Path, given: Mapping[str, Any], device: torch.device, tiny: bool) -> Study:
    """The study of a folder: as it was begun, or begun now.

    Raises:
        ValueError: a setting differs from those that its pieces were made with.
    """
    path = folder / "study.json"
    pieces = sorted((folder / "pieces").glob("*.json"))
    if path.is_file() or pieces:  # pieces alone may have been carried here
        known = json.loads(path.read_text()) if path.is_file() else None
        known = known or json.loads(pieces[0].read_text())["study"]
        other = {k: v for k, v in given.items() if known[k] != v}
        if other:
            said = ", ".join(f"{k} {v} (here {known[k]})" for k, v in other.items())
            raise ValueError(f"{folder} was begun with other settings: {said}")
        study = Study(**known)
    else:
        fast = {"dtype": "bfloat16", "pass_tokens": 32768, "layout": "padded"}
        study = Study(
            **{**(fast if device.type == "cuda" else {}), **(TINY if tiny else {}), **given}
        )
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(asdict(study), indent=1) + "\n")
    return study


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids of prompts with K responses each."""

    prompt: Tensor  # [n, P], padded on the left
    prompt_mask: Tensor
    tokens: Tensor  # [n, K, T], padded on the right
    mask: Tensor
    finished: Tensor  # [n, K]

    def __len__(self) -> int:
        return len(self.prompt)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts and their mask."""
        return self.prompt[index], self.prompt_mask[index]

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        """The rows' responses."""
        k = slice(None) if responses is None else responses
        prompt, prompt_mask = self.prompts_only(index)
        finished = self.finished[index][:, k]
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=self.tokens[index][:, k],
            mask=self.mask[index][:, k], finished=finished,
            origin=torch.full(finished.shape, DATA), row=index,
        )  # fmt: skip

    def everything(self) -> Samples:
        """All rows."""
        return self.samples(torch.arange(len(self)))

    def at(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        return Rows(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def ordered(self, order: Tensor) -> "Rows":
        """The responses of each row in the order [n, K]."""
        wide = order.unsqueeze(-1).expand_as(self.tokens)
        return replace(
            self, tokens=self.tokens.gather(1, wide), mask=self.mask.gather(1, wide),
            finished=self.finished.gather(1, order),
        )  # fmt: skip

    def lengths(self) -> Tensor:
        """Tokens of each response, the end token not counted, [n, K]."""
        return self.mask.sum(-1) - self.finished.long()


# --- the generated language -----------------------------------------------------------------------


def length_law(study: Study) -> Tensor:
    """Probability of an answer of 1, 2, ... words [max_new_tokens - 1]: log-normal, rounded, none
    so long that its end token would be cut."""
    edges = torch.arange(study.max_new_tokens).double() + 0.5
    z = (edges.log() - math.log(study.median)) / study.spread
    mass = (0.5 * (1 + torch.erf(z / math.sqrt(2)))).diff()
    return mass / mass.sum()


def prompts_of(study: Study, seed: int, stream: str, count: int) -> tuple[Tensor, Tensor]:
    """Prompts [count, P]: the beginning, a topic's word and one to six words of the topic."""
    u = uniform(stream_key(seed, "prompts", stream), torch.arange(count)[:, None], torch.arange(8))
    topic, size = (u[:, 0] * TOPICS).long(), (study.vocabulary - FIRST) // TOPICS
    words = FIRST + topic[:, None] * size + torch.cat([torch.zeros(count, 1), u[:, 2:] * size], 1)
    length = 2 + (u[:, 1] * 6).long()  # topic and words
    rows = [
        torch.cat([torch.tensor([BEGIN]), w[:n]])
        for w, n in zip(words.long(), length.tolist(), strict=True)
    ]
    return pad_stack(rows, left=True)


def distinct_prompts(study: Study, seed: int, stream: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of such prompts that are no repetition: short ones come again and again.

    Raises:
        ValueError: the language has fewer.
    """
    size = (study.vocabulary - FIRST) // TOPICS
    there = TOPICS * sum(size**words for words in range(1, 7))
    if there < count:
        raise ValueError(
            f"a language of {study.vocabulary} words has {there} prompts, not the {count} that are "
            "trained on and held out. Raise --vocabulary, or lower --pairs."
        )
    drawn, first = count, list[int]()
    while len(first) < count:
        prompt, mask = prompts_of(study, seed, stream, drawn)
        seen: dict[tuple[int, ...], int] = {}
        for i, row in enumerate(prompt.masked_fill(~mask, -1).tolist()):
            seen.setdefault(tuple(row), i)
        first, drawn = list(seen.values())[:count], 2 * drawn
    return prompt[first], mask[first]


def texts_of(study: Study, seed: int) -> Rows:
    """Prompts with one answer each: lengths by `length_law`, words by a chain of pairs of words
    that is the seed's own."""
    count, longest = study.texts, study.max_new_tokens
    prompt, prompt_mask = prompts_of(study, seed, "texts", count)
    size = (study.vocabulary - FIRST) // TOPICS
    topic = (prompt[:, -1] - FIRST) // size
    key, row = stream_key(seed, "texts"), torch.arange(count)
    table = uniform(
        stream_key(seed, "followers"), torch.arange(study.vocabulary)[:, None],
        torch.arange(FOLLOWERS),
    )  # fmt: skip
    follow = FIRST + (table * TOPICS * size).long()
    law = length_law(study).cumsum(0)
    words = 1 + torch.searchsorted(law, uniform(key, row, 0) * law[-1], right=True)
    words = words.clamp(max=len(law))
    tokens, last = torch.full((count, longest), END), prompt[:, -1]
    for t in range(longest):
        u = uniform(key, row[:, None], t + 1, torch.arange(2))
        next_ = follow[last, (u[:, 1] * FOLLOWERS).long()]
        last = torch.where(u[:, 0] < FOLLOW, next_, FIRST + topic * size + (u[:, 1] * size).long())
        tokens[:, t] = torch.where(t < words, last, END)
    mask = torch.arange(longest) <= words[:, None]
    return Rows(
        prompt=prompt, prompt_mask=prompt_mask, tokens=tokens.unsqueeze(1),
        mask=mask.unsqueeze(1), finished=torch.ones(count, 1, dtype=torch.bool),
    )  # fmt: skip


FIGURES = {
    "gold": "mean true reward of answers to held-out prompts",
    "gold_error": "its standard error over these prompts",
    "proxy": "mean of the reward that fresh samples are judged by",
    "win_rate": "share with a higher true reward than the reference's answer (ties half)",
    "kl": "KL to the reference, nats a response, exact at each step of the samples",
    "length": "mean tokens, the end token not counted",
    "no_end": "share of answers that were cut",
    "log_ratio_chosen": "mean log(policy / reference) of held-out chosen responses, nats",
    "log_ratio_rejected": "the same of rejected responses",
    "accuracy": "share of held-out pairs whose chosen response has the larger log-ratio",
}


# --- training -------------------------------------------------------------------------------------


@dataclass
class Log:
    """What a run says of itself: its updates' times summed, and its checkpoints."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """As the loop calls its hook; step 0 is an evaluation alone."""
        for phase in ("prefill", "decode", "score", "reward", "train", "idle"):
            spent = metrics.get(f"seconds_{phase}", 0.0)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        for phase in ("decode", "train"):
            spent = metrics.get(f"seconds_{phase}", 0.0)
            spent += metrics.get("seconds_prefill", 0.0) * (phase == "decode")
            amount = metrics.get(f"tokens_per_second_{phase}", 0.0) * spent
            self.tokens[phase] = self.tokens.get(phase, 0.0) + amount
        if "gold" in metrics:
            names = (*FIGURES, "loss", "reward_queries", "staleness")
            self.curve.append({"step": step} | {k: metrics[k] for k in names if k in metrics})
        self.last = dict(metrics)

    def rates(self) -> dict[str, float]:
        """Tokens a second of sampling and of training."""
        taken = {
            "decode": self.seconds.get("decode", 0.0) + self.seconds.get("prefill", 0.0),
            "train": self.seconds.get("train", 0.0),
        }
        return {k: self.tokens[k] / s for k, s in taken.items() if s and self.tokens.get(k)}


def run_loop(
    method: Method, world: World, settings: loop.Settings, stop: Stop,
    evaluate: Callable[[int], dict[str, float]] | None = None, log: Log | None = None,
) -> Log:  # fmt: skip
    """A whole run.

    Raises:
        OutOfTime: `stop` said so before the last step.
    """
    log = Log() if log is None else log
    run = loop.start(method, world, settings)
    loop.advance(run, settings, loop.Hooks(log=log, evaluate=evaluate, stop=stop))
    if not loop.at_end(run, settings):
        raise OutOfTime
    return log


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Kernels that sum in a fixed order, where there are such."""
    if device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def new_model(study: Study, seed: int) -> Any:
    """Random weights, the same on every device."""
    import transformers

    layers, width = (int(n) for n in study.shape.split("x"))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        intermediate_size=width * 8 // 3 // 64 * 64, vocab_size=study.vocabulary,
        max_position_embeddings=max(256, 2 * study.max_new_tokens), tie_word_embeddings=True,
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def keep(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write weights in bfloat16, in files small enough to be carried, with what is known."""

    from transformers.utils import logging

    logging.disable_progress_bar()

    def fill(work: Path) -> None:
        narrow = copy.deepcopy(model).to("cpu", torch.bfloat16)
        narrow.save_pretrained(work, max_shard_size="15MB")
        (work / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")

    durable.write_folder(folder, fill)


def kept(folder: Path) -> bool:
    """Whether a folder is there, and whole."""
    try:
        durable.verify(folder)
    except durable.Damaged:
        return False
    return True


def facts_of(folder: Path) -> dict[str, Any]:
    """What was written beside a model."""
    return json.loads((folder / "facts.json").read_text())
