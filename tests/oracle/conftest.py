"""Worlds shared by the oracle tests."""

from collections.abc import Iterator

import pytest
import torch
from worlds import WORLDS, World, build_world


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {
        name: build_world(tmp_path_factory.mktemp(name), number, *shape)
        for number, (name, shape) in enumerate(WORLDS.items())
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture(params=["llama", "gpt2-bos"])
def either(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    """One world of each architecture, where all four would only cost time."""
    return worlds[request.param]
