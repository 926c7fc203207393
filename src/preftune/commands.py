"""What the commands do, as functions that return plain data; the command line only prints it."""

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from preftune import automatic, building, loading, meanings, methods, spec
from preftune.config import Config
from preftune.data import Renderer, Rows, check_end_token, inspect_rows, trivial_rules
from preftune.errors import UserError
from preftune.evaluate import answer
from preftune.likelihoods import response_logp
from preftune.numerics import masked_sum
from preftune.policies.transformer import Transformer

Tick = Callable[[int, int], None]
RULE_ROWS = 64
"""Rows whose reference log-probs `inspect` computes."""


def method_table() -> list[dict[str, Any]]:
    """The table of methods with its axes, which are computed from the rows."""
    return [
        {
            "name": m.name,
            "terms": [_in_words(t) for t in spec.to_data(m)],
            **m.axes(),
            "paper": m.paper,
            "equation": m.equation,
        }
        for m in methods.table().values()
    ]


def _in_words(term: dict[str, Any]) -> str:
    """One term: `0.005 x reverse_kl < unlabelled < on_policy(samples_per_prompt=2)`."""

    def part(data: dict[str, Any]) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in data.items() if k != "name" and v is not None)
        return f"{data['name']}({shown})" if shown else data["name"]

    weight = "" if term["weight"] == 1 else f"{term['weight']:g} x "
    settings = ", ".join(f"{k}={v}" for k, v in term["settings"].items())
    objective = f"{term['objective']}({settings})" if settings else term["objective"]
    return f"{weight}{objective} < {part(term['labeller'])} < {part(term['source'])}"


def method_row(name: str) -> dict[str, Any]:
    """One row in full, with its settings."""
    row = methods.get(name)
    (entry,) = [e for e in method_table() if e["name"] == name]
    return {
        **entry,
        "summary": row.summary,
        "note": row.note,
        "settings": spec.to_data(row),
        "meanings": meanings.of_row(row),
        "reference_update": row.reference_update,
        "defaults": dict(row.defaults),
    }


def sample(
    config: Config, versus: str | None, tick: Tick = lambda done, total: None
) -> list[dict[str, Any]]:
    """Responses with log-probs, one dict each; with `versus`, another model's beside them."""
    policy, tokenizer = loading.model_of(config, config.model)
    rows, renderer = loading.prompts_of(config, policy, tokenizer)
    sides = [_drawn(config, policy, rows, renderer, tick)]
    if versus is not None:
        other, other_tokenizer = loading.model_of(config, versus)
        other_rows, other_renderer = loading.prompts_of(config, other, other_tokenizer)
        sides.append(_drawn(config, other, other_rows, other_renderer, tick))
    if versus is None:
        return sides[0]
    return [{**mine, "versus": other} for mine, other in zip(*sides, strict=True)]


def _drawn(
    config: Config, policy: Transformer, rows: Rows, renderer: Renderer, tick: Tick
) -> list[dict[str, Any]]:
    drawn = answer(
        policy,
        None,
        rows,
        {},
        samples_per_prompt=config.samples_per_prompt or 1,
        seed=config.seed,
        progress=tick,
    )
    assert drawn.samples.logp is not None, "a sampler gives log-probs"
    logp = masked_sum(drawn.samples.logp, drawn.samples.mask)
    lengths = drawn.lengths()
    return [
        {
            "row": i,
            "prompt": rows.texts[i],
            "response": renderer.decode(drawn.samples.tokens[i, k][: int(lengths[i, k])].tolist()),
            "logp": float(logp[i, k]),
            "tokens": int(lengths[i, k]),
            "finished": bool(drawn.samples.finished[i, k]),
        }
        for i in range(len(rows))
        for k in range(lengths.shape[-1])
    ]


def inspect(
    config: Config, count: int = 3, tick: Tick = lambda done, total: None
) -> dict[str, Any]:
    """Template, tokens, loss mask, ends, truncation and trivial rules of real rows.

    Raises:
        UserError: the end token is not in the loss mask.
    """
    if config.data is None:
        raise UserError("data: give --data a file or a Hub id.")
    policy, tokenizer = loading.model_of(config, config.model)
    renderer = building.make_renderer(config, tokenizer, policy)
    rows, report, rejected = loading.load_rows(
        config.data, config, renderer, want="any", context=building.context_of(policy.model)
    )
    facts = inspect_rows(rows, renderer, report=report, count=count)
    facts["refused"] = len(rejected)
    if rows.kind == "pairs":
        few = rows.select(range(min(RULE_ROWS, len(rows))))
        scores = []
        for start in range(0, len(few), 8):
            part = few.samples(range(start, min(start + 8, len(few))))
            logp = response_logp(policy, part, automatic.CPU_ROW_BUDGET)
            scores += [(float(c), float(r)) for c, r in logp]
            tick(len(scores), len(few))
        rules = trivial_rules(few, reference_scores=scores)
        facts["higher_reference_logp"] = {"share": rules["higher_reference_logp"], "rows": len(few)}
    check_end_token(rows, renderer.end_ids)
    return facts


def environment() -> dict[str, Any]:
    """Versions and devices, for a bug report."""
    names = (
        "preftune", "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft",
        "safetensors", "pydantic", "tyro", "rich", "plotly", "numpy", "trl", "vllm",
    )  # fmt: skip
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "mps": torch.backends.mps.is_available(),
        "versions": versions,
    }
