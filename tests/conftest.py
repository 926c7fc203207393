"""A model and preferences small enough for every test, and the command line in process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from byte_model import save_tiny_model


@pytest.fixture(autouse=True)
def types(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every call is checked against its annotations, shapes among them, but in tests marked `long`:
    that costs small models up to three quarters of their time, and others go the same ways."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", bool(request.node.get_closest_marker("long")))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., str]:
    """`save_tiny_model`, for models of a test's own."""
    return save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model with a chat template, BOS, and pad = end token."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve preference pairs as JSON lines; the chosen answers are the shorter."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"I would say {n} now"}
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep nothing in the user's cache but the default model, which is converted once."""
    from preftune.huggingface import cache_folder

    models, folder = cache_folder() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFTUNE_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests that set the number of threads leave it to the next as they found it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, with one thread."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; gives its message."""
    from preftune import cli

    def check(*args: str, leaves: tuple[str, ...] = ()) -> str:
        before = set(here.iterdir())
        capsys.readouterr()
        code = cli.run(list(args))
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == "" and "Traceback" not in err
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
        new = {p.name for p in set(here.iterdir()) - before} - {"__pycache__"}
        assert new == set(leaves)
        return err[err.index("error: ") :]

    return check


@pytest.fixture
def train(here: Path, tiny_model: str, pairs_file: str) -> Callable[..., list[str]]:
    """Arguments of a short run, each of which may be replaced."""

    def arguments(*more: str, method: str = "dpo", **changes: str) -> list[str]:
        given = {"model": tiny_model, "data": pairs_file, "method": method, "output": "out"}
        given |= {"max_steps": "1", "batch_size": "2", "max_new_tokens": "4"} | changes
        flags = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
        return ["train", *flags, *more]

    return arguments
