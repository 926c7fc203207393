"""The papers' critical path as one command: imitate, learn a reward from one half of the
preferences, optimise it by several rows, judge them by a reward learned from the other half.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from preftune import durable, training
from preftune.config import Config
from preftune.data import load_examples
from preftune.errors import UserError
from preftune.events import Callback
from preftune.numerics import permutation, stream_key
from preftune.report import write_report
from preftune.runs import RunFolder

Say = Callable[[str], None]
HELD_OUT = 64
"""Prompts that nothing is trained on, where no file of them is given."""
LEAST = 16
"""Rows of a half."""
NOTE = (
    "The reference was first shown the chosen responses of one half of the pairs, which the reward "
    "(the proxy) was learned from, too. The gold reward was learned from the other half, of other "
    "prompts: nothing was trained or chosen by it. Both are reward models; where they share a "
    "mistake, gold does not show it. One training seed."
)


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Files of rows."""

    train: Path
    gold: Path
    held_out: Path


def run(
    settings: Config,
    output: Path,
    *,
    say: Say = lambda text: None,
    follow: Callback = lambda event: None,
) -> Path:
    """All of it, or what is missing of it.

    Args:
        settings: what is given here wins over `pipeline.yaml`; `data` and `eval_data` by default
            are those that come with preftune.
        output: a folder for one run folder a stage; stages that are finished are not run again.
        say: told of each stage.
        follow: called with the events of every run.

    Returns:
        the page.

    Raises:
        UserError: data that cannot be used, or too few.
    """
    plan = _plan()
    given = settings.model_dump(exclude_unset=True, exclude={"output", "resume"})
    own = {k: v for k, v in given.items() if k not in ("data", "eval_data", "model")}
    start = given.get("model", plan["common"]["model"])
    halves = _halves(given, output / "data", int(own.get("seed", plan["common"]["seed"])))

    def stage(name: str, model: str, **more: Any) -> Path:
        say(name)
        overrides = more.pop("set", None)
        config = {**plan["common"], **more, **own, "model": model, "resume": True}
        config["output"] = str(output / name)
        training.train(config, overrides=overrides, callbacks=[follow])
        return output / name

    sft = stage("sft", start, data=str(halves.train), eval_fraction=0.0, **plan["sft"])
    reference = str(sft / "model")
    judged = {
        name: str(stage(name, reference, data=str(rows), **plan["scorers"]) / "model")
        for name, rows in (("reward", halves.train), ("gold", halves.gold))
    }
    files = {"data": str(halves.train), "eval_data": str(halves.held_out)}
    runs = [
        stage(name, reference, method=name, **files, **judged, **how)
        for name, how in plan["methods"].items()
    ]
    links = {f"{n}/report.html": text for n, text in _STAGES.items()}
    page = output / "report.html"
    return write_report(runs, page, title="preftune pipeline", note=NOTE, links=links)


_STAGES = {
    "sft": "Imitation: where the reference comes from", "reward": "The reward model",
    "gold": "The gold reward model",
}  # fmt: skip


def _plan() -> Mapping[str, Any]:
    import yaml

    text = resources.files("preftune").joinpath("pipeline.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def _halves(given: Mapping[str, Any], folder: Path, seed: int) -> Halves:
    """The pairs, cut in two by whole prompts, and prompts apart from both; made once."""
    found = Halves(**{name: folder / f"{name}.jsonl" for name in ("train", "gold", "held_out")})
    if all(path.is_file() for path in vars(found).values()):
        return found
    with resources.as_file(resources.files("preftune.data") / "default") as shipped:
        data = given.get("data") or str(shipped / "pairs.jsonl")
        own = None if "data" in given else str(shipped / "heldout.jsonl")
        apart = given.get("eval_data", own)
        pairs = _rows(data, "pairs")
        held_out = None if apart is None else _rows(apart, "prompts")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in pairs:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    listed = list(by_prompt)
    prompts = [listed[i] for i in permutation(stream_key(seed, "halves"), 0, len(listed)).tolist()]
    if held_out is None:
        count = min(HELD_OUT, len(prompts) // 4)
        held_out = [{"prompt": json.loads(p)} for p in prompts[:count]]
        prompts = prompts[count:]
    middle = len(prompts) // 2
    parts = {"train": prompts[:middle], "gold": prompts[middle:]}
    rows = {name: [r for p in own for r in by_prompt[p]] for name, own in parts.items()}
    if min(map(len, rows.values())) < LEAST or not held_out:
        raise UserError(
            f"data: {len(pairs)} pairs of {len(by_prompt)} prompts are too few to learn two "
            f"rewards from. Give at least {2 * LEAST} pairs of as many prompts."
        )
    for name, own in {**rows, "held_out": held_out}.items():
        durable.write_rows(getattr(found, name), own)
    return found


def _rows(source: str, want: str) -> list[dict[str, Any]]:
    """Rows of a file, those that cannot be used left out."""
    examples = load_examples(source, want=want).examples
    if want == "prompts":
        return [{"prompt": example.prompt} for example in examples]
    return [replace(example, columns={}).as_row() for example in examples]


def evaluations(output: Path) -> dict[str, dict[str, Any]]:
    """What was found of each row, by its name."""
    names = _plan()["methods"]
    return {name: RunFolder(output / name).read_json("evaluation.json") for name in names}
