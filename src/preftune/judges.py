"""Rewards of the settings, as functions of samples."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import adapters, huggingface, rewards
from preftune.data import (
    Example,
    Renderer,
    Rows,
)  # fmt: skip
from preftune.errors import UserError
from preftune.policies.transformer import Transformer
from preftune.runs import RunFolder
from preftune.samples import Samples


def make_reward(given: Any, weights: list[float] | None) -> rewards.Reward | None:
    """The reward of the settings: a name, a function, a model, or a list of these."""
    if given is None or (isinstance(given, list) and not given):
        if weights:
            raise UserError("reward_weights: there is no reward to weigh.")
        return None
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if weights is not None and len(weights) != len(listed):
        raise UserError(f"reward_weights: {len(weights)} weights for {len(listed)} rewards.")
    parts = [_reward(one) for one in listed]
    if len(parts) == 1 and weights is None:
        return parts[0]
    return rewards.Weighted(tuple(zip(weights or [1.0] * len(parts), parts, strict=True)))


def _reward(given: Any) -> rewards.Reward:
    """One reward: a name, a function, or a model with one output."""
    if isinstance(given, str):
        return rewards.make(given, _classifier)
    if isinstance(given, torch.nn.Module):
        name = getattr(given, "name_or_path", "")
        if getattr(getattr(given, "config", None), "num_labels", None) != 1 or not name:
            raise UserError(
                "reward: a model object must be a sequence-classification model with one output "
                "that was loaded from a folder or the Hub, where its tokenizer is."
            )
        return _scored(name, given.eval(), huggingface.load_tokenizer(name))
    if callable(given):
        return rewards.Function(getattr(given, "__name__", type(given).__name__), given)
    raise UserError(f"reward: {given!r:.60} is neither a name, nor a function, nor a model.")


def _classifier(name: str) -> rewards.Reward:
    try:
        model, tokenizer = adapters.load_classifier(name, torch.float32)
    except UserError as error:
        message = str(error).removeprefix("model ").removeprefix("reward ")
        raise UserError(f"reward {message}") from error
    return _scored(name, model, tokenizer)


def _scored(name: str, model: Any, tokenizer: Any) -> rewards.Reward:
    """A classifier's scores of rendered conversations."""
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
    whole = samples.lengths().flatten().tolist()
    tokens = samples.tokens.flatten(0, 1)
    return rewards.Judged(
        prompts=[rows.texts[i] for i in at],
        completions=[renderer.decode(t[:n].tolist()) for t, n in zip(tokens, lengths, strict=True)],
        tokens=lengths,
        columns={k: [v[i] for i in at] for k, v in rows.columns.items()},
        ids=[t[:n].tolist() for t, n in zip(tokens, whole, strict=True)],
    )


def judge_of(reward: rewards.Reward, rows: Rows, renderer: Renderer) -> Callable[[Samples], Tensor]:
    """A reward as a function of samples."""

    def judge(samples: Samples) -> Tensor:
        return _as_tensor(rewards.judge(reward, judged(samples, rows, renderer)), samples)

    return judge


def _as_tensor(values: list[float], samples: Samples) -> Tensor:
    """One number a response, [N, K]."""
    return torch.tensor(values, dtype=torch.float64).view(samples.finished.shape)


def judge_in_parts(
    reward: rewards.Reward, rows: Rows, renderer: Renderer
) -> Callable[[Samples], Tensor | tuple[Tensor, dict[str, Tensor]]]:
    """The same for the loop: of a sum also its parts by name, from one call of each."""
    if not isinstance(reward, rewards.Weighted):
        return judge_of(reward, rows, renderer)

    def judge(samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        columns = reward.each(judged(samples, rows, renderer))
        named = zip((r.name for _, r in reward.parts), columns, strict=True)
        total = _as_tensor(reward.total(columns), samples)
        return total, {name: _as_tensor(column, samples) for name, column in named}

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
            ids=[[*ids, renderer.end_id] for ids in answers],
            columns={k: [v[i] for i in few] for k, v in rows.columns.items()},
        ),
    )


def measured_mode(reference: Transformer, prompts: Rows) -> int:
    """The most common length of the reference's samples: the default target of `length:mode`."""
    from preftune.evaluate import answer

    drawn = answer(reference, None, prompts, {}, samples_per_prompt=2, seed=0, num_prompts=64)
    return max(1, statistics.mode(drawn.lengths().flatten().tolist()))
