"""The strict flat configuration, in YAML and as flags. The loop never sees it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from preftune import plain_yaml
from preftune.errors import UserError, nearest
from preftune.huggingface import DEFAULT_MODEL

_TRL_NAMES = {
    "model_name_or_path": "model", "dataset_name": "data", "output_dir": "output",
    "lr": "learning_rate", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size", "num_train_epochs": "epochs",
    "max_completion_length": "max_new_tokens", "num_generations": "samples_per_prompt",
    "num_iterations": "passes", "lr_scheduler_type": "lr_schedule", "logging_steps": "log_every",
    "eval_steps": "eval_every", "save_steps": "save_every", "train_dataset": "data",
    "eval_dataset": "eval_data", "reward_model_path": "reward", "max_prompt_length": "max_length",
    "torch_dtype": "dtype", "num_epochs": "epochs",
    "total_steps": "max_steps", "init_kl_coef": "kl", "kl_coef": "kl", "fp16": "dtype",
    "loss_type": "method", "reward_funcs": "reward", "ref_model": "reference", "bf16": "dtype",
    "resume_from_checkpoint": "resume", "optim": "optimizer", "dataset": "data",
    "steps": "max_steps", "peft_config": "adapter", "use_peft": "adapter", "lora_r": "adapter",
    "lora_alpha": "adapter", "lora_target_modules": "adapter", "load_in_4bit": "adapter",
    "load_in_8bit": "adapter", "use_dora": "adapter", "use_rslora": "adapter", "r": "rank",
    "lora_dropout": "adapter", "report_to": "trackers", "log_with": "trackers",
    "use_vllm": "sampler", "vllm_mode": "sampler",
    "vllm_server_base_url": "sampler",
}  # fmt: skip


TRACKERS = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Adapter(Strict):
    """A PEFT adapter, which is trained in place of the model's weights."""

    kind: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="LoRA; scaled by the root of its rank; with a magnitude of its own"
    )
    rank: int = Field(16, ge=1, description="columns of each of its two factors")
    alpha: float = Field(
        32, gt=0, description="scales it: by alpha / rank, or in rslora alpha / sqrt(rank)"
    )
    dropout: Literal[0] = Field(
        0, description="none: policy and reference are compared as they compute"
    )
    target_modules: str | list[str] = Field(
        "all-linear", description="names of the modules that it changes; all-linear: but the head"
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        None, description="keep the base model's weights in so many bits (bitsandbytes on CUDA)"
    )

    @field_validator("target_modules")
    @classmethod
    def _plain_names(cls, value: str | list[str]) -> str | list[str]:
        """peft takes a text for a regular expression; here it is a name, or several."""
        if value == "all-linear":
            return value
        names = value.replace(",", " ").split() if isinstance(value, str) else value
        if not names or any(re.fullmatch(r"[\w.]+", name) is None for name in names):
            raise ValueError("it must be all-linear or names of modules, as [q_proj, v_proj]")
        return names


