"""preftune compare: several methods at the same budget, on one page."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, assigned, print_json
from preftune.comparing.job import OF_MACHINE
from preftune.errors import UserError
from preftune.huggingface import DEFAULT_MODEL
from preftune.runs import RunFolder, unnamed

BUDGETS = ("budget", "budget_per_run", "steps", "samples")
DEFAULT_BUDGET = "10m"
DEFAULT_SEEDS = 3
_TEXT = (
    "Train several methods at the same budget with several seeds, each at a learning rate chosen "
    "on held-out prompts, and say which one is better and by how much."
)


def compare(args: Sequence[str]) -> int:
    """The command."""
    began = time.time()
    from preftune import flags, inspecting
    from preftune.progress import Progress, stderr, working

    given, own = flags.parse("compare", _TEXT, flags.COMPARE, args, _flags())
    console = stderr()
    resume = bool(given.pop("resume", False))
    if resume and "output" not in given:
        raise UserError("--resume: say which folder with --output.")
    folder = Path(str(given.pop("output", None) or unnamed("compare")))
    with working(console, "loading"):
        from preftune.comparing import compare as comparing
        from preftune.comparing import fleet
    request = _request(given, own, folder, resume)
    model = str(request.settings.get("model", DEFAULT_MODEL))
    usual = fleet.default_workers(model, len(request.entries) * request.seeds)
    workers, threads = _workers(own, request.settings, usual)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        with Progress(console) as bar:
            found = comparing.compare(
                request, folder, workers=workers, threads=threads, began=began, resume=resume,
                stage=_stage(bar), say=say,
            )  # fmt: skip
    except KeyboardInterrupt:
        say(f"saved: preftune compare --output {folder} --resume goes on from there")
        raise
    say(f"page: {folder / 'report.html'}")
    if own["json"]:
        print_json(found)
    else:
        inspecting.table("95 % intervals over seeds and held-out prompts", *_cells(found))
        print("\n".join([*found["verdict"], *found["cuts"], *found["notes"]]))
        for row in found["failed"]:
            print(f"failed: {row['method']}, {row['what']}: {row['message']}")
    return _code(found)


def _flags() -> list[Any]:
    import tyro

    many = tyro.conf.UseAppendAction[tuple[str, ...]]
    rates = (
        "learning rates that each method is tried at, with commas (default: three about a centre)"
    )
    return [
        ("methods", str | None, None, "rows of the table or names under methods: of --config, "
         "with commas"),
        ("budget", str | None, None, f"wall time of the whole command: 90s, 10m, 2h (default, "
         f"unless another budget is given: {DEFAULT_BUDGET})"),
        ("budget_per_run", str | None, None, "wall time of each run"),
        ("steps", int | None, None, "updates of each run"),
        ("samples", int | None, None, "responses that each run trains on"),
        ("seeds", int | None, None, f"training seeds a method (default: {DEFAULT_SEEDS})"),
        ("rates", str | None, None, rates),
        ("workers", int | None, None, "processes; 0: this one alone (default: one a GPU, or one a "
         "core as far as memory goes)"),
        ("keep_models", bool, False, "keep the models of the final runs"),
        ("config", str | None, None, "YAML file of settings, with those of a method under "
         "methods: NAME; flags win"),
        ("set", many, (), "PATH=VALUE for all methods, METHOD.PATH=VALUE for one, e.g. "
         "hypo.terms.1.weight=0.02; may be repeated"),
        JSON,
    ]  # fmt: skip


def _request(given: dict[str, Any], own: Mapping[str, Any], folder: Path, resume: bool) -> Any:
    """What is asked: of the flags, or of the folder that is gone on with."""
    from preftune.comparing.request import request_of

    if not (resume and (folder / "config.yaml").is_file()):
        return _asked(given, own)
    asked = request_of(RunFolder(folder).read_config(), folder)
    common, per_method, overrides = _given(given, own)
    here = {k: common.pop(k) for k in OF_MACHINE if k in common}
    differs = [
        *_other_settings(asked, common), *_other_methods(asked, own, per_method, overrides),
        *_other_size(asked, own),
    ]  # fmt: skip
    if differs:
        raise UserError(
            f"resume '{folder}': {', '.join(differs)} differ{'s' * (len(differs) == 1)} from what "
            "it was begun with. Leave it out, or give another folder."
        )
    return replace(asked, settings={**asked.settings, **here})


def _given(
    given: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Settings of all, those of each method in the file, and what --set changes besides."""
    from preftune.comparing.entries import SHARED

    common, per_method = _file(own["config"])
    overrides = dict(map(assigned, own["set"]))
    common |= {**given, **{k: overrides.pop(k) for k in SHARED if k in overrides}}
    return common, per_method, overrides


