"""The language-model claims of the two papers on a GPU, in pieces of minutes.

    python benchmarks/study_gpu.py all --output DIR --limit 540    again and again, until done
    python benchmarks/study_gpu.py prepare --output DIR --seed 0
    python benchmarks/study_gpu.py run --output DIR --problem min --method dpo --seed 0 --rate 1e-5
    python benchmarks/study_gpu.py table --output DIR

A piece is a whole run: a problem, a method, a seed and a learning rate (with DPO's beta and HyPO's
weight where they are varied). Each is one JSON file under DIR/pieces, written when it is finished;
those that are there are not run again, so DIR may be carried from machine to machine: with the
pieces (kilobytes) nothing is lost, with DIR/seed-S/reference (33 MB in bfloat16, in files of at
most 15 MB) that seed's reference is not trained anew. Settings are fixed by the first call.

Problems (arXiv 2404.14367): `min`, shorter is better; `mode`, nearer to the reference's most
frequent length; `skew`, as min, with pairs cut to exponential lengths. The reference is a
transformer trained here on a generated language of known lengths, or `--model FOLDER`; pairs are
its own answers ranked by the true reward; fresh samples are judged by a reward model of the run's
own pairs (`--reward true`: by the length). It needs what `gpu.py` needs, and the library beside it.

Progress goes to stderr; stdout has one table, then one JSON line a method. The exit status is 1
where a check or a piece failed, after everything is printed; 2 where the call cannot be done.
`all --device cpu --tiny` tries everything out on a model of a hundred thousand weights.
"""

import argparse
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import study_table
import torch
from gpu import GIB, MIB, Check, environment, hardware
from study_ground import AT_START, Ground, checks
from study_parts import PROBLEMS, Log, OutOfTime, Study, facts_of, opened, run_loop

from preftune import durable, loop, methods
from preftune.errors import GuardStop, UserError
from preftune.method import Method
from preftune.sampling import local
from preftune.sampling.decoding import Decoding

METHODS = ("pref_ft", "dpo", "ipo", "hypo", "on_policy_dpo", "on_policy_best_of_n", "ppo", "rloo")
RATES: dict[str, tuple[float, ...]] = dict.fromkeys(
    ("pref_ft", "best_of_n", "on_policy_best_of_n", "rwr", "offline_rwr"), (3e-5, 1e-4)
)
"""Learning rates of the methods that imitate."""
OTHERS = (1e-5, 3e-5)
"""Of the others. Both suit a model of tens of millions of weights; larger ones take less."""
ROWS_AT_ONCE = 256
"""Sequences that a GPU decodes together; the library's own bound is a processor's."""
MOST_FAILURES = 3
"""Pieces that may fail before a call gives up: the fault is likely everyone's."""
UNKNOWN = 60.0
"""Seconds that a GPU is taken to need for a piece, a reference or a reward model, while none is
known."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece to be run."""

    problem: str
    method: str
    seed: int
    rate: float
    beta: float | None = None
    """DPO's; None: as the row comes."""
    weight: float | None = None
    """HyPO's; None: as the row comes."""

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.problem, self.method, f"rate{self.rate:g}"]
        parts += [f"beta{self.beta:g}"] if self.beta is not None else []
        parts += [f"weight{self.weight:g}"] if self.weight is not None else []
        return "-".join([*parts, f"seed{self.seed}"])

    def row(self) -> Method:
        """The method's row with its settings."""
        given = {"beta": self.beta, "weight": self.weight}
        row = methods.get(self.method)
        return methods.resolve(
            methods.configure(row, {k: v for k, v in given.items() if v is not None})
        )