class Config(Strict):
    """Settings of a run; what is not given is the row's, or is resolved at the start."""

    method: str | dict[str, Any] = Field(
        "dpo", description="a row of the table, or in YAML a row of your own"
    )
    terms: list[dict[str, Any]] | None = Field(
        None, description="the row's terms, spelled out (YAML)"
    )
    model: str = Field(DEFAULT_MODEL, description="a model folder, a Hub id, or smollm2-135m")
    reference: str | None = Field(
        None,
        description="the reference policy, a folder or Hub id; default: the model as it starts; of "
        "evaluate: the reference or starting model that the run's config.yaml names, and for a "
        "model of no run none (no KL, no win rate)",
    )
    data: str | None = Field(
        None, description="preferences: JSONL, JSON, Parquet, CSV (gz, xz) or a Hub id"
    )
    follow: float | None = Field(
        None,
        gt=0,
        description="train on rows as they are appended to data, until none came for so many "
        "seconds",
    )
    eval_data: str | None = Field(
        None,
        description="held-out rows, of which training evaluates the first 64 in file order (a "
        "reward model: all pairs)",
    )
    eval_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of data held out, whole prompts drawn by seed, where eval_data is not "
        "given; training evaluates 64 of them at most; default 0, or .05 and at most 64 rows where "
        "there is a reward and data have 200 rows or more",
    )
    max_rows: int | None = Field(None, ge=1, description="take only the first so many rows")
    prompts: str | None = Field(
        None, description="prompts to sample responses to; default: those of data"
    )
    reward: str | list[str] | None = Field(
        None,
        description="length:min, length:mode[=L], length:within=L, file.py:f, pkg.module:f, "
        "a model folder, ensemble:A,B or judge:URL; several are summed",
    )
    gold: str | None = Field(None, description="a second reward, used in evaluation only")
    judge: str | None = Field(
        None, description="URL of an OpenAI-compatible server: win rate by a judge, in evaluation"
    )
    retention: str | None = Field(
        None, description="plain text (.txt, or JSONL with 'text') whose likelihood should last"
    )
    reward_weights: list[float] | None = Field(
        None, description="weights of several rewards in their sum, in order; default: 1 each"
    )
    label_source: Literal["true", "rm_same", "rm_other", "judge", "human"] | None = Field(
        None,
        description="who judged: the task itself (true), a reward model of the same data (rm_same) "
        "or of others (rm_other), a judge, people (human); default: told from the reward",
    )
    output: str | None = Field(None, description="run folder; default runs/<method>-<UTC time>")
    seed: int = Field(0, ge=0, description="seed of data order and sampling")
    max_steps: int | None = Field(
        None, ge=1, description="updates of the whole run; overrides epochs"
    )
    epochs: float = Field(1.0, gt=0, description="times through the data (or prompts)")
    batch_size: int = Field(8, ge=1, description="items (pairs, responses, groups) of an update")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward pass; default: as many as fit, on a CPU at most 2048",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="default: the row's, for an adapter ten times that"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="the learning rate after the warm-up: constant, or falling towards 0 at the "
        "last step, linearly or as a cosine",
    )
    warmup_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the steps in which the learning rate rises from 0"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="the same as a number of steps, in place of warmup_ratio"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW; 0: none")
    max_grad_norm: float = Field(
        1.0, gt=0, description="a gradient whose norm is larger is scaled down to this norm"
    )
    optimizer: Literal["adamw"] = Field("adamw", description="fused AdamW, the only one")
    adapter: Adapter | None = Field(
        None, description="train an adapter: lora, rslora or dora; more by --set adapter.rank=8"
    )
    reference_update: Literal["fixed", "round", "ema"] | None = Field(
        None,
        description="fixed: the reference stays as it starts; round: it becomes the policy at each "
        "round (offline: each epoch); ema: a moving average of the policy",
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of itself that a reference with reference_update: ema keeps at an "
        "update (default .99)",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="strength of the KL penalty in DPO and its kin, reward units a nat; in RWR the "
        "temperature, in units of the reward",
    )
    tau: float | None = Field(
        None, gt=0, description="strength of the KL penalty in IPO, 1/nats (TRL calls it beta)"
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="weight of the row's last term; in hypo this is lambda (default 0.05 x beta)",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="ppo and grpo: ratios of policy now to policy at collection count within "
        "1 - clip to 1 + clip; without unit",
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="probability that a label of the data is wrong"
    )
    kl: float | None = Field(
        None,
        ge=0,
        description="coefficient of the KL that is taken off a reward, reward units a nat",
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="budget of reverse KL, nats a response, that KL weights and coefficients are "
        "moved to hold",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="the run ends when the mean reward of fresh samples has not risen for so many "
        "windows of 25 updates",
    )
    max_weight: float | None = Field(
        None, gt=0, description="largest weight exp(reward / beta) of a response in RWR"
    )
    baseline: Literal["none", "batch", "prompt", "leave_one_out", "running", "value"] | None = (
        Field(
            None,
            description="what is taken off a reward to make an advantage: nothing; the mean of the "
            "round's others (batch), of the prompt's samples (prompt), of the prompt's others "
            "(leave_one_out) or of earlier rounds (running); the value head's estimate (value)",
        )
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="prompts that a round of fresh samples answers; default: those of one update",
    )
    samples_per_prompt: int | None = Field(
        None, ge=1, description="responses drawn to a prompt; default: the row's, of evaluate 1"
    )
    passes: int | None = Field(
        None, ge=1, description="times that a round is trained on (sample reuse)"
    )
    unit: Literal["sequence", "token"] | None = Field(
        None,
        description="what the loss is a mean over: items (sequence) or their response tokens "
        "(token)",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="most tokens of a prompt with its response; default: the model's context, at "
        "most 1024",
    )
    max_new_tokens: int = Field(
        64, ge=1, description="tokens after which a sampled response is cut"
    )
    temperature: float = Field(
        1.0, ge=0, description="logits are divided by it before sampling; 0 is greedy"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the likeliest tokens of this joint probability"
    )
    top_k: int = Field(0, ge=0, description="sample among so many likeliest tokens; 0: all")
    sampler: str = Field(
        "local",
        description="who draws fresh responses: local (the model itself), vllm, or a server's URL",
    )
    max_staleness: int = Field(
        0, ge=0, description="updates by which the weights of sampler: vllm may be behind"
    )
    min_new_tokens: int = Field(
        0, ge=0, description="least tokens of a sampled response, before which it may not end"
    )
    stop: list[str] | None = Field(None, description="texts that end a sampled response")
    truncation: Literal["drop", "left", "right", "error"] = Field(
        "drop",
        description="rows longer than max_length: left out and counted (drop), cut in the prompt "
        "(left) or in the response (right), or an error",
    )
    template: str = Field(
        "auto",
        description="chat template: the tokenizer's, where it has one (auto), none (text as it "
        "is), or a .jinja file",
    )
    system_prompt: str | None = Field(None, description="put before conversations that have none")
    packing: bool | None = Field(
        None, description="rows one after another without padding; default: where it works"
    )
    share_prefix: bool | None = Field(
        None, description="a prompt once for all its responses; default: where it saves tokens"
    )
    compile: bool | None = Field(
        None, description="compile the model's blocks; default: where the run is long enough"
    )
    activation_checkpointing: bool | None = Field(
        None,
        description="compute activations again in the backward pass; default: where memory lacks",
    )
    reference_cache: bool | None = Field(
        None,
        description="keep the reference's log-probs of data on disk; default: where they are fixed",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto",
        description="type of computation, over float32 weights (float64: weights too); auto: "
        "bfloat16 where the device is fast at it",
    )
    device: str = Field(
        "auto", description="cpu, cuda, mps, or auto: the first at hand of cuda, mps, cpu"
    )
    threads: int | None = Field(
        None, ge=1, description="threads on the processor; default: torch's own choice"
    )
    bad_rows: float = Field(
        0.05, ge=0, le=1, description="share of unusable rows above which a command stops"
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; default: only when it is interrupted",
    )
    best_by: str | None = Field(
        None,
        description="leave the model whose evaluation has the highest NAME (-NAME: lowest), a "
        "figure of at most 64 held-out prompts",
    )
    max_skipped: int = Field(
        0,
        ge=0,
        description="updates left out, at most, where the loss or gradient is not finite",
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations; default: at the end"
    )
    log_every: int = Field(1, ge=1, description="steps between rows of metrics.jsonl")
    trackers: list[TRACKERS] | None = Field(
        None, description="where metrics are sent besides: tensorboard, wandb, trackio, mlflow"
    )
    resume: bool = Field(False, description="go on with the run in output")

    @field_validator("adapter", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        """`adapter: lora` stands for `adapter: {kind: lora}`."""
        return {"kind": value} if isinstance(value, str) else value


def explain(error: ValidationError, known: Iterable[str]) -> UserError:
    """pydantic's findings as one message: key, value, reason, nearest name."""
    lines = []
    for found in error.errors():
        key = ".".join(str(p) for p in found["loc"])
        if found["type"] == "extra_forbidden":
            last = str(found["loc"][-1])
            near = suggest(key, known) if key == last else suggest(last, Adapter.model_fields)
            lines.append(f"'{key}' is no setting.{near}")
        else:
            lines.append(
                f"'{key}' is {found['input']!r:.60}: {found['msg'][0].lower()}{found['msg'][1:]}."
            )
    return UserError(" ".join(dict.fromkeys(lines)))


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`: what another library's name is here, else the nearest name."""
    known = list(known)
    twin = _TRL_NAMES.get(name.replace("-", "_"))
    return f" Did you mean '{twin}'?" if twin in known else nearest(name, known)


def load(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """A Config from a mapping or a YAML file.

    Raises:
        UserError: each wrong key or value by name.
    """
    if isinstance(config, Config):
        return config
    values = dict(config) if isinstance(config, Mapping) else read_yaml(Path(config))
    check_keys(values, "config")
    try:
        return Config(**values)
    except ValidationError as error:
        raise explain(error, Config.model_fields) from error


def check_keys(values: Iterable[Any], where: str) -> None:
    """Refuse keys that are no settings.

    Raises:
        UserError: each by name, with the nearest.
    """
    known = Config.model_fields
    wrong = [k for k in values if k not in known]
    if wrong:
        lines = [f"'{k}' is no setting.{suggest(str(k), known)}" for k in wrong]
        raise UserError(f"{where}: {' '.join(lines)}")


def read_yaml(path: Path, besides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file of settings.

    Args:
        besides: keys that it may hold beside them.

    Raises:
        UserError: it cannot be read, or holds a key that is no setting.
    """
    values = read_mapping(path)
    check_keys([k for k in values if k not in besides], f"config '{path}'")
    return values


def read_mapping(path: Path) -> dict[Any, Any]:
    """A YAML file that holds a mapping; tags that would run code are refused."""
    if path.is_dir():
        hint = f" Give {path / 'config.yaml'}." if (path / "config.yaml").is_file() else ""
        raise UserError(f"config '{path}': is a folder, not a YAML file.{hint}")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"config '{path}': no such file.{nearest(path.name, beside)}")
    try:
        values = plain_yaml.load(path.read_text(encoding="utf-8"))
    except (plain_yaml.NotPlain, UnicodeDecodeError) as error:
        line = getattr(error, "line", None)
        where = f", line {line}" if line else ""
        raise UserError(f"config '{path}'{where}: {error}. Only plain YAML is read.") from error
    except OSError as error:
        raise UserError(f"config '{path}': cannot be read: {error.strerror or error}.") from error
    if not isinstance(values, dict):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"config '{path}': holds {kind}. Give a mapping of settings, as `method: dpo`."
        )
    return values


def set_path(values: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a dotted path (`terms.1.weight`).

    Raises:
        UserError: no such place; the nearest is offered.
    """
    place: Any = values
    parts = path.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(f"--set {path}: '{part}' must be a number below {len(place)}.")
            key: Any = int(part)
        else:
            key = part
            if not isinstance(place, dict) or part not in place:
                known = place if isinstance(place, dict) else ()
                raise UserError(
                    f"--set {path}: there is no '{part}'.{nearest(part, map(str, known))}"
                )
        if last:
            place[key] = value
        else:
            place = place[key]
