"""`preftune launch`: what it would run or submit, compared with files that a person has read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from preftune import cli

GOLDEN = Path(__file__).parent / "golden"
TRAIN = ["--", "train", "--method", "hypo", "--data", "my pairs.jsonl", "--output", "runs/big"]
CASES = {
    "slurm.sh": ["--slurm", "--nodes", "2", "--gpus", "8",
                 "--accelerate=--use_fsdp --fsdp_version 2"],
    "skypilot.yaml": ["--skypilot", "--nodes", "2", "--gpus", "4", "--gpu-type", "A100"],
    "here.sh": ["--gpus", "2"],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dry_runs_are_the_golden_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", "--dry-run", *CASES[name], *TRAIN]) == 0
    assert capsys.readouterr().out == (GOLDEN / name).read_text()


def test_the_shell_reads_the_command_as_it_was_given(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The script itself, run by bash, with the cluster's programs played by functions."""
    cli.run(["launch", "--dry-run", *CASES["slurm.sh"], *TRAIN])
    script = capfd.readouterr().out
    (here / "bin").mkdir()
    programs = {
        "scontrol": 'echo "first\nsecond"',
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'printf "%s|" "$@"',
    }
    for name, body in programs.items():
        (here / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (here / "bin" / name).chmod(0o755)
    path = {"PATH": f"{here / 'bin'}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True)
    words = done.stdout.split("|")
    assert done.returncode == 0, done.stderr
    assert words[words.index("--data") + 1] == "my pairs.jsonl" and "--resume" in words
    assert words[words.index("--machine_rank") + 1] == "1"
    assert words[words.index("--main_process_ip") + 1] == "first"


def test_the_task_is_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["launch", "--dry-run", *CASES["skypilot.yaml"], *TRAIN])
    task = yaml.safe_load(capsys.readouterr().out)
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "A100:4"}


@pytest.mark.parametrize(
    "args, what",
    [
        (["--slurm", "--skypilot", *TRAIN], "not both"),
        (["--slurm", "--", "train", "--method", "dpo"], "--output"),
        (["--gpus", "0", *TRAIN], "--gpus"),
        (["--nodes", "2", *TRAIN], "--slurm or --skypilot"),
        (["--dry-run"], "behind --"),
        (["--dry-run", "--", "compare"], "behind --"),
    ],
)
def test_mistakes(args: list[str], what: str, refused: Callable[..., str]) -> None:
    assert what in refused("launch", *args)


def test_no_sbatch_here(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no 'sbatch'" in refused("launch", "--slurm", *TRAIN)


@pytest.mark.slow
@pytest.mark.parametrize("data, code", [(None, 0), ("nowhere.jsonl", 2)])
def test_two_processes_by_accelerate(
    train: Callable[..., list[str]], here: Path, data: str | None, code: int
) -> None:
    """What a user types, with the exit code and the one message of preftune itself."""
    command = train(**({} if data is None else {"data": data}))
    words = [sys.executable, "-m", "preftune", "launch", "--gpus", "2", "--", *command]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("model: ") == (code == 0)
    assert done.stderr.count("error: ") == (code == 2) and "Traceback" not in done.stderr
    assert (here / "out" / "model").is_dir() == (code == 0)