@dataclass
class Bench:
    """Where a study is run, and until when."""

    folder: Path
    study: Study
    device: torch.device
    limit: float
    began: float = field(default_factory=time.monotonic)
    known: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    """Of the device."""
    begun: list[Check] = field(default_factory=list)
    """Of the pieces that were run, each its own."""
    failures: list[str] = field(default_factory=list)
    ground: Ground | None = None
    """Of the last seed and problem."""

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.began)

    @property
    def fast(self) -> bool:
        """On a GPU."""
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        """For the reader."""
        print(text, file=sys.stderr, flush=True)

    def path(self, job: Job) -> Path:
        """Of a piece."""
        return self.folder / "pieces" / f"{job.name}.json"

    def stand(self, seed: int, problem: str) -> Ground:
        """What pieces stand on; the seed's samples are drawn once for all of its problems."""
        before = self.ground
        if before is not None and (before.seed, before.problem) == (seed, problem):
            return before
        self.ground = Ground(
            study=self.study, seed=seed, problem=problem, folder=self.folder, device=self.device,
            stop=lambda: self.left < 0, say=self.say,
        )  # fmt: skip
        if before is not None and before.seed == seed:
            self.ground.take_over(before)
        return self.ground

    def check(self, ground: Ground) -> None:
        """Once a call, before anything is believed."""
        if self.checks:
            return
        self.say("checks:")
        self.checks = checks(ground)
        for c in self.checks:
            self.say(
                f"  {c.name}: {c.found:.2g} (limit {c.limit:g}){'' if c.holds else '  FAILED'}"
            )

    def forget_peak(self) -> None:
        """Memory is watched from here on."""
        if self.fast:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Most GiB held since; of a CPU, by the process in all its life."""
        if self.fast:
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def prepare(bench: Bench, seed: int, problems: Sequence[str]) -> None:
    """The reference and the reward models of a seed, and their sizes."""
    for problem in problems:
        bench.check(bench.stand(seed, problem))
        bench.stand(seed, problem).make()
    for folder in sorted((bench.folder / f"seed-{seed}").iterdir()):
        files = [f.stat().st_size / MIB for f in folder.iterdir()]
        bench.say(f"  {folder}: {sum(files):.1f} MiB, the largest file {max(files):.1f}")


def train(bench: Bench, ground: Ground, job: Job) -> dict[str, Any]:
    """A whole run: what its file will hold of it.

    Raises:
        OutOfTime: the limit is reached.
    """
    study, row, log, diverged = bench.study, job.row(), Log(), ""
    policy = ground.policy(value_head="value" in row.outputs | row.needs)
    spent = {"evaluate": 0.0}

    def evaluate(step: int, last: bool) -> dict[str, float]:
        began = time.perf_counter()
        found = ground.figures(policy)
        spent["evaluate"] += time.perf_counter() - began
        return found

    world = ground.world(
        policy, reference=ground.reference, data=ground.pairs, prompts=ground.pairs,
        reward=ground.proxy, data_reward=ground.proxy,
        known=ground.known,
    )  # fmt: skip
    settings = loop.Settings(
        max_steps=study.steps, learning_rate=job.rate, lr_schedule=study.schedule,
        eval_every=study.eval_every,
    )  # fmt: skip
    began = time.perf_counter()
    try:
        run_loop(row, world, settings, ground.stop, evaluate, log)
    except GuardStop as error:
        diverged = str(error)
    total = time.perf_counter() - began
    return {
        "curve": log.curve, "diverged": diverged, "seconds": log.seconds | spent | {"total": total},
        "tokens_per_second": log.rates(), "checks": [start_check(study, log)],
    }  # fmt: skip


def start_check(study: Study, log: Log) -> Check:
    """A run begins at the reference."""
    return Check(f"{study.dtype}: KL at step 0", abs(log.curve[0]["kl"]), AT_START[study.dtype][1])


def run(bench: Bench, job: Job) -> None:
    """A piece, unless it is there."""
    path = bench.path(job)
    if path.exists():
        bench.say(f"{job.name}: is there")
        return
    methods.check(job.row(), Decoding(max_new_tokens=bench.study.max_new_tokens), bench.study.batch)
    ground = bench.stand(job.seed, job.problem)
    bench.check(ground)
    facts = ground.facts()  # before the clock: it makes what is missing
    bench.forget_peak()
    found = train(bench, ground, job)
    own = found.pop("checks")
    bench.begun += own
    piece = asdict(job) | found | {
        "study": asdict(bench.study), "ground": facts, "peak_gib": bench.peak(),
        "hardware": hardware(bench.known), "environment": bench.known,
        "dtype": bench.study.dtype, "axes": job.row().axes(),
        "checks": [asdict(c) | {"holds": c.holds} for c in (*bench.checks, *own)],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(study_table.strict(piece), indent=1) + "\n")
    end, taken = found["curve"][-1], found["seconds"]
    bench.say(
        f"{job.name}: gold {found['curve'][0]['gold']:.3f} to {end['gold']:.3f}, "
        f"proxy {end['proxy']:.3f}, KL {end['kl']:.3f}, length {end['length']:.1f}; "
        f"{taken['total']:.1f} s, {taken['evaluate']:.1f} of them evaluation"
        + (f"; DIVERGED: {found['diverged']}" if found["diverged"] else "")
    )


def expected(bench: Bench, job: Job) -> float:
    """Seconds that a piece will take with what it stands on, where that is not there."""
    paths = (bench.folder / "pieces").glob(f"*-{job.method}-rate*.json")
    known = [json.loads(p.read_text())["seconds"]["total"] for p in paths]
    stands = [] if bench.study.model else ["reference"]
    stands += [f"reward-{job.problem}"] if bench.study.reward == "learned" else []
    return at_most(bench, known) + sum(
        at_most(bench, [facts_of(p.parent)["seconds"] for p in made])
        for name in stands
        for made in [sorted(bench.folder.glob(f"seed-*/{name.partition('-')[0]}*/facts.json"))]
        if not (bench.folder / f"seed-{job.seed}" / name).is_dir()
    )


def at_most(bench: Bench, known: Sequence[float]) -> float:
    """Seconds of one more of what took so many."""
    return 1.2 * max(known) if known else UNKNOWN * bench.fast


def run_all(bench: Bench, jobs: Sequence[Job]) -> None:
    """Pieces one after another while there is time; one that fails does not lose the others."""
    done = 0
    for job in jobs:
        if bench.path(job).exists() or bench.left < expected(bench, job):
            continue
        try:
            run(bench, job)
        except OutOfTime:
            bench.say(f"{job.name}: out of time, not kept")
            break
        except Exception as error:
            traceback.print_exc()
            bench.failures.append(f"{job.name}: {type(error).__name__}: {error}")
            if len(bench.failures) == MOST_FAILURES:
                break
        done += 1
    there = sum(bench.path(job).exists() for job in jobs)
    bench.say(f"{done} pieces run, {there} of {len(jobs)} there, {bench.left:.0f} s left")


def jobs_of(asked: argparse.Namespace) -> list[Job]:
    """All pieces that a call asks for, those of a seed together."""
    return [
        Job(problem=problem, method=method, seed=seed, rate=rate, beta=beta, weight=weight)
        for seed in asked.seeds
        for problem in asked.problems
        for method in asked.methods
        for rate in rates_of(asked, method)
        for beta in (asked.betas if method == "dpo" and asked.betas else [None])
        for weight in (asked.weights if method == "hypo" and asked.weights else [None])
    ]


def rates_of(asked: argparse.Namespace, method: str) -> Sequence[float]:
    """The grid of a method."""
    given = dict(asked.rates or ())
    own = given.get(method, given.get("all", RATES.get(method, OTHERS)))
    return own[-1:] if asked.tiny and not given else own


# --- the command line -----------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Comma-separated."""
    return [x.strip() for x in text.split(",") if x.strip()]


