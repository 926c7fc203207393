"""The papers' critical path as one command: imitate, learn a reward from one half of the
preferences, optimise it by several rows, judge them by a reward learned from the other half.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from preftune import durable, fingerprint, training
from preftune.config import Config
from preftune.data import check_bad_rows, load_examples
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
CUT = "cut.json"
"""Beside the halves: what they were cut from."""
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
        UserError: data that cannot be used, too few, or others than the folder was begun with.
    """
    plan = _plan()
    given = settings.model_dump(exclude_unset=True, exclude={"output", "resume"})
    of_the_cut = ("data", "eval_data", "max_rows", "model")
    own = {k: v for k, v in given.items() if k not in of_the_cut}
    start = given.get("model", plan["common"]["model"])
    seed = int(own.get("seed", plan["common"]["seed"]))
    halves = _halves(settings, output, seed)

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


def _halves(settings: Config, output: Path, seed: int) -> Halves:
    """The pairs, cut in two by whole prompts, and prompts apart from both; made once.

    Raises:
        UserError: those that are there were cut from something else.
    """
    folder = output / "data"
    found = Halves(**{name: folder / f"{name}.jsonl" for name in ("train", "gold", "held_out")})
    pairs, apart = _read(settings)
    source = {
        "data": settings.data, "eval_data": settings.eval_data, "max_rows": settings.max_rows,
        "seed": seed, "pairs": _hash(pairs), "prompts": _hash(apart),
    }  # fmt: skip
    if _was_cut(source, output) and all(path.is_file() for path in vars(found).values()):
        return found
    for name, rows in _cut(pairs, apart, seed).items():
        path, text = getattr(found, name), "".join(json.dumps(row) + "\n" for row in rows)
        if path.is_file() and path.read_text("utf-8") != text:  # of a version that kept no source
            raise _other_data(output, "data, seed or max_rows")
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, text)
    durable.write_text(folder / CUT, json.dumps(source) + "\n")  # last: all of them are there
    return found


def _was_cut(source: Mapping[str, Any], output: Path) -> bool:
    """Whether the halves stand there already.

    Raises:
        UserError: they were cut from something else.
    """
    path = output / "data" / CUT
    if not path.is_file():
        return False
    before = json.loads(path.read_text("utf-8"))
    made_of = ("seed", "pairs", "prompts")  # a file may have been moved, and more rows allowed
    if all(before[name] == source[name] for name in made_of):
        return True
    shown = ("data", "eval_data", "max_rows", "seed")
    changes = [f"{k}: {before[k]} became {source[k]}" for k in shown if before[k] != source[k]]
    raise _other_data(output, "; ".join(changes) or "the rows of the data are others now")


def _other_data(output: Path, what: str) -> UserError:
    return UserError(
        f"output '{output}': was begun with other data ({what}), and its finished stages are of "
        "those. Give another --output, or what it was begun with."
    )


def _hash(rows: list[dict[str, Any]] | None) -> str:
    return fingerprint.digest(fingerprint.as_json(rows))


def _read(settings: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The pairs, and the held-out prompts where there are some of their own."""
    with resources.as_file(resources.files("preftune.data") / "default") as shipped:
        data = settings.data or str(shipped / "pairs.jsonl")
        own = None if settings.data else str(shipped / "heldout.jsonl")
        apart = settings.eval_data or own
        pairs = _rows(data, "pairs", settings)
        return pairs, None if apart is None else _rows(apart, "prompts", settings)


def _cut(
    pairs: list[dict[str, Any]], held_out: list[dict[str, Any]] | None, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their file."""
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
    return {**rows, "held_out": held_out}


def _rows(source: str, want: str, settings: Config) -> list[dict[str, Any]]:
    """Rows of a file; those that cannot be used are left out, up to the share `bad_rows`."""
    loaded = load_examples(
        source, want=want, max_rows=settings.max_rows if want == "pairs" else None
    )
    check_bad_rows(loaded, settings.bad_rows)
    if want == "prompts":
        return [{"prompt": example.prompt} for example in loaded.examples]
    return [replace(example, columns={}).as_row() for example in loaded.examples]


def evaluations(output: Path) -> dict[str, dict[str, Any]]:
    """What was found of each row, by its name."""
    names = _plan()["methods"]
    return {name: RunFolder(output / name).read_json("evaluation.json") for name in names}
