"""From settings to the parts of a run: the row, models, data, rewards. Nothing is written here."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import huggingface, methods, rewards, spec
from preftune.config import Config, set_path
from preftune.data import (
    Example,
    Rejected,
    Renderer,
    Report,
    Rows,
    build_rows,
    check_bad_rows,
    load_examples,
)  # fmt: skip
from preftune.errors import UserError
from preftune.method import Method
from preftune.policies.transformer import Transformer
from preftune.reward_model import RewardModel
from preftune.runs import RunFolder
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding
from preftune.sources import Offline, Pool, Reference

SMALL_MODEL = 5_000_000
"""Parameters below which bfloat16 gains nothing on a CPU."""
DEFAULT_MAX_LENGTH = 1024
CPU_MICRO_BATCH_TOKENS = 2048


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
    """How responses are drawn."""
    return Decoding(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, top_k=config.top_k,
    )  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device that a setting names; `auto` takes an accelerator where there is one."""
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
    """Time one product in both types: a CPU without bfloat16 units is several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    timings = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(256, 512).to(dtype), torch.randn(512, 1024).to(dtype)
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            torch.matmul(a, b)
            best = min(best, time.perf_counter() - began)
        timings[dtype] = best
    return timings[torch.float32] > 1.5 * timings[torch.bfloat16]


def autocast_of(dtype: str, model: Any) -> torch.dtype | None:
    """The trunk's compute type under float32 weights; None is the weights' own."""
    if dtype == "bfloat16":
        return torch.bfloat16
    if dtype != "auto":
        return None
    device = next(model.parameters()).device
    large = sum(p.numel() for p in model.parameters()) > SMALL_MODEL
    return torch.bfloat16 if large and _faster_in_bfloat16(device) else None


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
    """What the method trains: a policy, or where it takes scores alone a reward model."""
    if "score" not in method.outputs:
        return make_policy(config, model, tokenizer, method)
    loaded: Any = model
    if loaded is None:
        loaded = huggingface.classifier_from(config.model, _weights(config))
    if getattr(getattr(loaded, "config", None), "num_labels", None) != 1:
        raise UserError(
            "model: to train a reward model give a folder, or a sequence-classification model "
            "with one output."
        )
    loaded = loaded.to(device=pick_device(config.device), dtype=_weights(config))
    return RewardModel(
        loaded, autocast=autocast_of(config.dtype, loaded), share_prefix=config.share_prefix
    )


def _weights(config: Config) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def make_policy(
    config: Config, model: Any | None, tokenizer: Any | None, method: Method | None = None
) -> Transformer:
    """The policy, its weights in float32 (or float64), with what the method needs on top."""
    weights = _weights(config)
    loaded: Any = huggingface.load_model(config.model, weights) if model is None else model
    model = loaded.to(device=pick_device(config.device), dtype=weights)
    ends = huggingface.end_ids(model, tokenizer)
    if not ends:
        raise UserError(
            f"model '{config.model}': has no end token. Set eos_token_id in its configuration."
        )
    return Transformer(
        model, end_ids=ends, decoding=decoding_of(config),
        autocast=autocast_of(config.dtype, model), share_prefix=config.share_prefix,
        value_head=method is not None and "value" in method.outputs | method.needs,
        controls=controls_of(method, tokenizer),
    )  # fmt: skip


def make_reference(config: Config, policy: Transformer) -> Transformer:
    """The reference policy: a model of its own, or a frozen copy of the policy as it starts."""
    if config.reference is None:
        return policy.frozen_copy()
    dtype = next(policy.model.parameters()).dtype
    model = huggingface.load_model(config.reference, dtype).to(policy.device)
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


def load_rows(
    source: Any,
    config: Config,
    renderer: Renderer,
    *,
    want: str,
    context: int | None,
    reserve: int = 0,
) -> tuple[Rows, Report, list[Rejected]]:
    """A data source as token ids; refused rows are returned, too many of them are an error."""
    called = _called(source, config)
    try:
        return _load_rows(source, config, renderer, want, context, reserve)
    except UserError as error:
        error.args = (_placed(str(error), source, called),)
        raise


def _called(source: Any, config: Config) -> str:
    """The setting that the source was given by."""
    names = ("data", "prompts", "eval_data")
    return next((n for n in names if source is not None and getattr(config, n) == source), "data")


def _placed(message: str, source: Any, called: str) -> str:
    """The message with the name of the file and of the setting."""
    if message.startswith("data: "):
        return f"{called} '{_named(source)}': {message.removeprefix('data: ')}"
    return called + message.removeprefix("data") if message.startswith("data ") else message


def _load_rows(
    source: Any, config: Config, renderer: Renderer, want: str, context: int | None, reserve: int
) -> tuple[Rows, Report, list[Rejected]]:
    loaded = load_examples(source, want=want, max_rows=config.max_rows)
    limits = [n for n in (config.max_length or DEFAULT_MAX_LENGTH, context) if n is not None]
    limit = config.max_length or min(limits)
    try:
        rows, report = build_rows(
            loaded.examples, renderer, max_length=limit, truncation=config.truncation,
            context=context, reserve=reserve,
        )  # fmt: skip
    except UserError:
        check_bad_rows(loaded, config.bad_rows)
        raise
    check_bad_rows(loaded, config.bad_rows, later=report.rejected)
    return rows, report, [*loaded.rejected, *report.rejected]


def describe(rows: Rows, report: Report, refused: int) -> str:
    """What became of the data, in one line."""
    counts = {
        "refused": refused,
        "dropped as too long": report.dropped,
        "cut": report.cut,
        "with a token across the boundary": report.boundary_merged,
    }
    return ", ".join(
        [f"data: {len(rows)} {rows.kind}", *(f"{n} {what}" for what, n in counts.items() if n)]
    )


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str) else "in memory"


def want_of(method: Method) -> str:
    """What the row's sources need of the data."""
    most = max((min(max(1, t.labeller.given), t.source.reads) for t in method.terms), default=0)
    return ("prompts", "completions", "pairs")[most]


