"""A real vLLM server on this machine: weights, versions, caches, and how runs end (make test-vllm).

`smollm2-135m` in float32, so that what the server says of a text can be held against the trainer's
to a thousandth of a nat.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import train
from preftune.huggingface import DEFAULT_MODEL, load_model, load_tokenizer
from preftune.numerics import uniform
from preftune.sampling import vllm_child
from preftune.sampling.decoding import Decoding
from preftune.sampling.vllm import Engine, Server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.skipif(
        vllm_child.PYTHON not in os.environ,
        reason=f"{vllm_child.PYTHON} names no python with vLLM: make test-vllm installs one",
    ),
]
ROOM = 640
CLOSE = 2e-3
"""Nats between two programs that compute the same in float32."""
MOVED = 0.05
BLOCK = 128
"""Tokens that the prefix cache keeps together on a CPU."""
TEXT = "The sea is wide and deep, and nobody has seen all of it."
LONG = "A ship left the harbour at dawn with forty sailors and a cat. " * 20


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(DEFAULT_MODEL, torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def server(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started as `preftune` tells a user to start one."""
    folder = tmp_path_factory.mktemp("server")
    model.save_pretrained(folder / "model")
    given = vllm_child.flags("float32", "cpu", ROOM)
    child = vllm_child.Child(folder / "model", given, folder / "vllm.log")
    yield Server(url=child.url)
    child.close()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    asked = ("Name a colour.", "What is a ship?", "Say hello.", "Write about the sea.")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    return str(path)


def settings(server: str, prompts: str, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "method": "rloo", "data": prompts, "output": str(output), "sampler": server,
        "max_steps": 3, "batch_size": 2, "samples_per_prompt": 2, "max_new_tokens": 12,
        "learning_rate": 1e-4, "lr_schedule": "constant", "warmup_ratio": 0, "dtype": "float32",
        "reward": "length:within=8", "threads": 2, **more,
    }  # fmt: skip


def by_transformers(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probs of each token but the first."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)


def likeliest(server: Server, ids: list[int]) -> tuple[int, float]:
    """The token after a prompt, and its log-prob; the prompt may come from the prefix cache."""
    sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "detokenize": False}
    body = {"token_ids": ids, "sampling_params": sampling}
    found = server.ask("/inference/v1/generate", body)["choices"][0]
    return found["token_ids"][0], found["logprobs"]["content"][0]["logprob"]


def cache_hits(server: Server) -> float:
    """Tokens of prompts that were found in the prefix cache so far."""
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:prefix_cache_hits_total"))


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_server_has_the_trainers_weights_after_each_update(
    model: Any, tokenizer: Any, server: Server, prompts: str, tmp_path: Path
) -> None:
    """Looked at from the reward, between a round's samples and its update: what the server says of
    a text is what transformers says of it with the model that is trained, and moves with it; also
    of a prompt that it had in its cache before the weights changed."""
    text, long = (tokenizer(t)["input_ids"] for t in (TEXT, LONG))
    assert len(long) > BLOCK
    said: list[torch.Tensor] = []
    versions: list[str] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(completions) < 4 or len(said) == 3:
            return [0.0] * len(completions)  # tried before the run
        theirs, ours = torch.tensor(server.score(text)), by_transformers(model, text)
        torch.testing.assert_close(theirs, ours, atol=CLOSE, rtol=0)
        said.append(theirs)
        versions.append(server.ask("/weight_info")["weight_version"])
        token, logp = likeliest(server, long)
        expected = by_transformers(model, [*long, token])[-1]
        assert logp == pytest.approx(float(expected), abs=CLOSE)
        before = cache_hits(server)
        assert likeliest(server, long) == (token, pytest.approx(logp, abs=CLOSE))
        assert cache_hits(server) - before >= BLOCK  # so there is a cache that could be stale
        return [float(i % 2) for i in range(len(completions))]

    out = tmp_path / "run"
    train(settings(server.url, prompts, out, reward=None), model=model, tokenizer=tokenizer,
          reward=reward)  # fmt: skip
    assert len(said) == 3 and len({v.partition(":")[0] for v in versions}) == 1
    assert [v.partition(":")[2] for v in versions] == ["0", "1", "2"]
    for one, next_ in zip(said, said[1:], strict=False):
        assert (next_ - one).abs().mean() > MOVED
    logged = rows_of(out)
    assert [m["staleness"] for m in logged] == [0, 0, 0]
    assert max(m["sampler_gap_max"] for m in logged) < CLOSE
    assert min(m["sampler_effective_sample_size"] for m in logged) > 0.999
    assert not (out / "vllm" / "weights").exists()
    assert "seconds_sync" in rows_of(out, "times.jsonl")[0]


