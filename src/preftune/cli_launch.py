"""preftune launch: a run in several processes, on this machine or on a cluster."""

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.errors import UserError

FLAGS = [
    ("slurm", bool, False, "as a job of Slurm (sbatch)"),
    ("skypilot", bool, False, "as a managed job of SkyPilot (sky jobs launch)"),
    ("dry_run", bool, False, "print what would be run or submitted"),
    ("nodes", int, 1, "machines"),
    ("gpus", int, 1, "GPUs of each, one process a GPU (without any: processes)"),
    ("gpu_type", str, "H100", "which GPUs, for SkyPilot"),
    ("time", str, "24:00:00", "limit of a Slurm job; it is requeued until the run is through"),
    ("accelerate", str, "", "flags of accelerate launch, as --accelerate='--use_fsdp'"),
]
BEFORE_LIMIT = 300
"""Seconds before its limit that a Slurm job is told to save."""
TO_SAVE = 280
"""Seconds that the processes have to save, once they are told."""
PORT = 29500
_STRATEGIES = ("--multi_gpu", "--use_fsdp", "--use_deepspeed", "--cpu", "--config_file")


def launch(args: list[str]) -> int:
    """The command."""
    from preftune import flags

    place = args.index("--") if "--" in args else len(args)
    mine, command = args[:place], args[place + 1 :]
    text = "A run in several processes. The command stands behind --: -- train --method dpo ..."
    _, own = flags.parse("launch", text, (), mine, FLAGS)
    _check(own, command)
    if own["slurm"]:
        script = slurm(own, command)
        return _shown(script) if own["dry_run"] else _submitted(["sbatch"], script)
    if own["skypilot"]:
        task = skypilot(own, command)
        return _shown(task) if own["dry_run"] else _with_file(["sky", "jobs", "launch", "-y"], task)
    words = [*_accelerate(own, []), *command]
    return _shown(shlex.join(words) + "\n") if own["dry_run"] else _here(words[2:])


def _check(own: dict[str, Any], command: Sequence[str]) -> None:
    if own["slurm"] and own["skypilot"]:
        raise UserError("launch: give --slurm or --skypilot, not both.")
    if not command or command[0] not in ("train", "reward"):
        raise UserError("launch: give the command behind --: preftune launch -- train ...")
    for name in ("nodes", "gpus"):
        if own[name] < 1:
            raise UserError(f"flag '--{name}': is {own[name]}. Give 1 or more.")
    on_cluster = own["slurm"] or own["skypilot"]
    if own["nodes"] > 1 and not on_cluster:
        raise UserError("flag '--nodes': more than one needs --slurm or --skypilot.")
    given = any(x == "--output" or x.startswith("--output=") for x in command)
    if on_cluster and not given:
        raise UserError("launch: a job that may be started again needs --output DIR, which all "
                        "machines see.")  # fmt: skip


def _accelerate(own: dict[str, Any], machines: Sequence[str]) -> list[str]:
    """`accelerate launch` up to preftune's own command."""
    more = shlex.split(own["accelerate"])
    count = own["nodes"] * own["gpus"]
    chosen = any(x.split("=")[0] in _STRATEGIES for x in more)
    strategy = [] if chosen or count == 1 else ["--multi_gpu"]
    return [
        "accelerate", "launch", "--num_processes", str(count),
        "--num_machines", str(own["nodes"]), *machines,
        "--mixed_precision", "no", "--dynamo_backend", "no", *strategy, *more, "-m", "preftune",
    ]  # fmt: skip


def _resumed(command: Sequence[str]) -> list[str]:
    return [*command, *([] if "--resume" in command else ["--resume"])]


def _on_machine(own: dict[str, Any], command: Sequence[str], rank: str, head: str) -> str:
    """The line that each machine runs; rank and head are the shell's variables."""
    marks = {"RANK_OF_THIS": f'"${rank}"', "ADDRESS_OF_FIRST": f'"${head}"'}
    machines = ["--machine_rank", "RANK_OF_THIS", "--main_process_ip", "ADDRESS_OF_FIRST"]
    machines += ["--main_process_port", str(PORT)]
    words = [*_accelerate(own, machines), *_resumed(command)]
    return " ".join(marks.get(word) or shlex.quote(word) for word in words)


def slurm(own: dict[str, Any], command: Sequence[str]) -> str:
    """A script for sbatch. Before its limit, and when it is preempted, the run saves and the job
    goes back into the queue."""
    line = _on_machine(own, command, "SLURM_NODEID", "head")
    return f"""#!/bin/bash
#SBATCH --job-name=preftune
#SBATCH --nodes={own["nodes"]}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={own["gpus"]}
#SBATCH --time={own["time"]}
#SBATCH --signal=B:USR1@{BEFORE_LIMIT}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=preftune-%j.log

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={TO_SAVE}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head

asked=
save() {{
    asked=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this script
}}
trap save USR1 TERM

srun --kill-on-bad-exit=1 bash -c {shlex.quote("exec " + line)} &
step=$!
wait "$step"
code=$?
if [ -n "$asked" ]; then
    wait "$step" # the first one ended with the signal
    code=$?
    [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def skypilot(own: dict[str, Any], command: Sequence[str]) -> str:
    """A task for SkyPilot's managed jobs, which start it again where a machine is taken away."""
    line = _on_machine(own, command, "SKYPILOT_NODE_RANK", "head")
    return f"""name: preftune
num_nodes: {own["nodes"]}
resources:
  accelerators: {own["gpu_type"]}:{own["gpus"]}
workdir: .
# --output must lie on storage that outlives a machine: mount a bucket here (file_mounts)
envs:
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT: "{TO_SAVE}"
setup: |
  pip install .  # where workdir is a clone of preftune; else name its wheel or its address
run: |
  head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  exec {line}
"""


def _shown(text: str) -> int:
    print(text, end="")
    return 0


def _submitted(command: Sequence[str], text: str) -> int:
    """Give the text to a program of the cluster's; its exit code."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"launch: there is no '{command[0]}' on this machine. Start it where there is one, or "
            "give --dry-run and take along what it prints."
        )
    return subprocess.run(command, input=text, text=True, check=False).returncode


def _with_file(command: Sequence[str], text: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.yaml"
        path.write_text(text, encoding="utf-8")
        return _submitted([*command, str(path)], "")


def _here(words: Sequence[str]) -> int:
    """`accelerate launch` in this process, which keeps the exit code that preftune's gave."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        if code < 0:
            raise UserError(
                f"launch: a process was ended by signal {-code}, often for want of memory. "
                "Go on with --resume."
            ) from failed
        return code
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    except SignalException:
        return 75
    return 0
