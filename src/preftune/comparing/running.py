"""Executes one job: the ordinary preparation and loop of a run, and its figures prompt by prompt.

Nothing is summed up here: a result holds one number a prompt and answer, so that runs can be paired
by prompt later, whatever was run beside them.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preftune import config as configs
from preftune import counting, held_out, judges, loop, resuming, run_output, training
from preftune.comparing import prompts
from preftune.comparing.costs import CURVE_POINTS
from preftune.comparing.job import RUNS, Job
from preftune.errors import GuardStop, Saved, UserError
from preftune.evaluate import Answers, best_of_n
from preftune.numerics import masked_sum
from preftune.parts import Parts, make_settings, resolved_config
from preftune.preparing import prepare
from preftune.runs import RunFolder

Tell = Callable[[int, int], None]
"""How far a run is: (step, of)."""
TIMED = 4
"""Updates of a timing run, of which the last two are timed: the first ones find out what works."""
POINTS = CURVE_POINTS + 1
"""Evaluations of a run, the one at its end among them."""
SHOWN = 12
"""Answers whose text is kept."""
STOPPED, REFUSED, FAULT = "stopped by a guard", "refused", "failed"
"""Why a run has no figures."""


class Unable(UserError):
    """A run that cannot be begun here, which says nothing of it elsewhere: a model that is not on
    this machine, a device that it has not. No result."""


def run(job: Job, folder: Path, tell: Tell = lambda step, total: None) -> dict[str, Any]:
    """What the job gives, as plain data; where it fails, `failed` says how.

    Args:
        folder: the comparison's.

    Raises:
        Unable: it cannot be begun on this machine.
        Saved, KeyboardInterrupt: it was asked to end; what it did is saved.
    """
    found: dict[str, Any] = {"key": job.key, "kind": job.kind, "entry": job.entry, "seed": job.seed}
    try:
        done = _reference(job, folder) if job.kind == "reference" else _trained(job, folder, tell)
        return found | done
    except (Saved, Unable):
        raise
    except GuardStop as error:
        found["failed"], found["why"] = _first_line(error), STOPPED
    except UserError as error:
        found["failed"], found["why"] = _first_line(error), REFUSED
    except Exception as error:  # the others go on: memory that ran out, a reward that raised
        traceback.print_exc()  # on stderr, or in the worker's log
        found["failed"], found["why"] = f"{type(error).__name__}: {_first_line(error)}", FAULT
    _clear(job, folder)
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:500] or type(error).__name__


def _settings(job: Job, folder: Path) -> dict[str, Any]:
    """The run's settings with the folder's files."""
    files = {"data": prompts.train_file(folder), "prompts": prompts.prompts_file(folder),
             "eval_data": prompts.held_out_file(folder, job.kind)}  # fmt: skip
    found = {name: str(path) for name, path in files.items() if path.is_file()}
    return {**job.settings, **found, "output": str(folder / RUNS / job.key), "resume": True}


@contextmanager
def _beginning(job: Job) -> Iterator[None]:
    """What is wrong before the first update is so with this machine, or with settings of all."""
    try:
        yield
    except UserError as error:
        name = "the untrained model" if job.kind == "reference" else job.entry
        raise Unable(f"{name}: {_first_line(error)}") from error


def _trained(job: Job, folder: Path, tell: Tell) -> dict[str, Any]:
    """Train, then answer the held-out prompts."""
    began = time.perf_counter()
    values = _settings(job, folder)
    output = Path(values["output"])
    with ExitStack() as held:
        with _beginning(job):
            held.enter_context(RunFolder.held(output))
            _take_up(output, values)
            parts = prepare(configs.load(resuming.resumed(values)), overrides=job.overrides)
            settings = make_settings(parts)
            if job.curve:
                settings = replace(settings, eval_every=-(-settings.max_steps // POINTS))
            run_folder = resuming.open_folder(parts, resolved_config(parts, settings))
        run_output.keep_answers(parts, run_folder)
        watch = _Watch(job, parts, run_folder, settings.max_steps, tell)
        watch.ready = time.perf_counter()
        training.execute(
            parts, settings, run_folder, evaluate=watch.evaluate, tell=watch.told,
            watch=watch.counted, keep_model=job.keep_model,
        )  # fmt: skip
        trained = time.perf_counter()
        said = _answered(job, parts, settings.max_steps) if job.prompts else {}
        ended = time.perf_counter()
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return {
        "rate": float(settings.learning_rate),  # pyright: ignore[reportArgumentType]
        "updates": max(watch.counts),
        "asked": settings.max_steps,
        "curve": watch.curve(),
        **said,
        "notes": parts.notes,
        "seconds": {
            "ready": watch.ready - began, "cache": watch.start - watch.ready,
            "training": trained - watch.start, "answers": ended - trained, "whole": ended - began,
        },
        **_facts(parts, folder),
    }  # fmt: skip


def _take_up(output: Path, values: Mapping[str, Any]) -> None:
    """Make a run's folder one that can be gone on with here."""
    if (output / "model").is_dir():  # it ended, but its result was not kept
        shutil.rmtree(output / "model")
    if (output / "config.yaml").is_file():  # begun where the comparison's folder has another path
        begun = RunFolder(output).read_config()
        own = {name: values[name] for name in ("data", "prompts", "eval_data") if name in values}
        RunFolder(output).write_config({**begun, **own})