def test_weights_may_be_as_old_as_the_setting_says(
    server: Server, prompts: str, tmp_path: Path
) -> None:
    """Versions of samples are those of the weights that drew them, and the gap tells."""

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]  # equal ones would move nothing

    out = tmp_path / "run"
    given = settings(server.url, prompts, out, max_staleness=1, learning_rate=3e-4, reward=None)
    train(given, reward=reward)
    logged = rows_of(out)
    assert [m["staleness"] for m in logged] == [0, 1, 0]
    gaps = [m["sampler_gap"] for m in logged]
    assert max(gaps[0], gaps[2]) < CLOSE < 10 * CLOSE < gaps[1]


def test_equal_seeds_draw_alike_and_others_do_not(server: Server, tokenizer: Any) -> None:
    """vLLM promises no equal bits; of one short round on one machine they are equal. Every token is
    the server's own, so none is lost behind or before an end."""

    class Nothing:
        def carry(self, server: Server) -> None:
            pass

    engine = Engine(
        server=server, carrier=Nothing(), decoding=Decoding(max_new_tokens=8),
        end_ids=[tokenizer.eos_token_id],
    )  # fmt: skip
    prompt = torch.tensor([tokenizer(TEXT)["input_ids"]])

    def draw(seed: int) -> list[list[list[int]]]:
        def stream(t: int, shape: tuple[int, ...]) -> torch.Tensor:
            return uniform(seed, t, torch.arange(4).expand(shape))

        return engine.sample(prompt, prompt > -1, 4, stream, 0).tokens.tolist()

    first = draw(0)
    assert first == draw(0) != draw(1)
    assert len(set(map(tuple, first[0]))) > 1


def preftune(config: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "preftune", "train", "--config", str(config), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def await_step(folder: Path, step: int, run: "subprocess.Popen[str]") -> None:
    while not (folder / "metrics.jsonl").exists() or len(rows_of(folder)) < step:
        assert run.poll() is None, run.communicate()
        time.sleep(0.2)


def descendants(pid: int) -> set[int]:
    """Processes below one, whatever group they are in."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_dies_and_a_trainer_that_is_killed(prompts: str, tmp_path: Path) -> None:
    """`sampler: vllm` starts a server of its own. When that dies, the run ends with a message and
    a checkpoint, and goes on from there; when the run is killed, nothing is left of the server."""
    import yaml

    out = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings("vllm", prompts, out, max_steps=40)))

    run = preftune(config)
    await_step(out, 1, run)
    engine = [pid for pid in descendants(run.pid) if "VLLM" in name_of(pid)]
    assert engine
    for pid in engine:
        os.kill(pid, signal.SIGKILL)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 2, told
    assert "Traceback (most recent call last)" not in told.rpartition("error: ")[0]
    assert "error: sampler" in told and "--resume" in told
    reached = len(rows_of(out))

    run = preftune(config, "--resume")
    await_step(out, reached + 2, run)
    below = descendants(run.pid)
    assert any("VLLM" in name_of(pid) for pid in below)
    run.kill()
    run.communicate()
    last = time.monotonic() + 60
    while any(map(is_there, below)) and time.monotonic() < last:
        time.sleep(0.2)
    assert not [name_of(pid) for pid in below if is_there(pid)]
    assert [m["step"] for m in rows_of(out)][: reached + 2] == list(range(1, reached + 3))
    assert all(m["staleness"] == 0 for m in rows_of(out))