def numbers(text: str) -> list[float]:
    """Comma-separated."""
    return [float(x) for x in names(text)]


def rates(text: str) -> tuple[str, list[float]]:
    """`1e-5,3e-5` for all methods, or `dpo=1e-5,3e-5` for one."""
    method, _, grid = text.rpartition("=")
    return method or "all", numbers(grid)


def given(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the study's settings stand in it only where they are given."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, required=True, metavar="DIR")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--tiny", action="store_true", help="settings that try the script out")
    common.add_argument("--limit", type=float, default=540.0, help="seconds of this call")
    shared = common.add_argument_group("of the whole study, fixed by the first call")
    for f in fields(Study):
        shared.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=argparse.SUPPRESS,
            metavar=str(f.default) or "PATH",
        )  # fmt: skip
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_ = commands.add_parser("prepare", parents=[common], help="reference, pairs, rewards")
    prepare_.add_argument("--seed", type=int, default=0)
    prepare_.add_argument("--problems", type=names, default=list(PROBLEMS))
    one = commands.add_parser("run", parents=[common], help="one piece")
    one.add_argument("--problem", default="min", choices=PROBLEMS)
    one.add_argument("--method", required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--rate", type=float)
    one.add_argument("--beta", type=float)
    one.add_argument("--weight", type=float, help="HyPO's lambda")
    every = commands.add_parser("all", parents=[common], help="pieces until the limit")
    every.add_argument("--problems", type=names, default=list(PROBLEMS))
    every.add_argument("--methods", type=names, default=list(METHODS))
    every.add_argument("--seeds", type=lambda t: [int(x) for x in names(t)], default=[0, 1, 2])
    every.add_argument("--rates", type=rates, nargs="+", metavar="[METHOD=]RATE,RATE")
    every.add_argument("--betas", type=numbers, help="of DPO, for its frontier")
    every.add_argument("--weights", type=numbers, help="of HyPO (lambda), for its frontier")
    commands.add_parser("table", parents=[common], help="the table and results.json")
    return parser.parse_args(arguments)


def job_of(asked: argparse.Namespace) -> Job:
    """The one piece of `run`."""
    rate = RATES.get(asked.method, OTHERS)[-1] if asked.rate is None else asked.rate
    return Job(
        problem=asked.problem, method=asked.method, seed=asked.seed, rate=rate, beta=asked.beta,
        weight=asked.weight,
    )  # fmt: skip


def refused(asked: argparse.Namespace) -> str:
    """What cannot be done of a call."""
    wanted = {"problems": PROBLEMS, "methods": tuple(methods.table())}
    for name, known in wanted.items():
        for value in getattr(asked, name, ()):
            if value not in known:
                return f"{name}: '{value}' is none of {', '.join(known)}"
    return ""


def work(bench: Bench, asked: argparse.Namespace) -> None:
    """What the command says."""
    bench.say(hardware(bench.known))
    try:
        if asked.command == "prepare":
            prepare(bench, asked.seed, asked.problems)
        elif asked.command == "run":
            run(bench, job_of(asked))
        elif asked.command == "all":
            run_all(bench, jobs_of(asked))
    except OutOfTime:
        bench.failures.append(f"{asked.command}: out of time after {bench.limit:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked; 1 if a check or a piece failed, after everything is printed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `repeatable` needs, from now
    asked = given(arguments)
    device = torch.device(asked.device)
    settings = {f.name: getattr(asked, f.name) for f in fields(Study) if hasattr(asked, f.name)}
    try:
        wrong = refused(asked)
        if wrong:
            raise ValueError(wrong)
        study = opened(asked.output, settings, device, asked.tiny)
        bench = Bench(asked.output, study, device, asked.limit, known=environment(device))
        if bench.fast:
            local.MAX_ROWS = ROWS_AT_ONCE
        work(bench, asked)
    except (ValueError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    held = all(c.holds for c in (*bench.checks, *bench.begun))
    if asked.command in ("all", "table"):
        text, sound = study_table.report(asked.output, asdict(study))
        print(text, flush=True)
        held = held and sound
    for text in bench.failures:
        bench.say(f"FAILED: {text}")
    return int(bool(bench.failures) or not held)


if __name__ == "__main__":
    sys.exit(main())