def _other_settings(asked: Any, common: dict[str, Any]) -> list[str]:
    """Of the settings of all, those that are not what they were."""
    from preftune import config as configs

    if asked.notes:  # it was begun with a gold reward alone
        _one_reward(common)
    before, now = (configs.load({**asked.settings, **more}) for more in ({}, common))
    return [k for k in common if getattr(before, k) != getattr(now, k)]


def _other_methods(
    asked: Any, own: Mapping[str, Any], per_method: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Whether the methods, or settings of one, are not what they were."""
    from preftune.comparing import entries

    before = {e.name: e for e in asked.entries}
    names = _names(own) or list(per_method) or list(before)
    if set(names) != set(before):
        return ["methods"]
    if not (per_method or overrides):
        return []
    values = {n: {**e.settings, **per_method.get(n, {})} for n, e in before.items()}
    now = entries.make(list(before), asked.settings, values, overrides)
    changed = [
        e.name for e in now
        if e.settings != before[e.name].settings
        or {**before[e.name].overrides, **e.overrides} != before[e.name].overrides
    ]  # fmt: skip
    return [f"settings of {name}" for name in changed]


def _other_size(asked: Any, own: Mapping[str, Any]) -> list[str]:
    """Which of budget, seeds, rates, and whether models are kept, are not what they were."""
    now: dict[str, Any] = {}
    if any(own[name] is not None for name in BUDGETS):
        now |= dict.fromkeys(("budget", "per_run", "steps", "samples")) | _budget(own)
    if own["seeds"] is not None:
        now["seeds"] = own["seeds"]
    if own["rates"] is not None:
        now["rates"] = _rates(own["rates"])
    if own["keep_models"]:
        now["keep_models"] = True
    flags = {"per_run": "budget_per_run"}
    return [flags.get(k, k) for k, v in now.items() if getattr(asked, k) != v]


def _names(own: Mapping[str, Any]) -> list[str]:
    return [n.strip() for n in (own["methods"] or "").split(",") if n.strip()]


def _asked(given: dict[str, Any], own: Mapping[str, Any]) -> Any:
    from preftune.comparing import entries, plan
    from preftune.comparing.request import Request

    common, per_method, overrides = _given(given, own)
    notes = _one_reward(common)
    _check(common)
    found = entries.make(_names(own), common, per_method, overrides)
    seeds = DEFAULT_SEEDS if own["seeds"] is None else own["seeds"]
    if seeds < plan.LEAST_SEEDS:
        raise UserError(
            f"--seeds: is {seeds}. Give {plan.LEAST_SEEDS} or more: one seed cannot tell a method "
            "from luck."
        )
    return Request(
        entries=found, settings=common, seeds=seeds, rates=_rates(own["rates"]),
        keep_models=own["keep_models"], notes=notes, **_budget(own),
    )  # fmt: skip


def _file(path: str | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of all, and of each method, from a YAML file."""
    from preftune import config as configs

    if path is None:
        return {}, {}
    values = configs.read_yaml(Path(path), besides=("methods",))
    methods = values.pop("methods", None) or {}
    if not isinstance(methods, dict) or not all(
        isinstance(v or {}, dict) for v in methods.values()
    ):
        raise UserError(
            f"config '{path}': methods is a mapping of names to settings, as hypo: {{beta: 0.05}}."
        )
    for name, own in methods.items():
        configs.check_keys(own or {}, f"config '{path}', methods.{name}")
    return values, {str(name): own or {} for name, own in methods.items()}


def _one_reward(common: dict[str, Any]) -> list[str]:
    """A gold reward alone is the reward."""
    if common.get("reward") is not None or common.get("gold") is None:
        return []
    common["reward"] = common.pop("gold")
    return ["There is only one reward: what was given as --gold is used as --reward, too."]


def _check(common: Mapping[str, Any]) -> None:
    from preftune import config as configs

    settings = configs.load(common)
    if settings.reward is None:
        raise UserError(
            "reward: methods are compared by one. Give --reward, e.g. --reward length:within=20, "
            "a model folder or file.py:function."
        )
    if settings.data is None and settings.prompts is None:
        raise UserError("data: give --data a file or a Hub id.")


def _rates(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise UserError(f"--rates '{text}': must be numbers, as 1e-5,3e-5.") from None
    if not found or not all(0 < rate < 1 for rate in found):
        raise UserError(f"--rates '{text}': must be numbers between 0 and 1, as 1e-5,3e-5.")
    return found


def _budget(own: Mapping[str, Any]) -> dict[str, Any]:
    """One of the four, or the default."""
    from preftune.comparing.costs import parse_time

    asked = [name for name in BUDGETS if own[name] is not None]
    if len(asked) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise UserError(f"{both}: give one of them, the budget is the same for all methods.")
    if not asked:
        return {"budget": parse_time(DEFAULT_BUDGET)}
    (name,) = asked
    if name in ("steps", "samples"):
        if own[name] < 1:
            raise UserError(f"--{name}: is {own[name]}. Give 1 or more.")
        return {name: own[name]}
    seconds = parse_time(own[name], f"--{name.replace('_', '-')}")
    return {"budget" if name == "budget" else "per_run": seconds}


def _workers(
    own: Mapping[str, Any], settings: Mapping[str, Any], usual: tuple[int, int]
) -> tuple[int, int]:
    """Processes, and threads of each."""
    workers, threads = usual
    if own["workers"] is not None:
        if own["workers"] < 0:
            raise UserError(f"--workers: is {own['workers']}. Give 0 or more.")
        workers, threads = own["workers"], max(1, (os.cpu_count() or 1) // max(1, own["workers"]))
    return workers, int(settings.get("threads") or threads)


def _stage(bar: Any) -> Callable[[str], Callable[[int, int, str], None]]:
    """Progress by stages: runs done, and what is running."""

    def stage(name: str) -> Callable[[int, int, str], None]:
        shown = -1

        def tick(done: int, total: int, said: str) -> None:
            nonlocal shown
            if shown < 0:
                bar.begin(name, total)
            bar.advance(done, said)
            if done != shown and not bar.console.is_terminal:
                bar.console.print(f"{name} {done}/{total}", markup=False, highlight=False)
            shown = done

        return tick

    return stage


def _cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of the terminal."""
    from preftune.comparing.wording import interval, number, ranked

    by = found["judged_by"]
    what = "gold reward" if by == "gold" else "reward"
    names = ["method", what, "gain over the untrained", "KL, nats", "rate", "updates", "runs"]
    rows = []
    for m in ranked(found):
        shown = [
            f"{number(e['value'])} {interval(e)}" if e else "–"
            for e in (m["figures"][by], m["gains"].get(by), m["figures"].get("kl"))
        ]
        runs = f"{len(m['runs'])} of {m['asked']}"
        updates = "–".join(map(str, sorted({min(m["updates"]), max(m["updates"])})))
        rows.append([m["name"], *shown, f"{m['rate']:.2g}", updates, runs])
    return names, rows


def _code(found: Mapping[str, Any]) -> int:
    """0 where something is compared; otherwise 3 where guards stopped the runs, else 1."""
    from preftune.comparing.running import STOPPED

    if sum(bool(m["figures"]) for m in found["methods"]) > 1:
        return 0
    return 3 if any(row.get("why") == STOPPED for row in found["failed"]) else 1
