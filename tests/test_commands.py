"""Every command of README and docs, run as it stands there.

`smollm2-135m` is the tiny model of the tests under that name; sizes that take hours are made small
(`SMALLER`; claims are listed, not run), and what nothing makes small is left out (`READ`).
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from preftune import cli

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
SMALLER = {
    r"--budget \w+": "--budget 90s",
    r"--draw 216": "--draw 4",
    r"--texts 20": "--texts 0",
    r"--probe-steps 40": "--probe-steps 2",
    r"/its/new/place": "smollm2-135m",
    r"--follow \d+": "--follow 1",
    r"--sampler vllm": "--sampler local",  # tests/vllm_server starts one
}
READ = {
    "label": "a server that people end; tests/labelling drives it",
    "quickstart": "tests/test_quickstart.py runs it",
    "pipeline": "tests/test_pipeline.py runs it",
    "--fit": "every setting of every row on every problem; tests/advising runs few",
}
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
SETTINGS = {"method": "dpo", "data": "pairs.jsonl", "max_steps": 2, "batch_size": 2}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines of its blocks that begin with preftune, with what goes on behind a backslash."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    shells = [text for language, text in blocks if language in ("", "sh", "bash", "console")]
    lines = "\n".join(shells).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if _is_command(line)]


def _is_command(line: str) -> bool:
    return bool(re.match(r"\s*(\$ )?preftune [a-z]", line))


def smaller(line: str) -> list[str]:
    """Arguments of a command that takes seconds."""
    for long, short in SMALLER.items():
        line = re.sub(long, short, line)
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments += ["--max-steps", "2", "--batch-size", "2"]
    if arguments[0] in ("compare", "diagnose") and "--budget" not in arguments:
        arguments += ["--budget", "90s"]
    if arguments[0] == "launch":  # tests/many launches
        arguments.insert(1, "--dry-run")
    if arguments[0] == "compare":
        arguments += ["--batch-size", "2", "--max-new-tokens", "8"]
    return arguments + (["--list"] if arguments[0] == "reproduce" else [])


@pytest.fixture
def place(here: Path, make_tiny_model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted."""
    models = here / "cache" / "models"
    models.mkdir(parents=True)
    make_tiny_model(models / "smollm2-135m", max_position_embeddings=1024)
    monkeypatch.setenv("PREFTUNE_CACHE", str(here / "cache"))
    texts = [f"Say {n}." for n in range(48)]
    pairs = [
        {"prompt": t, "chosen": f"{n}", "rejected": f"I would say {n} now"}
        for n, t in enumerate(texts)
    ]
    for name in ("pairs.jsonl", "my.jsonl", "labels.jsonl"):
        (here / name).write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (here / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    trl = "model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\ndataset_name: pairs.jsonl\n"
    (here / "dpo.yaml").write_text(trl)
    shutil.copytree(ROOT / "src/preftune/data/default", here / "shipped")
    for name, text in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", TUTORIAL, re.S):
        (here / name).write_text(text)
    (here / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in SETTINGS.items()))
    return here


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.name)
def test_every_command_runs(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(page)
    if not found:
        pytest.skip(f"{page.name} has no commands of preftune")
    if page.name in BEFORE:
        for line in BEFORE[page.name]:
            assert cli.run(smaller(line)) == 0, f"{line}\n{capsys.readouterr().err}"
    for line in found:
        arguments = smaller(line)
        if reasons := [why for word, why in READ.items() if word in arguments]:
            print(f"{line}: {reasons[0]}")
            continue
        assert cli.run(arguments) == 0, f"{line}\n{capsys.readouterr().err}"


MINE = "preftune train --method dpo --model smollm2-135m --data pairs.jsonl --output runs/mine"
BEFORE = {
    "README.md": [MINE],
    "labelling.md": [MINE],
    "diagnose.md": [MINE.replace("runs/mine", "runs/dpo")],
}
"""What a page speaks of as being there already."""
