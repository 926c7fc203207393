"""What a GPU makes of it: numerics against float64, then speed and memory against what it can do.

    python benchmarks/gpu.py [--quick] [--model NAME] [--part NAME] [--device cpu] [--output DIR]

One file, nothing is downloaded: models have random weights in the shapes of Pythia-1.4B,
Qwen2.5-0.5B and SmolLM2-135M. It needs torch >= 2.11, transformers >= 5.17, NumPy, safetensors and
jaxtyping, and the library beside it (../src), which need not be installed. Progress and failures
go to stderr; stdout has one table, then one JSON line a target. About eight minutes on an H200;
`--quick` takes two. `--device cpu` runs every part on a model of a few thousand weights, to try
the script out. The exit status is 1 where a check or a part failed, after everything is printed.

Useful operations: 6 a weight and position for forward and backward, a prompt once for all of its
responses, the head on response tokens alone, 12 x layers x width of the heads for each pair of
positions attended; no reference, no recomputation. Ceilings are measured beside what they bound.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import json
import math
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("preftune") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from preftune import loop, methods, numerics  # noqa: E402
from preftune.policies.scoring import score_all  # noqa: E402
from preftune.policies.transformer import Transformer  # noqa: E402
from preftune.rounds import World  # noqa: E402
from preftune.samples import DATA, Samples, pad_stack  # noqa: E402
from preftune.sampling.decoding import Decoding  # noqa: E402

END = 1
"""The end token of models whose responses may end."""
MIB, GIB = 2**20, 2**30

# --- models and the work they are given -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a decoder: what operations and bytes are counted from."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    gated: bool = True
    """The inner layer is three products (Llama's kind), not two (GPT's)."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            gated=config.model_type != "gpt_neox",
        )

    @property
    def body(self) -> int:
        """Weights of the layers' products."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + (2 + self.gated) * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the output product."""
        return self.width * self.vocabulary

    @property
    def cached(self) -> int:
        """Bytes of keys and values a token, in bfloat16."""
        return 4 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Model:
    """A shape by name."""

    kind: str
    """Of transformers: its configuration and causal model."""
    settings: Mapping[str, Any]
    budget: int
    """Tokens of a forward and backward pass to begin with; halved where they do not fit."""

    def config(self) -> Any:
        """The configuration; no token ends a response, so that lengths are as asked."""
        import transformers

        ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
        return getattr(transformers, f"{self.kind}Config")(**self.settings, **ends)

    @property
    def shape(self) -> Shape:
        """What is counted."""
        return Shape.of(self.config())


