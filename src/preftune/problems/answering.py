"""What a model folder answers, as texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from preftune import building, huggingface, loading
from preftune.config import Config
from preftune.evaluate import answer
from preftune.sampling.decoding import Decoding


@dataclass(frozen=True)
class Said:
    """An answer."""

    ids: tuple[int, ...]
    """Its tokens, the end token left out."""
    finished: bool
    """Whether it ended by itself."""
    tokenizer: Any

    @property
    def text(self) -> str:
        """Special tokens left out."""
        return huggingface.text_of(self.tokenizer, list(self.ids))

    def cut(self, tokens: int) -> "Said":
        """Its beginning, which ends there; itself where it is no longer than that."""
        if tokens >= len(self.ids):
            return self
        return Said(self.ids[:tokens], True, self.tokenizer)


def answers(
    settings: Config,
    prompts: Sequence[Any],
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Said]]:
    """`count` answers to each prompt (text, or a list of turns).

    Args:
        settings: the model, how its prompts are rendered, and `max_new_tokens`.
        seed: of the draws.
    """
    policy, tokenizer = loading.model_of(settings, settings.model)
    limit = settings.max_new_tokens
    policy.decoding = Decoding(max_new_tokens=limit, temperature=temperature)
    renderer = building.make_renderer(settings, tokenizer, policy)
    context = building.context_of(policy.model)
    rows, _, _ = loading.load_rows(
        [{"prompt": p} for p in prompts], settings, renderer, want="prompts", context=context,
        reserve=limit,
    )  # fmt: skip
    assert len(rows) == len(prompts), "no prompt is refused"
    drawn = answer(
        policy, None, rows, {}, samples_per_prompt=count, seed=seed, own=False, progress=tick
    )
    ended = drawn.samples.finished.tolist()
    return [
        [Said(tuple(ids), done, tokenizer) for ids, done in zip(own, those, strict=True)]
        for own, those in zip(drawn.tokens(), ended, strict=True)
    ]