def _answered(job: Job, parts: Parts, step: int) -> dict[str, Any]:
    """The trained model's answers, as numbers and some of them as text."""
    answers = held_out.held_out_answers(parts, parts.policy, job.prompts, job.samples)
    found = per_prompt(parts, answers)
    broken = [n for n, rows in found.items() if n != "row" and not np.isfinite(rows).all()]
    if broken:
        raise GuardStop(f"{' and '.join(broken)} of the trained model's answers are not finite")
    return {
        "answers": found,
        "texts": held_out.sample_rows(parts, answers, step, SHOWN),
    }


class _Watch:
    """What is noted of a run on its way."""

    def __init__(self, job: Job, parts: Parts, folder: RunFolder, total: int, tell: Tell) -> None:
        self.job, self.parts, self.folder, self.total, self.tell = job, parts, folder, total, tell
        self.ready = self.start = 0.0
        self.counts = {int(row.pop("step")): row for row in folder.read("counts.jsonl")}
        self.counts.setdefault(0, dict.fromkeys(counting.COUNTS, 0.0))

    def told(self, kind: str, **details: Any) -> None:
        if kind == "start":
            self.start = time.perf_counter()
        if kind in ("start", "step"):
            self.tell(int(details["step"]), self.total)

    def evaluate(self, step: int, last: bool) -> dict[str, Any]:
        """Figures on the way; those of the end are measured apart, on all prompts."""
        if not self.job.curve or last or step == 0:
            return {}
        answers = held_out.held_out_answers(self.parts, self.parts.policy, self.job.curve)
        found = per_prompt(self.parts, answers)
        self.folder.append("curve.jsonl", [{"step": step, "answers": found}])
        return {f"eval_{name}": _mean(values) for name, values in found.items() if name != "row"}

    def counted(self, state: loop.State) -> None:
        self.counts[state.step] = counting.counts(state)
        self.folder.append("counts.jsonl", [{"step": state.step, **self.counts[state.step]}])

    def curve(self) -> list[dict[str, Any]]:
        """What was spent at each step, and the answers at those that were evaluated."""
        seconds = {r["step"]: r.get("seconds", 0.0) for r in self.folder.read("metrics.jsonl")}
        said = {r["step"]: r["answers"] for r in self.folder.read("curve.jsonl")}
        last = max(self.counts)
        return [
            {"step": step, "seconds": seconds.get(step, 0.0), **counts,
             **({"answers": said[step]} if step in said and step < last else {})}
            for step, counts in sorted(self.counts.items())
        ]  # fmt: skip


def _reference(job: Job, folder: Path) -> dict[str, Any]:
    """What the untrained model answers, several times to each prompt, and its best of n."""
    began = time.perf_counter()
    values = {**_settings(job, folder), "resume": False}
    with _beginning(job):
        parts = prepare(configs.load(values), overrides=job.overrides)
    policy = parts.reference or parts.policy
    # its KL to itself is not asked for
    answers = held_out.held_out_answers(
        replace(parts, reference=None), policy, job.prompts, job.samples
    )
    best, notes = best_of_n(answers, None)
    names = list(answers.rewards)
    return {
        "answers": per_prompt(parts, answers),
        "texts": held_out.sample_rows(parts, answers, 0, SHOWN),
        "best_of_n": {
            role: _sizes(best, f":{own}" if place else "")
            for place, (role, own) in enumerate(zip(("reward", "gold"), names, strict=False))
        },
        "notes": notes,
        "seconds": {"whole": time.perf_counter() - began},
        **_facts(parts, folder),
    }  # fmt: skip


def _sizes(found: Mapping[str, Any], ending: str) -> dict[str, Any]:
    """Best-of-n by n, of the figures with this ending."""
    cut = {k.removeprefix("best_of_").removesuffix(ending): k for k in found if k.endswith(ending)}
    return {n: found[name] for n, name in cut.items() if n.isdigit()}


def per_prompt(parts: Parts, answers: Answers) -> dict[str, list[Any]]:
    """[N][K] numbers by name, and the rows of the held-out file that they are of."""
    found: dict[str, list[Any]] = {"row": answers.samples.row.tolist()}
    roles = zip(("reward", "gold"), answers.rewards.values(), strict=False)
    found |= {role: values.double().tolist() for role, values in roles}
    if answers.kl is not None:
        found["kl"] = answers.kl.tolist()
    if answers.own and answers.samples.logp is not None:
        logp = masked_sum(answers.samples.logp, answers.samples.mask)
        found["entropy"] = (-logp.double()).tolist()
    found["length"] = answers.lengths().double().tolist()
    found["no_end"] = (~answers.samples.finished).double().tolist()
    return found


def _mean(values: list[list[float]]) -> float:
    flat = [x for group in values for x in group]
    return sum(flat) / len(flat)


def _facts(parts: Parts, folder: Path) -> Mapping[str, Any]:
    """What all jobs of a comparison agree on."""
    asked = RunFolder(folder).read_config().get("settings", {})
    own = parts.config.label_source or judges.label_source(parts.reward, asked.get("data"))
    return {
        "facts": {
            "parameters": sum(p.numel() for p in parts.model.model.parameters()),
            "default_rate": parts.method.defaults.get("learning_rate", 1e-6),
            "label_source": own,
            "reward": None if parts.reward is None else parts.reward.name,
            "gold": None if parts.gold is None else parts.gold.name,
            "held_out": 0 if parts.held_out is None else len(parts.held_out),
        }
    }  # fmt: skip


def _clear(job: Job, folder: Path) -> None:
    """A run that failed keeps its figures and no weights."""
    for name in ("checkpoints", "model", ".tmp-model"):
        shutil.rmtree(folder / RUNS / job.key / name, ignore_errors=True)