def _sizes(hidden: int, layers: int, heads: int, inner: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner, "vocab_size": vocab,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
MODELS = {
    "pythia-1.4b": Model(
        "GPTNeoX", _sizes(2048, 24, 16, 8192, 50304) | {"rotary_pct": 0.25}, budget=16384
    ),
    "qwen2.5-0.5b": Model(
        "Qwen2", _sizes(896, 24, 14, 4864, 151936) | _TIED | {"num_key_value_heads": 2},
        budget=24576,
    ),
    "smollm2-135m": Model(
        "Llama",
        _sizes(576, 30, 9, 1536, 49152) | _TIED | {"num_key_value_heads": 3, "rope_theta": 1e5},
        budget=49152,
    ),
    "tiny": Model(
        "Llama", _sizes(64, 2, 4, 128, 512) | _TIED | {"num_key_value_heads": 2}, budget=512
    ),
}  # fmt: skip
TARGETS = {"gpu_dpo_1b4": 0.5, "gpu_dpo_0b5": 0.3, "gpu_on_policy": 0.3}
_MEASURED = {
    "gpu_dpo_1b4": ("dpo", "pythia-1.4b"),
    "gpu_dpo_0b5": ("dpo", "qwen2.5-0.5b"),
    "gpu_on_policy": ("on-policy", "pythia-1.4b"),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step's: prompts, each with a pair of the data, with fresh samples, or with both."""

    name: str
    method: str
    prompt: int
    pair: tuple[int, ...] = ()
    """Tokens of chosen and rejected."""
    new: int = 0
    """Tokens of a fresh sample."""
    prompts: int = 64
    samples: int = 2
    """To each prompt, where there are any."""

    def shrunk(self) -> "Work":
        """The same for a machine that only tries the script out."""
        small = {"prompt": self.prompt // 16, "new": self.new // 16, "prompts": 4}
        pair = tuple(x // 10 for x in self.pair)
        return replace(self, **small, pair=pair, name=f"{self.name}, shrunk")

    @property
    def rows(self) -> int:
        """Fresh samples in all."""
        return self.prompts * self.samples if self.new else 0


PAIRS = (
    Work(name="TL;DR-like 384+40/40", method="dpo", prompt=384, pair=(40, 40)),
    Work(name="UltraFeedback-like 128+300/300", method="dpo", prompt=128, pair=(300, 300)),
    Work(name="Alpaca-like 64+80/80", method="dpo", prompt=64, pair=(80, 80)),
)
FRESH = (
    Work(name="HyPO 384+40/40, 2x53", method="hypo", prompt=384, pair=(40, 40), new=53),
    Work(name="on-policy DPO 384, 2x53", method="on_policy_dpo", prompt=384, new=53),
    Work(name="on-policy DPO 128, 2x300", method="on_policy_dpo", prompt=128, new=300),
)
DRAWN = Work(name="128, 2x128", method="sample", prompt=128, new=128)

# --- what cannot be done without ------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured."""

    product: float
    """Operations a second of bfloat16 matrix products."""
    copy: float
    """Bytes a second, read and written."""


def useful(shape: Shape, prompt: int, responses: Sequence[int]) -> int:
    """Operations of a forward and backward pass over a prompt and its responses."""

    def below(n: int) -> int:
        return n * (n + 1) // 2

    answers = sum(responses)
    attended = below(prompt) + sum(prompt * r + below(r) for r in responses)
    products = 6 * (shape.body * (prompt + answers) + shape.head * answers)
    return products + 12 * shape.layers * shape.heads * shape.head_dim * attended


def step_operations(shape: Shape, work: Work) -> int:
    """Useful operations of a step's training: pairs of the data, and fresh samples."""
    groups = [work.pair, (work.new,) * work.samples if work.new else ()]
    return work.prompts * sum(useful(shape, work.prompt, g) for g in groups if g)


def floor(
    shape: Shape, work: Work, ceilings: Ceilings, *, everything: bool = False
) -> dict[str, float]:
    """Seconds that each part of an on-policy step takes at least.

    Prompts once; every decoding step reads all weights and each sample's own keys and values; the
    reference scores the samples; training on the pairs of the data, or else on the samples. What
    attention itself computes is left out.

    Args:
        everything: what a HyPO step needs besides is in it: the gradient on the fresh samples, and
            the reference's pass over their prompts.
    """
    weights, tokens = shape.body + shape.head, work.rows * work.new
    prefill = 2 * shape.body * work.prompt * work.prompts
    decode = 0.0
    for t in range(work.new):
        read = 2 * weights + work.rows * (work.prompt + t) * shape.cached
        decode += max(read / ceilings.copy, 2 * weights * work.rows / ceilings.product)
    score = 2 * weights * tokens + (prefill if everything else 0)
    trained = [work.pair] if work.pair else []
    if everything or not work.pair:
        trained.append((work.new,) * work.samples)
    train = sum(
        6 * (shape.body * (work.prompt + sum(r)) + shape.head * sum(r)) for r in trained
    ) * work.prompts  # fmt: skip
    return {
        "prefill": prefill / ceilings.product,
        "decode": decode,
        "score": score / ceilings.product,
        "train": max(train / ceilings.product, 28 * weights / ceilings.copy),
    }


def product_sizes(shape: Shape, large: int, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Sizes m, k, n of the products whose best rate is the ceiling: squares and the model's own."""
    return {
        "square": (large, large, large),
        "half": (large // 2, large // 2, large // 2),
        "up": (tokens, shape.width, shape.inner),
        "down": (tokens, shape.inner, shape.width),
        "queries": (tokens, shape.width, shape.heads * shape.head_dim),
        "head": (tokens // 4, shape.width, shape.vocabulary),
    }


# --- the bench ------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """A part's time is up; not an Exception, which libraries catch."""


@dataclass
class Row:
    """A line of the table."""

    part: str
    model: str
    case: str
    seconds: float | None = None
    tokens_per_second: float | None = None
    operations_per_second: float | None = None
    fraction: float | None = None
    """Of the ceiling, or of the floor's time."""
    peak: float | None = None
    """GiB."""
    note: str = ""


@dataclass
class Check:
    """A figure that must not pass its limit."""

    name: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        """Not a number fails."""
        return self.found <= self.limit


@dataclass
class Bench:
    """What is measured on, and all that was found."""

    device: torch.device
    quick: bool
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    """Parts that ran out of time; what they had found stays."""
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds of the whole that remain."""
        return (120.0 if self.quick else 480.0) - (time.monotonic() - self.began)

    @property
    def fast(self) -> bool:
        """An accelerator, and not a machine that tries the script out."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.fast:
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def forget_peak(self) -> None:
        """Memory is watched from here on."""
        if self.fast:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Most GiB held since; of a CPU, by the process in all its life."""
        if self.fast:
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def free(self) -> None:
        """Give back the memory that nothing holds any more."""
        gc.collect()
        if self.fast:
            torch.cuda.empty_cache()

    def failed(self, name: str, error: Exception) -> None:
        """Show what broke, and go on."""
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        self.failures.append(f"{name}: {type(error).__name__}: {first}")
        self.say(f"  FAILED: {self.failures[-1]}")

    def say(self, text: str) -> None:
        """For the reader."""
        print(text, file=sys.stderr, flush=True)

    def add(self, row: Row) -> None:
        """Keep a line, and show it now."""
        self.rows.append(row)
        self.say("  " + "  ".join(x for x in cells(row) if x))

    def check(self, name: str, found: float | Tensor, limit: float) -> None:
        """Keep a check, and show it now."""
        found = float(found.detach() if isinstance(found, Tensor) else found)
        self.checks.append(Check(name, found, limit))
        mark = "" if self.checks[-1].holds else "  FAILED"
        self.say(f"  {name}: {found:.2g} (limit {limit:g}){mark}")

    def run(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """A part, which may fail or run out of time without harm to the others."""
        began, most = time.perf_counter(), min(seconds, self.left)
        self.say(f"{name}:")
        try:
            if most < 1:
                raise OutOfTime
            with limited(most):
                work()
        except OutOfTime:
            self.stopped.append(f"{name} after {max(0.0, most):.0f} s")
            self.say(f"  stopped: {self.stopped[-1]}")
        except Exception as error:
            self.failed(name, error)
        self.free()
        if self.fast:
            torch._dynamo.reset()  # what is compiled for one model counts against the next one's
        self.say(f"  ({time.perf_counter() - began:.0f} s)")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside once that time has passed (in a main thread)."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make(model: Model, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights on the device."""
    import transformers

    torch.manual_seed(0)
    with device:
        made = transformers.AutoModelForCausalLM.from_config(model.config())
    made.generation_config.eos_token_id = None
    return made.to(device, dtype).eval()


@dataclass(frozen=True)
class RandomRows:
    """Data of random token ids, every row of the same lengths."""

    prompt: Tensor  # [n, P]
    tokens: Tensor  # [n, K, T]

    @classmethod
    def of(cls, work: Work, vocabulary: int) -> "RandomRows":
        """Rows for a step."""
        draw = torch.Generator().manual_seed(0)
        shapes = (work.prompts, work.prompt), (work.prompts, 2, max(work.pair, default=1))
        return cls(*(torch.randint(2, vocabulary, s, generator=draw) for s in shapes))

    def __len__(self) -> int:
        return len(self.prompt)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts and their mask."""
        prompt = self.prompt[index]
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        """The rows' responses."""
        prompt, prompt_mask = self.prompts_only(index)
        tokens = self.tokens[index][:, slice(None) if responses is None else responses]
        done = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool), finished=done,
            origin=torch.full(done.shape, DATA), row=index,
        )  # fmt: skip


def stream(t: int, shape: tuple[int, ...]) -> Tensor:
    """Random numbers of responses' tokens at place t."""
    return numerics.uniform(7, t, torch.arange(math.prod(shape)).view(shape))


# --- part: numerics -------------------------------------------------------------------------------

_SMALL = _sizes(64, 3, 4, 128, 384) | {"initializer_range": 0.1}
_KINDS = {
    "llama": Model("Llama", _SMALL | {"num_key_value_heads": 2}, budget=4096),
    "gpt_neox": Model("GPTNeoX", _SMALL | {"rotary_pct": 0.25}, budget=4096),
}


@dataclass(frozen=True)
class Answer:
    """Log-probs of all response tokens, in the order of the mask, and the gradient of a sum."""

    logp: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, model: Any, logp: Tensor) -> "Answer":
        """The gradient is that of the log-probs' sum with alternating signs, which hides nothing:
        neighbours differ."""
        model.zero_grad()
        sign = 1 - 2 * (torch.arange(len(logp)) % 2)
        (logp * sign.to(logp)).sum().backward()
        found = [p.grad.detach().double().cpu().flatten() for p in model.parameters()]
        return cls(logp.detach().double().cpu(), torch.cat(found))

    def far(self, other: "Answer") -> tuple[float, float]:
        """Largest difference of a log-prob, nats, and 1 - cosine of the gradients."""
        cosine = torch.nn.functional.cosine_similarity(self.gradient, other.gradient, 0)
        return float((self.logp - other.logp).abs().max()), float(1 - cosine)


def uneven_samples(vocabulary: int, small: bool) -> Samples:
    """Prompts and responses of all lengths; on a GPU many blocks of attention."""
    draw = torch.Generator().manual_seed(3)
    most, longest = (24, 12) if small else (240, 150)
    prompts, responses = [], []
    for i in range(6):
        p = 1 + (most * i) // 5
        prompts.append(torch.randint(2, vocabulary, (p,), generator=draw))
        for j in range(2):
            r = 1 + (longest * ((i * 3 + j * 2) % 7)) // 6
            responses.append(torch.randint(2, vocabulary, (r,), generator=draw))
    prompt, prompt_mask = pad_stack(prompts, left=True)
    tokens, mask = (x.view(6, 2, -1) for x in pad_stack(responses))
    flags = torch.ones(6, 2, dtype=torch.bool)
    return Samples(
        prompt=prompt, prompt_mask=prompt_mask, tokens=tokens, mask=mask, finished=flags,
        origin=torch.full((6, 2), DATA), row=torch.arange(6),
    )  # fmt: skip


def row_by_row(model: Any, samples: Samples) -> Tensor:
    """Log-probs by plain forward passes: one row, no padding, nothing shared."""
    found = []
    for i in range(len(samples.prompt)):
        prompt = samples.prompt[i][samples.prompt_mask[i]]
        for tokens, mask in zip(samples.tokens[i], samples.mask[i], strict=True):
            response = tokens[mask]
            logits = model(torch.cat([prompt, response])[None], use_cache=False).logits[0]
            table = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found.append(table.gather(-1, response[:, None]).squeeze(-1))
    return torch.cat(found)


def check_scores(bench: Bench, name: str, *, compiled: bool = False) -> None:
    """Log-probs and gradients by each precision and layout, against float64 row by row."""
    base = make(_KINDS[name], torch.device("cpu"), torch.float64)
    samples = uneven_samples(384, not bench.fast)
    truth = Answer.of(base, row_by_row(base, samples))
    layouts: dict[str, dict[str, Any]] = {"packed and shared": {}}
    if not compiled:
        layouts["padded and apart"] = {"packing": False, "share_prefix": False}
    # cosines: bfloat16 has 8 bits, over three layers forward and back
    for precision, autocast, near, turned in (
        ("float32", None, 1e-4, 1e-7), ("bfloat16", torch.bfloat16, 0.1, 2e-3),
    ):  # fmt: skip
        answers = []
        for layout, options in layouts.items():
            model = copy.deepcopy(base).to(bench.device, torch.float32)
            policy = Transformer(model, end_ids=[END], autocast=autocast, **options)
            if compiled:
                switch_compiler_on(policy)
            label = f"{name}, {precision}, {layout}{', compiled' if compiled else ''}"
            wanted = not options
            on = policy.packing == wanted and policy.share_prefix == wanted
            bench.check(f"{label}: the layout is not used", float(not on), 0)
            out = policy.outputs(samples, frozenset({"logp"}))["logp"]
            answers.append(Answer.of(model, out[samples.mask]))
            off, angle = answers[-1].far(truth)
            bench.check(f"{label}: log-probs, nats", off, near)
            bench.check(f"{label}: 1 - cosine of gradients", angle, turned)
        if len(answers) == 2:
            off, angle = answers[0].far(answers[1])
            bench.check(f"{name}, {precision}: packed against padded, nats", off, near)


def check_head(bench: Bench) -> None:
    """The head by chunks against all logits at once in float64."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(200, 64), 0.1 * torch.randn(1000, 64)
    target = torch.randint(1000, (200,))
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    full = (h @ w.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    (full * full.detach().exp()).sum().backward()
    before, numerics.CHUNK_ELEMENTS = numerics.CHUNK_ELEMENTS, {bench.device.type: 30_000}
    try:
        for product, near, turned in ((None, 1e-4, 1e-6), (torch.bfloat16, 0.05, 1e-3)):
            found = [x.to(bench.device).requires_grad_() for x in (hidden, weight)]
            logp = numerics.token_log_probs(
                found[0], found[1], target.to(bench.device), None, product
            )
            (logp * full.detach().exp().to(logp)).sum().backward()
            name = f"head by chunks, {product or 'float32'}"
            bench.check(f"{name}: log-probs, nats", (logp.cpu() - full).abs().max(), near)
            for part, mine, theirs in zip(("hidden", "weights"), found, (h, w), strict=True):
                assert mine.grad is not None and theirs.grad is not None, "backward was called"
                flat = mine.grad.double().cpu().flatten()
                cosine = torch.nn.functional.cosine_similarity(flat, theirs.grad.flatten(), 0)
                bench.check(f"{name}: 1 - cosine, {part}", 1 - cosine, turned)
    finally:
        numerics.CHUNK_ELEMENTS = before


def check_greedy(bench: Bench, name: str) -> None:
    """The sampler at temperature 0 against transformers' `generate`."""
    model = make(_KINDS[name], bench.device)
    plain = copy.deepcopy(model)
    decoding = Decoding(max_new_tokens=24, temperature=0.0)
    policy = Transformer(model, end_ids=[END], decoding=decoding)
    s = uneven_samples(384, True)
    drawn = policy.sample(s.prompt, s.prompt_mask, 2, stream, 0)
    with torch.no_grad():
        out = plain.generate(
            s.prompt.to(bench.device), attention_mask=s.prompt_mask.to(bench.device),
            do_sample=False, max_new_tokens=24, eos_token_id=END, pad_token_id=0,
        )  # fmt: skip
    theirs = out[:, s.prompt.shape[1] :].cpu()
    differ = 0
    for i, k in ((i, k) for i in range(6) for k in range(2)):
        mine = drawn.tokens[i, k][drawn.mask[i, k]]
        differ += not torch.equal(mine, theirs[i, : len(mine)])
    bench.check(f"{name}, greedy: responses that differ from generate's", differ, 0)
    again = policy.score(s.prompt, s.prompt_mask, drawn.tokens, drawn.mask)
    assert drawn.logp is not None, "the sampler tells log-probs"
    bench.check(
        f"{name}, greedy: sampler's log-probs, nats", (drawn.logp - again).abs().max(), 1e-3
    )


def check_draws(bench: Bench) -> None:
    """First and second tokens of many draws against the model's own distribution, by chi-squared:
    its distance from its mean in standard deviations."""
    kind = replace(_KINDS["llama"], settings={**_KINDS["llama"].settings, "vocab_size": 48})
    model = make(kind, bench.device)
    exact = copy.deepcopy(model).double().cpu()
    policy = Transformer(model, end_ids=[], decoding=Decoding(max_new_tokens=2))
    prompt = torch.tensor([[5, 9, 31, 7]])
    with torch.no_grad():
        first = exact(prompt).logits[0, -1].softmax(-1)
        behind = torch.cat([prompt.expand(48, -1), torch.arange(48)[:, None]], 1)
        second = first @ exact(behind).logits[:, -1].softmax(-1)
    prompts = prompt.expand(128 if bench.fast else 32, -1)
    drawn = policy.sample(prompts, torch.ones_like(prompts).bool(), 64, stream, 0)
    for place, expected in enumerate((first, second)):
        seen = torch.bincount(drawn.tokens[..., place].flatten(), minlength=48)
        wanted = expected * seen.sum()
        rare = wanted < 5
        groups = [(seen[~rare], wanted[~rare])]
        if rare.any():
            groups.append((seen[rare].sum()[None], wanted[rare].sum()[None]))
        o, e = (torch.cat(x) for x in zip(*groups, strict=True))
        freedom = len(o) - 1
        chi = float(((o - e).square() / e).sum())
        z = (chi - freedom) / math.sqrt(2 * freedom)
        bench.check(f"draws: chi-squared of token {place + 1}, deviations", z, 5)


def numeric_part(bench: Bench) -> None:
    """All checks; one that cannot be made does not lose the others."""
    checks: dict[str, Callable[[], None]] = {"head": lambda: check_head(bench)}
    for name in _KINDS:
        checks[f"scores of {name}"] = lambda name=name: check_scores(bench, name)
        checks[f"greedy of {name}"] = lambda name=name: check_greedy(bench, name)
    checks["draws"] = lambda: check_draws(bench)
    if bench.fast and not bench.quick:
        checks["compiled scores"] = lambda: check_scores(bench, "llama", compiled=True)
    for name, work in checks.items():
        try:
            work()
        except Exception as error:
            bench.failed(f"numerics, {name}", error)


# --- part: ceilings -------------------------------------------------------------------------------


def rate(bench: Bench, work: Callable[[], Any], amount: float) -> float:
    """Amount a second: the median of five bursts."""
    seconds = 0.04 if bench.fast else 0.002
    work()
    once = min(bench.time(work) for _ in range(2))
    calls = max(1, min(1000, int(seconds / max(once, 1e-7))))

    def burst() -> None:
        for _ in range(calls):
            work()

    return calls * amount / median(bench.time(burst) for _ in range(5))


def product_rates(bench: Bench, shape: Shape) -> dict[str, float]:
    """Operations a second of bfloat16 products of the ceiling's sizes."""
    large, tokens = (8192, 16384) if bench.fast else (256, 256)
    found = {}
    for name, (m, k, n) in product_sizes(shape, large, tokens).items():
        a = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=bench.device, dtype=torch.bfloat16).T
        out = torch.empty(m, n, device=bench.device, dtype=torch.bfloat16)
        found[name] = rate(
            bench, lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * m * k * n
        )
    return found


def copy_rate(bench: Bench) -> float:
    """Bytes a second, read and written, of a large copy."""
    size = 2 * GIB if bench.fast else 16 * MIB
    source = torch.zeros(size // 4, device=bench.device)
    into = torch.empty_like(source)
    return rate(bench, lambda: into.copy_(source), 2.0 * size)


def measure_ceilings(bench: Bench, shape: Shape) -> Ceilings:
    """Now, beside what they bound."""
    return Ceilings(max(product_rates(bench, shape).values()), copy_rate(bench))


def ceiling_part(bench: Bench, models: Sequence[str]) -> None:
    """A line a product and one for the copy."""
    for name in models:
        rates = product_rates(bench, MODELS[name].shape)
        best = max(rates.values())
        for product, found in rates.items():
            bench.add(
                Row("ceiling", name, f"bfloat16 product, {product}",
                    operations_per_second=found, fraction=found / best)
            )  # fmt: skip
    found = copy_rate(bench)
    bench.add(Row("ceiling", "", "copy", note=f"{found / 1e12:.3f} TB/s read and written"))


# --- part: steps ----------------------------------------------------------------------------------


def switch_compiler_on(policy: Transformer) -> bool:
    """Compile the trunk, where it can be; whether it is."""
    switch = getattr(policy.trunk, "compile", None)
    if switch is None:
        return False
    if callable(switch):
        switch()
    else:
        policy.trunk.compile = True  # type: ignore[method-assign]
    torch._dynamo.config.recompile_limit = 64  # with and without gradients, of several types
    return True


def token_reward(samples: Samples) -> Tensor:
    """The length, and a trifle by the tokens, so that responses of one length do not tie."""
    ids = torch.where(samples.mask, samples.tokens, 0).sum(-1).double()
    return samples.lengths() + ids.remainder(997) / 997


def make_world(policy: Transformer, work: Work, budget: int) -> World:
    """What the step's rounds are made from; the reference's log-probs of the data are known."""
    rows = RandomRows.of(work, policy.model.config.vocab_size)
    table = score_all(policy, rows.samples(torch.arange(len(rows))), budget) if work.pair else None
    return World(
        policy=policy, reference=policy.frozen_copy() if work.new else None,
        data=rows, prompts=rows, reward=token_reward, seed=0, batch_size=work.prompts,
        micro_batch_tokens=budget,
        known=lambda source, s: None if source.draws or table is None else table[s.row],
    )  # fmt: skip


@dataclass
class Timed:
    """Updates of one kind."""

    seconds: list[float]
    metrics: list[dict[str, Any]]
    first_loss: float
    peak: float

    @property
    def typical(self) -> float:
        """Median seconds."""
        return median(self.seconds)

    def split(self) -> dict[str, float]:
        """Median seconds of each phase."""
        names = ("prefill", "decode", "score", "reward", "train", "idle")
        found = {n: [m[f"seconds_{n}"] for m in self.metrics if f"seconds_{n}" in m] for n in names}
        return {n: median(x) for n, x in found.items() if x}


def time_updates(bench: Bench, policy: Transformer, work: Work, budget: int) -> Timed:
    """A few updates from the beginning; the first ones, which also compile, are not counted."""
    row = methods.get(work.method)
    if work.new:  # each update collects its own round
        row = methods.configure(row, {"passes": 1})
    world = make_world(policy, work, budget)
    bench.forget_peak()
    settings = loop.Settings(
        max_steps=10**6, learning_rate=1e-6, lr_schedule="constant", warmup_ratio=0.0
    )
    run = loop.start(methods.resolve(row), world, settings)
    warm, counted = (1, 2) if bench.quick or not bench.fast else (2, 3 if work.new else 5)
    seconds, metrics = [], []
    for _ in range(warm + counted):
        found: dict[str, Any] = {}
        seconds.append(bench.time(lambda found=found: found.update(loop.update(run, settings))))
        metrics.append(found)
    run.optimizer.zero_grad()
    loss = metrics[0]["loss"]
    first = math.nan if loss is None else float(loss)
    return Timed(seconds[warm:], metrics[warm:], first, bench.peak())


def that_fits(bench: Bench, policy: Transformer, work: Work, budget: int) -> tuple[Timed, int]:
    """The same with a budget of tokens that fits into memory, and which."""
    while True:
        try:
            return time_updates(bench, policy, work, budget), budget
        except torch.OutOfMemoryError:
            if budget <= 1024:
                raise
        budget //= 2
        policy.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        bench.say(f"  out of memory; now {budget} tokens a pass")


def new_policy(bench: Bench, name: str, decoding: Decoding | None = None) -> Transformer:
    """Float32 weights, computed in bfloat16, as a run has them on a GPU."""
    policy = Transformer(
        make(MODELS[name], bench.device), end_ids=[], autocast=torch.bfloat16, decoding=decoding
    )
    padded = float(not (policy.packing and policy.share_prefix))
    bench.check(f"{name}: rows are not packed and shared", padded, 0)
    return policy


def piece_part(bench: Bench, name: str) -> None:
    """What a step does besides the blocks: rows and masks laid out, and the head."""
    shape, work = MODELS[name].shape, PAIRS[0] if bench.fast else PAIRS[0].shrunk()
    policy, rate_of = new_policy(bench, name), max(product_rates(bench, shape).values())
    s = RandomRows.of(work, shape.vocabulary).samples(torch.arange(work.prompts))
    policy.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask)
    bench.forget_peak()
    seconds = min(
        bench.time(lambda: policy.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask))
        for _ in range(3)
    )
    tokens = work.prompts * (work.prompt + sum(work.pair))
    bench.add(
        Row("piece", name, f"layout and mask of {tokens} tokens", seconds, tokens / seconds,
            peak=bench.peak())
    )  # fmt: skip
    count = int(s.mask.sum())
    head = policy.model.get_output_embeddings().weight
    hidden = torch.randn(count, shape.width, device=bench.device, requires_grad=True)
    target = s.tokens[s.mask].to(bench.device)

    def step() -> None:
        logp = numerics.token_log_probs(hidden, head, target, None, torch.bfloat16)
        logp.sum().backward()

    step()
    bench.forget_peak()
    seconds = median(bench.time(step) for _ in range(3))
    speed = 6 * shape.head * count / seconds
    bench.add(
        Row("piece", name, f"head on {count} tokens, both ways", seconds, count / seconds, speed,
            speed / rate_of, bench.peak())
    )  # fmt: skip


def modes(bench: Bench, policy: Transformer) -> Iterator[str]:
    """How steps are computed, one after another; the policy is made so."""
    yield "eager"
    if bench.fast and not bench.quick and switch_compiler_on(policy):
        yield "compiled"
    else:
        bench.say("  compiled: left out")


def dpo_part(bench: Bench, name: str) -> None:
    """Steps on pairs of three lengths, eager and compiled."""
    shape, budget, policy = MODELS[name].shape, MODELS[name].budget, new_policy(bench, name)
    works = [w if bench.fast else w.shrunk() for w in (PAIRS[:1] if bench.quick else PAIRS)]
    unmoved = True
    for mode in modes(bench, policy):
        for work in works:
            best = max(product_rates(bench, shape).values())
            timed, budget = that_fits(bench, policy, work, budget)
            if unmoved:  # policy and reference are one and the same
                off = abs(timed.first_loss - math.log(2))
                bench.check(f"{name}: first DPO loss less ln 2", off, 0.01)
            unmoved = False
            tokens = work.prompts * (work.prompt + sum(work.pair))
            speed = step_operations(shape, work) / timed.typical
            idle = 1e3 * timed.split().get("idle", 0.0)
            note = f"{budget} tokens a pass; {idle:.0f} ms outside forward, backward and step"
            bench.add(
                Row("dpo", name, f"{work.name}, {mode}", timed.typical, tokens / timed.typical,
                    speed, speed / best, timed.peak, note)
            )  # fmt: skip


def on_policy_part(bench: Bench, name: str) -> None:
    """Steps that draw samples, by phase, against their floor."""
    shape, budget, policy = MODELS[name].shape, MODELS[name].budget, new_policy(bench, name)
    works = [w if bench.fast else w.shrunk() for w in (FRESH[:1] if bench.quick else FRESH)]
    for mode in modes(bench, policy):
        for work in works:
            ceilings = measure_ceilings(bench, shape)
            policy.decoding = Decoding(max_new_tokens=work.new)
            timed, budget = that_fits(bench, policy, work, budget)
            taken, drawn = timed.typical, work.rows * work.new
            least, more = (floor(shape, work, ceilings, everything=x) for x in (False, True))
            done = step_operations(shape, work) + 2 * shape.body * work.prompt * work.prompts
            done += 4 * (shape.body + shape.head) * drawn  # decoded, and scored by the reference
            split = ", ".join(
                f"{part} {1e3 * x:.0f}" + (f" ({1e3 * least[part]:.0f})" if part in least else "")
                for part, x in timed.split().items()
            )
            note = (
                f"ms (floor): {split}; {budget} tokens a pass; of the floor with the KL's gradient "
                f"and the reference's prompts {sum(more.values()) / taken:.2f}"
            )
            bench.add(
                Row("on-policy", name, f"{work.name}, {mode}", taken, drawn / taken, done / taken,
                    sum(least.values()) / taken, timed.peak, note)
            )  # fmt: skip
            bench.free()


# --- part: sampling -------------------------------------------------------------------------------


def sampling_part(bench: Bench, name: str) -> None:
    """Tokens a second of the sampler and of transformers' `generate`, both of bfloat16 weights."""
    shape, work = MODELS[name].shape, DRAWN if bench.fast else DRAWN.shrunk()
    model = make(MODELS[name], bench.device, torch.bfloat16)
    plain = copy.deepcopy(model)
    policy = Transformer(
        model, end_ids=[], decoding=Decoding(max_new_tokens=work.new), packing=False,
        share_prefix=False,
    )  # fmt: skip
    rows = RandomRows.of(work, shape.vocabulary)
    prompt, mask = rows.prompts_only(torch.arange(work.prompts))

    def ours() -> None:
        drawn = policy.sample(prompt, mask, work.samples, stream, 0)
        assert int(drawn.mask.sum()) == work.rows * work.new, "no response ends early"

    @torch.no_grad()
    def theirs() -> None:
        out = plain.generate(
            prompt.to(bench.device), attention_mask=mask.to(bench.device), do_sample=True,
            top_k=0, top_p=1.0, num_return_sequences=work.samples, max_new_tokens=work.new,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape == (work.rows, work.prompt + work.new), "no response ends early"

    ceilings = measure_ceilings(bench, shape)
    parts = floor(shape, work, ceilings)
    least, tokens = parts["prefill"] + parts["decode"], work.rows * work.new
    speeds = {}
    for side, draw in (("preftune", ours), ("generate", theirs)):
        draw()
        bench.forget_peak()
        taken = median(bench.time(draw) for _ in range(2 if bench.quick else 3))
        speeds[side] = tokens / taken
        note = f"{speeds['preftune'] / speeds[side]:.2f} times as fast: preftune's"
        bench.add(
            Row("sampling", name, f"{work.name}, {side}", taken, tokens / taken,
                fraction=least / taken, peak=bench.peak(), note=note * (side == "generate"))
        )  # fmt: skip


# --- what comes out -------------------------------------------------------------------------------

_HEADS = ("part", "model", "case", "ms", "tokens/s", "TFLOP/s", "fraction", "GiB", "note")


def cells(row: Row) -> list[str]:
    """A line as text; empty where nothing was measured."""

    def shown(value: float | None, scale: float, digits: int) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    return [
        row.part, row.model, row.case, shown(row.seconds, 1e3, 1),
        shown(row.tokens_per_second, 1, 0), shown(row.operations_per_second, 1e-12, 3),
        shown(row.fraction, 1, 3), shown(row.peak, 1, 1), row.note,
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The one table, in columns; it is Markdown too."""
    lines = [list(_HEADS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
    out = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *out[1:]])


def targets(bench: Bench) -> dict[str, float]:
    """By name: the least over the cases of what the better mode (eager, compiled) reached."""
    found = {}
    for name, (part, model) in _MEASURED.items():
        best: dict[str, float] = {}
        for row in bench.rows:
            if (row.part, row.model) == (part, model) and row.fraction is not None:
                case = row.case.removesuffix(", eager").removesuffix(", compiled")
                best[case] = max(best.get(case, 0.0), row.fraction)
        if best and bench.fast:
            found[name] = min(best.values())
    return found


def environment(device: torch.device) -> dict[str, str]:
    """The device, its driver, and what ran."""
    import transformers

    found = {"device": "CPU", "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm"]
            out = subprocess.run(
                [*asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            answer = out.stdout.strip().splitlines()
            found["driver, power limit, clock"] = answer[0] if answer else "not told"
        with contextlib.suppress(ImportError):
            found["triton"] = importlib.import_module("triton").__version__
    return found


def hardware(known: Mapping[str, str]) -> str:
    """In one line."""
    return ", ".join(f"{k} {v}" if k != "device" else v for k, v in known.items())


def report(bench: Bench, known: Mapping[str, str], folder: Path | None) -> list[str]:
    """Print everything, write it where asked, and give the target lines."""
    failed = [c for c in bench.checks if not c.holds]
    head = [hardware(known), f"checks: {len(bench.checks) - len(failed)} of {len(bench.checks)}"]
    head += [f"FAILED check: {c.name}: {c.found:.3g}, limit {c.limit:g}" for c in failed]
    head += [f"FAILED: {text}" for text in bench.failures]
    head += [f"stopped, out of time: {text}" for text in bench.stopped]
    lines = [
        json.dumps({"name": n, "ratio": round(x, 3), "target": TARGETS[n],
                    "hardware": hardware(known)})
        for n, x in targets(bench).items()
    ]  # fmt: skip
    print("\n".join([*head, "", table(bench.rows), "", *lines]), flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC)
        stem = folder / f"{now:%Y-%m-%d}-gpu"
        data = {
            "date": f"{now:%Y-%m-%dT%H:%M:%SZ}", "environment": dict(known), "quick": bench.quick,
            "rows": [asdict(r) for r in bench.rows], "failures": bench.failures,
            "stopped": bench.stopped,
            "checks": [asdict(c) | {"holds": c.holds} for c in bench.checks],
            "targets": [json.loads(x) for x in lines],
        }  # fmt: skip
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        title = f"# On a GPU, {now:%d %B %Y}\n\n"
        checks = ["| check | found | limit |", "|---|---|---|"]
        checks += [f"| {c.name} | {c.found:.3g} | {c.limit:g} |" for c in bench.checks]
        made = ["    " + line for line in lines]
        text = "\n\n".join([*head, table(bench.rows), "\n".join(made), "\n".join(checks)])
        stem.with_suffix(".md").write_text(title + text + "\n")
    return lines


PARTS = ("numerics", "ceilings", "pieces", "dpo", "on-policy", "sampling")


def given(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Numerics, speed and memory on a GPU.")
    parser.add_argument("--quick", action="store_true", help="one case each: about two minutes")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: the three")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a folder for JSON and Markdown")
    return parser.parse_args(arguments)


def plan(
    bench: Bench, models: Sequence[str], parts: Sequence[str]
) -> list[tuple[str, float, Callable[[], None]]]:
    """Parts in their order, each with its most seconds."""
    works: dict[str, Callable[[Bench, str], None]] = {
        "pieces": piece_part, "dpo": dpo_part, "on-policy": on_policy_part,
        "sampling": sampling_part,
    }  # fmt: skip
    limits = {"pieces": 20.0, "dpo": 80.0, "on-policy": 60.0, "sampling": 30.0}
    out: list[tuple[str, float, Callable[[], None]]] = []
    if "numerics" in parts:
        out.append(("numerics", 100.0, lambda: numeric_part(bench)))
    if "ceilings" in parts:
        out.append(("ceilings", 20.0, lambda: ceiling_part(bench, models)))
    for i, name in enumerate(models):  # the first is the largest, and has most targets
        for part in (p for p in PARTS if p in works and p in parts):
            if bench.quick and i and part != "dpo":
                continue  # quick: the other models' DPO steps alone
            seconds = limits[part] * (1.0 if i else 1.5)
            call = functools.partial(works[part], bench, name)
            out.append((f"{part} {name}", seconds, call))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if a check or a part failed, after everything is printed."""
    asked = given(arguments)
    device = torch.device(asked.device)
    bench = Bench(device, asked.quick)
    models = asked.model or (["tiny"] if not bench.fast else [m for m in MODELS if m != "tiny"])
    known = environment(device)
    bench.say(hardware(known))
    for name, seconds, work in plan(bench, models, asked.part or PARTS):
        bench.run(name, seconds, work)
    report(bench, known, asked.output)
    return int(bool(bench.failures) or not all(c.holds for c in bench.checks))


if __name__ == "__main__":
    sys.exit(main())
