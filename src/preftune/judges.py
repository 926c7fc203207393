"""Rewards of the settings, as functions of samples."""

import inspect
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import adapters, building, fingerprint, huggingface, rewards
from preftune.data import (
    Example,
    Renderer,
    RowError,
    Rows,
)  # fmt: skip
from preftune.errors import UserError
from preftune.policies.transformer import Transformer
from preftune.runs import RunFolder
from preftune.samples import Samples


def make_reward(
    given: Any, weights: list[float] | None, device: torch.device | None = None
) -> rewards.Reward | None:
    """The reward of the settings: a name, a function, a model, or a list of these.

    Args:
        device: of reward models that are loaded; None: the CPU.
    """
    if given is None or (isinstance(given, list) and not given):
        if weights:
            raise UserError("reward_weights: there is no reward to weigh.")
        return None
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if weights is not None and len(weights) != len(listed):
        raise UserError(f"reward_weights: {len(weights)} weights for {len(listed)} rewards.")
    parts = [_reward(one, device) for one in listed]
    if len(parts) == 1 and weights is None:
        return parts[0]
    return rewards.Weighted(tuple(zip(weights or [1.0] * len(parts), parts, strict=True)))


def _reward(given: Any, device: torch.device | None) -> rewards.Reward:
    """One reward: a name, a function, or a model with one output."""
    if isinstance(given, str):
        return rewards.make(given, partial(_classifier, device=device))
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


def _classifier(name: str, device: torch.device | None) -> rewards.Reward:
    try:
        model, tokenizer = adapters.load_classifier(name, torch.float32)
    except UserError as error:
        message = str(error).removeprefix("model ").removeprefix("reward ")
        raise UserError(f"reward {message}") from error
    return _scored(name, model if device is None else model.to(device), tokenizer)


def _scored(name: str, model: Any, tokenizer: Any) -> rewards.Reward:
    """A classifier's scores of conversations, rendered as its own tokenizer says."""
    renderer = Renderer(tokenizer, end_ids=huggingface.end_ids(model, tokenizer))

    def encode(prompt: Any, completion: str, finished: bool) -> list[int]:
        example = Example(
            prompt=prompt, responses=(completion,), finished=(finished,), columns={}, where=""
        )
        try:
            encoded = renderer.encode(example)
        except RowError:
            return _as_drawn(renderer, example)
        return [*encoded.prompt, *encoded.responses[0]]

    return rewards.Classifier(name, model, encode, building.context_of(model))


def _as_drawn(renderer: Renderer, example: Example) -> list[int]:
    """Ids of a response that the template changes (it cuts thoughts, say): nothing keeps a policy
    from such a one, so it stands behind the prompt as it was drawn.

    Raises:
        RowError: the template refuses the prompt.
    """
    answered = renderer.encode(replace(example, responses=("Yes.",), finished=(True,)))
    ids = renderer.tokenizer(example.responses[0], add_special_tokens=False)["input_ids"]
    end = answered.responses[0][-1:] if example.finished[0] else ()
    return [*answered.prompt, *ids, *end]


def label_source(reward: rewards.Reward | None, data: str | None) -> str | None:
    """Who judged: `rm_same` if a reward model in it was trained on this run's own data."""
    if reward is None:
        return None
    if data is not None and any(_trained_on(model.name, data) for model in _classifiers(reward)):
        return "rm_same"
    return reward.label_source


def _classifiers(reward: rewards.Reward) -> Iterator[rewards.Classifier]:
    """The reward models in it."""
    if isinstance(reward, rewards.Classifier):
        yield reward
    for part in _inside(reward):
        yield from _classifiers(part)


def _inside(reward: rewards.Reward) -> list[rewards.Reward]:
    """Of a sum its parts, of an ensemble its members."""
    if isinstance(reward, rewards.Weighted):
        return [part for _, part in reward.parts]
    return [*reward.members] if isinstance(reward, rewards.Ensemble) else []


def _trained_on(model: str, data: str) -> bool:
    """Whether the run that made the model read these data."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "config.yaml").is_file():
            seen = RunFolder(folder).read_config().get("data")
            if seen is not None and Path(seen).resolve() == Path(data).resolve():
                return True
    return False


def digest_of(reward: rewards.Reward) -> str:
    """A hash of what decides its numbers: names and weights, a function's file, a model's weights.

    What a function imports is not seen, nor what stands behind a judge's address.
    """
    about: list[Any] = [reward.name, *map(digest_of, _inside(reward))]
    if isinstance(reward, rewards.Weighted):
        about.append([weight for weight, _ in reward.parts])
    elif isinstance(reward, rewards.Ensemble):
        about.append(reward.kappa)
    elif isinstance(reward, rewards.Classifier):
        about.append(fingerprint.of_weights(reward.model))
    elif isinstance(reward, rewards.Function):
        about += [path.read_bytes().hex() for path in _files_of(reward)]
    return fingerprint.digest(fingerprint.as_json(about))


def _files_of(reward: rewards.Function) -> list[Path]:
    """The file that it is named by, and the one in which it is written."""
    module = reward.name.rpartition(":")[0]
    named = module if module.endswith(".py") else getattr(sys.modules.get(module), "__file__", None)
    own = inspect.unwrap(reward.function)
    try:
        written = inspect.getsourcefile(own if inspect.isroutine(own) else type(own))
    except TypeError:  # a builtin
        written = None
    found = {Path(path).resolve() for path in (named, written) if path is not None}
    return sorted(path for path in found if path.is_file())


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
        finished=samples.finished.flatten().tolist(),
        where=[rows.where[i] for i in at],
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


def check_models(reward: rewards.Reward | None, rows: Rows | None, room: int) -> None:
    """See whether reward models can read the prompts with an answer of so many tokens: the longest
    one, and of each order of roles the first.

    Raises:
        UserError: which one cannot be read.
    """
    models = [] if reward is None else list(_classifiers(reward))
    if rows is None or not models:
        return
    orders = {_roles(rows.texts[i]): i for i in reversed(range(len(rows)))}
    longest = max(range(len(rows)), key=lambda i: len(rows.prompts[i]))
    asked = sorted({longest, *orders.values()})
    judged = rewards.Judged(
        prompts=[rows.texts[i] for i in asked], completions=[""] * len(asked),
        tokens=[0] * len(asked), finished=[False] * len(asked),
        where=[rows.where[i] for i in asked],
    )  # fmt: skip
    for model in models:
        model.check(judged, room)


def _roles(prompt: Any) -> tuple[str, ...]:
    """Who speaks, turn by turn."""
    return () if isinstance(prompt, str) else tuple(turn["role"] for turn in prompt)


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
            where=[rows.where[i] for i in few],
        ),
    )


def measured_mode(reference: Transformer, prompts: Rows) -> int:
    """The most common length of the reference's samples: the default target of `length:mode`."""
    from preftune.evaluate import answer

    drawn = answer(reference, None, prompts, {}, samples_per_prompt=2, seed=0, num_prompts=64)
    return max(1, statistics.mode(drawn.lengths().flatten().tolist()))
