"""The wheel, installed where nothing else is, as a user has it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from preftune import __version__

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def said(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """What a command prints, in an environment without ours."""
    own = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k not in own},
    )  # fmt: skip
    assert fails or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if fails else "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    said(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("preftune-*.whl")
    return path


def test_everything_that_stands_in_the_package_is_in_it(wheel: Path) -> None:
    listed = said("git", "ls-files", "src/preftune", cwd=ROOT).split()
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f.removeprefix("src/") for f in listed} <= inside
    assert "preftune/py.typed" in inside
    assert not [n for n in inside if n.startswith(("tests", "docs"))]


def test_a_fresh_environment_trains(wheel: Path, tmp_path: Path, make_tiny_model) -> None:
    """With the dependencies that the wheel names, and nothing of the development's."""
    python = tmp_path / "env" / "bin" / "python"
    said(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    pins = ROOT / "constraints.txt"
    said(python, "-m", "pip", "install", "-q", "-c", pins, "torch", cwd=tmp_path)
    said(python, "-m", "pip", "install", "-q", "-c", pins, wheel, cwd=tmp_path)
    assert "pytest" not in said(python, "-m", "pip", "list", cwd=tmp_path)
    preftune = tmp_path / "env" / "bin" / "preftune"
    assert said(preftune, "--version", cwd=tmp_path).strip() == __version__
    model = make_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": "Say 1.", "chosen": "1", "rejected": f"one and {n}"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", model, "--data", "pairs.jsonl", "--max-steps", "2", "--output", "run"]
    said(preftune, "train", "--method", "dpo", *given, cwd=tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    env = json.loads(said(preftune, "env", "--json", cwd=tmp_path))
    assert str(tmp_path) in json.dumps(env) or env["versions"]["torch"]


def other_python(version: str) -> str:
    """A Python of another version on the PATH that runs."""
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
        pytest.skip(f"python{version} is not on the PATH")
    return found


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_versions_import_help_and_compile(wheel: Path, tmp_path: Path, version: str) -> None:
    """As far as they go without torch, of which no build for them need be at hand."""
    found = other_python(version)
    said(found, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    said(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    assert said(python, "-c", "import preftune; print(preftune.__version__)", cwd=tmp_path)
    for flag in ("--help", "--version"):
        assert said(tmp_path / "env" / "bin" / "preftune", flag, cwd=tmp_path)
    (package,) = (tmp_path / "env").glob("lib/python*/site-packages/preftune")
    said(python, "-W", "error", "-m", "compileall", "-q", "-f", package, cwd=tmp_path)
    said(Path(sys.executable).parent / "pyright", "--pythonversion", version, cwd=ROOT)
