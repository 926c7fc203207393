"""The card of a model that a run leaves: what it was made of, how, and what came out, as the
README.md of its folder, which the Hub shows. It names no folder of the machine it was made on.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preftune import __version__, huggingface
from preftune.following import TAKEN
from preftune.parts import Parts
from preftune.reward_model import RewardModel
from preftune.runs import RunFolder

_FIGURES = 3
"""Digits behind the point."""


def text(parts: Parts, folder: RunFolder) -> str:
    """README.md of `model/`.

    Args:
        folder: the run's, whose settings and last evaluation it tells.
    """
    import yaml

    settings = {name: _public(value) for name, value in folder.read_config().items()}
    logged = folder.read("metrics.jsonl")  # a run may have ended before its last step
    steps = int(logged[-1]["step"] if logged else settings["max_steps"])
    front = yaml.safe_dump(_front(parts, settings), sort_keys=False, allow_unicode=True)
    chapters = (
        f"---\n{front}---\n",
        f"# {_title(parts, settings)}\n",
        *_method(parts, settings, steps),
        "## Data\n",
        *_data(parts),
        *_results(folder.read_json("evaluation.json") or {}),
        "## Use\n",
        _use(parts, settings),
        "## Settings\n",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n",
        f"Made with preftune {__version__}.\n",
    )
    return "\n".join(chapters)


def _public(value: Any) -> Any:
    """A setting without the folders of this machine, or the address of a judge."""
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(v) for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("judge:", "http://", "https://")):
        return "judge"
    place, colon, rest = value.partition(":")
    return f"{Path(place).name}{colon}{rest}" if "/" in place and Path(place).exists() else value


def _hub_id(name: str) -> str | None:
    """The model's name on the Hub, if it came from there."""
    if name == huggingface.DEFAULT_MODEL:
        return huggingface.DEFAULT_HUB_ID
    return None if Path(name).exists() or name.count("/") != 1 else name


def _front(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads."""
    scores, data = isinstance(parts.model, RewardModel), parts.config.data
    base = None if parts.config.model != settings.get("model") else _hub_id(parts.config.model)
    on_hub = data is not None and not Path(data).exists() and data.count("/") == 1
    return {
        **({"base_model": base} if base else {}),
        **({"datasets": [data]} if on_hub else {}),
        "library_name": "peft" if parts.model.trunk.has_adapter else "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["preftune", parts.method.name],
    }


def _title(parts: Parts, settings: Mapping[str, Any]) -> str:
    kind = "A reward model" if isinstance(parts.model, RewardModel) else parts.method.name
    return f"{kind} on {settings['model']}"


def _method(parts: Parts, settings: Mapping[str, Any], steps: int) -> Iterator[str]:
    row = parts.method
    if row.summary:
        yield f"{row.summary}\n"
    if row.equation:
        yield f"Loss: `{row.equation}`\n"
    if row.paper:
        yield f"Source: {row.paper}\n"
    if settings.get("label_source"):
        yield f"Who labelled: `{settings['label_source']}`\n"
    yield f"{steps} updates of {settings['batch_size']}, seed {settings['seed']}.\n"


def _data(parts: Parts) -> Iterator[str]:
    for what, source, rows in (
        ("trained on", _taken(parts) or parts.config.data, parts.data),
        ("prompts", parts.config.prompts, parts.prompts if parts.config.prompts else None),
        ("held out", parts.config.eval_data, parts.held_out),
    ):
        if rows is not None:
            yield f"- {what}: {len(rows)} rows ({rows.kind}){_named(source)}"
    yield ""


def _taken(parts: Parts) -> str | None:
    """The run's own copy of data that grew: the file may have changed since."""
    return str(parts.output / TAKEN) if parts.followed is not None else None


def _named(source: str | None) -> str:
    """` of NAME`, with the hash of a file."""
    if source is None:
        return ""
    path = Path(source)
    if not path.is_file():
        return f" of `{_public(source)}`"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return f" of `{path.name}`, SHA-256 `{found}`"


def _results(found: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    if not found:
        return
    yield "## Results\n"
    yield (
        "On held-out rows; 95 % intervals over these rows alone, of one run of one training seed.\n"
    )
    yield "| figure | value | from | to |\n| --- | --- | --- | --- |"
    for name, figure in found.items():
        shown = (figure.get(key) for key in ("value", "low", "high"))
        cells = ("" if v is None else f"{v:.{_FIGURES}f}" for v in shown)
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""


def _use(parts: Parts, settings: Mapping[str, Any]) -> str:
    if isinstance(parts.model, RewardModel):
        return "```\npreftune evaluate --model MODEL --prompts PROMPTS --reward THIS_FOLDER\n```\n"
    if parts.model.trunk.has_adapter:
        return (
            f"A PEFT adapter of `{settings['model']}`. `preftune merge THIS_FOLDER --output "
            "WHOLE` writes the full model.\n"
        )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        'ask = pipeline("text-generation", model="THIS_FOLDER")\n'
        'ask([{"role": "user", "content": "Hello!"}])\n```\n'
    )