def draws_from_reference(source: Any) -> bool:
    """Whether the source, or a member of it, samples the reference."""
    if isinstance(source, Pool):
        return any(draws_from_reference(m) for m in source.members)
    return isinstance(source, Reference)


def has_scores(rows: Rows) -> bool:
    """Whether the data score both responses of every pair."""
    columns = [rows.columns.get(n) for n in ("score_chosen", "score_rejected")]
    return all(c is not None and None not in c for c in columns)


def fitted(method: Method, rows: Rows) -> Method:
    """The row with its sources told how many responses a row of the data holds."""
    held = len(rows.responses[0])

    def fit(source: Any) -> Any:
        if isinstance(source, Offline) and held:
            return replace(source, responses=held)
        if isinstance(source, Pool):
            return replace(source, members=tuple(fit(m) for m in source.members))
        return source

    return replace(method, terms=tuple(replace(t, source=fit(t.source)) for t in method.terms))


def make_reward(given: Any, weights: list[float] | None) -> rewards.Reward | None:
    """The reward of the settings: a name, a list of names, or a function."""
    if given is None or (isinstance(given, list) and not given):
        if weights:
            raise UserError("reward_weights: there is no reward to weigh.")
        return None
    if callable(given) and not isinstance(given, str):
        return rewards.Function(getattr(given, "__name__", type(given).__name__), given)
    names = [given] if isinstance(given, str) else list(given)
    if weights is not None and len(weights) != len(names):
        raise UserError(f"reward_weights: {len(weights)} weights for {len(names)} rewards.")
    parts = [rewards.make(name, _classifier) for name in names]
    if len(parts) == 1 and weights is None:
        return parts[0]
    return rewards.Weighted(tuple(zip(weights or [1.0] * len(parts), parts, strict=True)))


def _classifier(name: str) -> rewards.Reward:
    try:
        model, tokenizer = huggingface.load_classifier(name, torch.float32)
    except UserError as error:
        message = str(error).removeprefix("model ").removeprefix("reward ")
        raise UserError(f"reward {message}") from error
    renderer = Renderer(tokenizer, end_ids=huggingface.end_ids(model, tokenizer))

    def encode(prompt: Any, completion: str) -> list[int]:
        example = Example(
            prompt=prompt, responses=(completion,), finished=(True,), columns={}, where=""
        )
        encoded = renderer.encode(example)
        return [*encoded.prompt, *encoded.responses[0]]

    return rewards.Classifier(name, model, encode)


def label_source(reward: rewards.Reward | None, data: str | None) -> str | None:
    """Who judged: `rm_same` if the reward model was trained on this run's own data."""
    if reward is None:
        return None
    if isinstance(reward, rewards.Classifier) and data is not None:
        for folder in (Path(reward.name), Path(reward.name).parent):
            if (folder / "config.yaml").is_file():
                seen = RunFolder(folder).read_config().get("data")
                if seen is not None and Path(seen).resolve() == Path(data).resolve():
                    return "rm_same"
    return reward.label_source


def judged(samples: Samples, rows: Rows, renderer: Renderer) -> rewards.Judged:
    """Responses [N, K] as a reward takes them, one after another."""
    num_responses = samples.tokens.shape[-2]
    at = [int(r) for r in samples.row for _ in range(num_responses)]
    lengths = (samples.lengths() - samples.finished.long()).flatten().tolist()
    tokens = samples.tokens.flatten(0, 1)
    return rewards.Judged(
        prompts=[rows.texts[i] for i in at],
        completions=[renderer.decode(t[:n].tolist()) for t, n in zip(tokens, lengths, strict=True)],
        tokens=lengths,
        columns={k: [v[i] for i in at] for k, v in rows.columns.items()},
    )


def judge_of(reward: rewards.Reward, rows: Rows, renderer: Renderer) -> Callable[[Samples], Tensor]:
    """A reward as a function of samples."""

    def judge(samples: Samples) -> Tensor:
        values = rewards.judge(reward, judged(samples, rows, renderer))
        return torch.tensor(values, dtype=torch.float64).view(samples.finished.shape)

    return judge


def try_reward(reward: rewards.Reward | None, rows: Rows | None, renderer: Renderer) -> None:
    """Judge two short answers, so that a reward that fails does so before anything is written.

    Raises:
        UserError: it raised, or did not return one finite number a response.
    """
    if reward is None or rows is None or isinstance(reward, rewards.Length):
        return
    few = range(min(2, len(rows)))
    answers = [renderer.tokenizer("Yes.", add_special_tokens=False)["input_ids"] for _ in few]
    rewards.judge(
        reward,
        rewards.Judged(
            prompts=[rows.texts[i] for i in few],
            completions=["Yes."] * len(few),
            tokens=[len(ids) for ids in answers],
            columns={k: [v[i] for i in few] for k, v in rows.columns.items()},
        ),
    )


def measured_mode(reference: Transformer, prompts: Rows) -> int:
    """The most common length of the reference's samples: the default target of `length:mode`."""
    from preftune.evaluate import answer

    drawn = answer(reference, None, prompts, {}, samples_per_prompt=2, seed=0, num_prompts=64)
    return max(1, statistics.mode(drawn.lengths().flatten().tolist()))
