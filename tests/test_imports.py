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


def loaded(statement: str) -> set[str]:
    """Top-level modules in a fresh process after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in out.stdout.split()}


def test_the_package_alone_loads_neither_torch_nor_transformers():
    assert not loaded("import preftune") & {"torch", *HEAVY}


@pytest.mark.parametrize(
    "module",
    ["loop", "rounds", "checkpoint", "evaluate", "report", "policies.transformer", "huggingface"],
)
def test_the_loop_and_what_is_below_need_only_torch(module):
    """So that whole runs work on a machine that has torch, NumPy, safetensors and jaxtyping."""
    assert not loaded(f"import preftune.{module}") & set(HEAVY)


def test_public_names_resolve():
    import preftune

    for name in preftune.__all__:
        assert getattr(preftune, name) is not None
    with pytest.raises(AttributeError):
        _ = preftune.no_such_name
