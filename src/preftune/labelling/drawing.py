"""Fresh pairs of responses: two of one model, or one of each of two."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from preftune import building, huggingface, loading
from preftune.collecting import Data
from preftune.config import Config
from preftune.data import Renderer, Rows
from preftune.errors import UserError
from preftune.labelling.book import Pair
from preftune.labelling.latest import Latest, goes_on, is_run, latest, settings_of
from preftune.numerics import permutation, stream_key, uniform
from preftune.policies.transformer import Transformer

TRIES = 4
"""Draws after which two responses that are one text are given up."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A model, and the prompts as it reads them."""

    name: str
    policy: Transformer
    rows: Rows
    renderer: Renderer
    latest: Latest | None = None
    """Of a run that goes on: it says by which weights it writes."""

    @property
    def asked(self) -> Data:
        """The prompts as it is asked: for good responses, where it is trained to be."""
        if self.policy.controls is None:
            return self.rows
        return building.Asked(self.rows, self.policy)

    def now(self) -> str:
        """Its name, once it has the newest weights."""
        if self.latest is None:
            return self.name
        step = self.latest.refresh()
        return f"{self.name}, step {step}" if step else self.name


def writers(config: Config, names: Sequence[str]) -> list[Writer]:
    """The models, loaded.

    Raises:
        UserError: a model or prompts that cannot be used; prompts that one model refuses.
    """
    found = []
    for name in names:
        if len(names) > 1 and goes_on(name):
            raise UserError(
                f"models: the run '{name}' goes on, and its weights would change while they are "
                "compared. Wait until it has ended."
            )
        found.append(_writer(config, name))
    if any(w.rows.where != found[0].rows.where for w in found):
        raise UserError(
            "models: one of them refuses prompts that the other takes (they are too long for it). "
            "Give shorter ones, or a smaller --max-new-tokens."
        )
    return found


def _writer(config: Config, name: str) -> Writer:
    if not goes_on(name):
        left = str(Path(name) / "model") if is_run(name) else name
        policy, tokenizer = loading.model_of(config, left)
        rows, renderer = loading.prompts_of(config, policy, tokenizer)
        return Writer(name=name, policy=policy, rows=rows, renderer=renderer)
    run = settings_of(name)
    tokenizer = huggingface.load_tokenizer(run.model)
    following = latest(config, name, tokenizer)
    # its prompts look as they do in training
    seen = {"template": run.template, "system_prompt": run.system_prompt}
    rows, renderer = loading.prompts_of(
        config.model_copy(update=seen), following.policy, tokenizer
    )  # fmt: skip
    return Writer(
        name=name, policy=following.policy, rows=rows, renderer=renderer, latest=following
    )  # fmt: skip


def draw(each: Sequence[Writer], seed: int, number: int) -> Pair | None:
    """The pair of a number: prompts in an order by chance, all of them before one comes again.

    Returns:
        None where the two responses are one text, however often they are drawn.
    """
    rows = each[0].rows
    epoch, place = divmod(number, len(rows))
    row = int(permutation(stream_key(seed, "label"), epoch, len(rows))[place])
    names = [writer.now() for writer in each]
    for attempt in range(TRIES):
        key = stream_key(seed, "label", number, attempt)
        if len(each) == 2:
            said = [_said(w, row, 1, stream_key(key, i))[0] for i, w in enumerate(each)]
        else:
            said = _said(each[0], row, 2, key)
        (first, done), (second, done_too) = said
        if first.strip() != second.strip():
            return Pair(
                id=number, row=row, prompt=rows.texts[row], responses=(first, second),
                finished=(done, done_too), writers=(names[0], names[-1]),
            )  # fmt: skip
    return None


def _said(writer: Writer, row: int, count: int, key: int) -> list[tuple[str, bool]]:
    def stream(t: int, shape: tuple[int, ...]) -> Tensor:
        return uniform(key, t, torch.arange(shape[-1])).expand(shape)

    with torch.no_grad():
        index = torch.tensor([row])
        drawn = writer.policy.sample(*writer.asked.prompts_only(index), count, stream, 0)
    lengths = (drawn.lengths() - drawn.finished.long())[0].tolist()
    return [
        (
            writer.renderer.decode(drawn.tokens[0, k, : lengths[k]].tolist()),
            bool(drawn.finished[0, k]),
        )
        for k in range(count)
    ]
