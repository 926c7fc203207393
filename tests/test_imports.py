"""What an import loads: the package nothing heavy, the loop torch and little else."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "datasets",
    "pydantic",
    "tyro",
    "rich",
    "plotly",
    "accelerate",
    "peft",
    "yaml",
)


def run(code: str, *args: str) -> list[str]:
    """What a fresh process prints, by lines."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_package_alone_loads_neither_torch_nor_transformers():
    (line,) = run("import preftune, sys; print(*sys.modules)")
    found = {name.partition(".")[0] for name in line.split()}
    assert "preftune" in found and not found & {"torch", *HEAVY}


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_loads_neither(flag: str) -> None:
    code = "import sys; from preftune.cli import run; run(sys.argv[1:]); print(*sys.modules)"
    found = {name.partition(".")[0] for name in run(code, flag)[-1].split()}
    assert "preftune" in found and not found & {"torch", *HEAVY}


def test_the_loop_and_what_is_below_need_only_torch():
    """So that whole runs work on a machine that has torch, NumPy, safetensors and jaxtyping. One
    process imports them one after another, as each of its own would load torch anew; what stands
    beside a module's name is what came with it."""
    modules = "loop rounds checkpoint evaluate report policies.transformer huggingface".split()
    new = "before = set(sys.modules); __import__(name); print(name, *set(sys.modules) - before)"
    lines = run(f"import sys\nfor name in sys.argv[1:]: {new}", *(f"preftune.{m}" for m in modules))
    loads = {name: {m.partition(".")[0] for m in names} for name, *names in map(str.split, lines)}
    assert list(loads) == [f"preftune.{m}" for m in modules] and "torch" in loads["preftune.loop"]
    assert not {name: found for name in loads if (found := loads[name] & set(HEAVY))}


def test_public_names_resolve():
    import preftune

    for name in preftune.__all__:
        assert getattr(preftune, name) is not None
    with pytest.raises(AttributeError):
        _ = preftune.no_such_name
