"""This library's side: updates of a run that is made as `preftune train` makes it.

    python benchmarks/ours.py JOB

JOB is JSON: `config` (settings of a run), `reward` (true: fewest characters), `order` (minibatches
whose rows are told beforehand), `tokens` (of a step, for the sizes of the products that are timed).
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flops import Shape, products, rates
from workers import Answer, Channel, digest


def environment() -> dict[str, str]:
    """What the `preftune` command settles before it starts."""
    from preftune.startup import settings

    return settings()


def fewest_characters(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward of both sides: it hardly ever ties, so every pair is trained on."""
    return [-float(len(text)) for text in completions]


def order(parts: Any, world: Any, updates: int) -> list[list[int]]:
    """Rows of the first minibatches, as the source will draw them."""
    from preftune.collecting import Context, Cursor

    source = parts.method.terms[0].source
    ctx = Context(
        data=world.data, policy=world.policy, reference=None, version=0, seed=world.seed,
        cursor=Cursor(), kept={},
    )  # fmt: skip
    return [source.collect(ctx, world.batch_size).row.tolist() for _ in range(updates)]


def drawn(state: Any) -> int:
    """Tokens of the samples that the update's rounds were made of."""
    fresh = [g.round.samples for g in state.groups if g.source.draws]
    return sum(int(s.mask.sum()) for s in fresh)


def main() -> None:
    """Start a run as `preftune train` does, and hold it before each of its updates."""
    job = json.loads(sys.argv[1])
    measured: dict[str, tuple[int, int, int]] = {}
    channel = Channel({"rates": lambda: rates(measured)})

    from preftune import config as configs
    from preftune import loop, training
    from preftune.events import teller
    from preftune.parts import make_settings, resolved_config
    from preftune.preparing import prepare
    from preftune.runs import RunFolder

    reward = fewest_characters if job.get("reward") else None
    parts = prepare(configs.load(job["config"]), reward=reward)
    settings = make_settings(parts)
    resolved = resolved_config(parts, settings)
    folder = RunFolder.create(parts.output, resolved)
    notes = [*parts.notes]
    update = loop.update

    def ready(state: Any) -> Answer:
        shape = Shape.of(parts.model.model.config.to_dict())
        measured.update(products(shape, job.get("tokens", 2048)))
        rows = parts.data or parts.prompts
        both = zip(rows.prompts, rows.responses, strict=True)
        return {
            "digest": digest([[prompt, *responses] for prompt, responses in both]),
            "shape": asdict(shape),
            "order": order(parts, state.world, job["order"]) if "order" in job else None,
            "notes": notes,
            "config": {k: v for k, v in resolved.items() if isinstance(v, str | int | float)},
        }

    def held(state: Any, *given: Any, **named: Any) -> Any:
        if state.step == 0:
            channel.say(ready(state))
        rest = channel.until_step()
        began = time.perf_counter()
        metrics = update(state, *given, **named)
        seconds = time.perf_counter() - began
        rows = state.groups[0].round.samples.row.tolist()
        told = {"loss": metrics["loss"], "rows": rows, "drawn": drawn(state)}
        channel.say({"seconds": seconds, **rest, **told})
        return metrics

    loop.update = held  # what `execute` calls for every update
    tell = teller([lambda event: notes.append(event.message)])
    training.execute(parts, settings, folder, evaluate=None, tell=tell)


if __name__ == "__main__":
    main()
