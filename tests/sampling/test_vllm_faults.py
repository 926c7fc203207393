"""A vLLM server that fails: nothing counts twice, nothing that is not whole counts, and who must
mend it is told. What a real one does: tests/vllm_server."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_vllm import END, FakeVllm, tokens_of
from preftune import engines, train
from preftune.asking import Patience
from preftune.errors import UserError
from preftune.numerics import uniform
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding
from preftune.sampling.vllm import Engine, Server
from preftune.team import Team
from test_training import same, timeless

LONGEST = 5


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    found = FakeVllm()
    yield found
    found.stop()


class Nothing:
    """Carries no weights, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def carry(self, server: Server) -> None:
        self.times += 1


def engine(fake: FakeVllm, **more: Any) -> Engine:
    patience = Patience(timeout=0.25, tries=3, wait=0.001)
    return Engine(
        server=Server(url=fake.url, patience=patience), carrier=Nothing(),
        decoding=Decoding(max_new_tokens=LONGEST), end_ids=[END], **more,
    )  # fmt: skip


PROMPTS = [[5, 6, 7], [8], [9, 10]]


def draw(of: Engine, version: int = 0, seed: int = 0) -> Samples:
    prompt = torch.tensor([[5, 6, 7], [0, 0, 8], [0, 9, 10]])
    counters = torch.arange(6).view(3, 2)
    return of.sample(
        prompt, prompt > 0, 2, lambda t, shape: uniform(seed, t, counters.expand(shape)), version
    )


def test_what_is_asked_and_what_comes_back(fake: FakeVllm) -> None:
    """Every response is the server's, with its log-probs, end and version; a cut one has no end."""
    of = engine(fake)
    samples = draw(of, version=7)
    asked = {tuple(b["token_ids"]): b["sampling_params"] for b in fake.bodies}
    assert set(asked) == set(map(tuple, PROMPTS)) and len(fake.bodies) == 3
    assert len({s["seed"] for s in asked.values()}) == 3
    for n, ids in enumerate(PROMPTS):
        for k in range(2):
            expected = tokens_of(ids, asked[tuple(ids)]["seed"], k, LONGEST)
            length = int(samples.mask[n, k].sum())
            assert samples.tokens[n, k, :length].tolist() == expected
            assert bool(samples.finished[n, k]) == (expected[-1] == END)
            logp = [-1.0 - t / 100 for t in expected]
            assert samples.logp is not None
            torch.testing.assert_close(samples.logp[n, k, :length], torch.tensor(logp))
    assert bool(samples.finished.any()) and not bool(samples.finished.all())
    assert bool((samples.origin == 7).all())
    assert all(s["ignore_eos"] and s["stop_token_ids"] == [END] for s in asked.values())
    assert draw(engine(fake), seed=1).tokens.tolist() != samples.tokens.tolist()
    assert draw(engine(fake)).tokens.tolist() == samples.tokens.tolist()


def without(answer: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    answer = deepcopy(answer)
    change(answer)
    return answer


def shortened(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"].pop()
    answer["choices"][0]["logprobs"]["content"].pop()


FAULTS: dict[str, Any] = {
    "a status": lambda a: 503,
    "silence": lambda a: 0.5,
    "a connection that ends": lambda a: None,
    "half an answer": lambda a: json.dumps(a).encode()[:-20],
    "no JSON": lambda a: b"\xff",
    "a response too few": lambda a: without(a, lambda x: x["choices"].pop()),
    "a response twice": lambda a: without(a, lambda x: x["choices"].append(x["choices"][0])),
    "one in place of another": lambda a: without(
        a, lambda x: x["choices"].__setitem__(1, x["choices"][0])
    ),
    "another's answer": lambda a: a | {"request_id": "generate-tokens-other"},
    "a response cut off": lambda a: without(a, shortened),
    "an aborted response": lambda a: without(
        a, lambda x: x["choices"][1].update(finish_reason="abort")
    ),
    "log-probs of other tokens": lambda a: without(
        a, lambda x: x["choices"][1]["logprobs"]["content"][0].update(token_id=2)
    ),
    "no log-probs": lambda a: without(a, lambda x: x["choices"][1].update(logprobs=None)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_changes_nothing(fake: FakeVllm, name: str) -> None:
    """Each prompt's first answer is spoilt: it is asked again, and the samples are those of a
    server without faults, each once."""
    expected = draw(engine(fake))
    fake.asked.clear()
    fake.bodies.clear()
    fake.fault = lambda answer, times: FAULTS[name](answer) if times == 0 else answer
    found = draw(engine(fake))
    for field in ("tokens", "mask", "finished", "logp", "origin"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert len(fake.bodies) == 6 and len({b["request_id"] for b in fake.bodies}) == 6


def test_a_fault_that_stays_is_said(fake: FakeVllm) -> None:
    fake.fault = lambda answer, times: FAULTS["a response too few"](answer)
    with pytest.raises(UserError, match="after 3 tries .1 responses where 2 were asked for"):
        draw(engine(fake))
    assert max(fake.asked.values()) == 3


def test_a_server_that_is_known_to_be_gone_is_not_waited_for(fake: FakeVllm) -> None:
    fake.fault = lambda answer, times: 503
    of = engine(fake)
    of.server = Server(url=fake.url, gone=lambda: "it has ended", patience=of.server.patience)
    with pytest.raises(UserError, match="it has ended"):
        draw(of)
    assert max(fake.asked.values()) == 1


def test_weights_of_another_run_are_refused(fake: FakeVllm) -> None:
    of = engine(fake)
    draw(of)
    fake.weights = "someone:0"
    with pytest.raises(UserError, match="someone:0.*Another run uses the same server"):
        draw(of)


def test_when_weights_are_brought(fake: FakeVllm) -> None:
    """As soon as they are older than they may be; also where a run was put back."""
    of = engine(fake, max_staleness=2)
    origins = [int(draw(of, version=v).origin[0, 0]) for v in (3, 4, 5, 5, 6, 7, 2)]
    assert origins == [3, 3, 3, 3, 6, 6, 2]
    assert isinstance(of.carrier, Nothing) and of.carrier.times == 3
    first = [p for p in fake.paths if not p.endswith("generate")][:4]
    assert first == ["/pause", "/reset_prefix_cache", "/update_weight_version", "/resume"]


def test_a_prefix_cache_that_stays_full_ends_the_run(fake: FakeVllm) -> None:
    """What it holds is of the old weights. In use for a moment, it is waited for."""
    fake.replies["/reset_prefix_cache"] = [{"success": False}, {"success": True}]
    of = engine(fake)
    draw(of)
    fake.replies["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(UserError, match="prefix cache is still in use"):
        draw(of, version=1)
    assert of.version is None  # whoever asks again brings all of it again


def settings(model: str, data: str, output: Path, url: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "data": data, "output": str(output), "threads": 1, "batch_size": 2,
        "method": "rloo", "reward": "length:within=3", "sampler": url, "max_new_tokens": LONGEST,
        "max_steps": 4, "learning_rate": 1e-2, **more,
    }  # fmt: skip


def test_a_run_goes_on_where_its_server_left_it(
    fake: FakeVllm, tiny_model: str, pairs_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A server that ends in mid-round: what was reached is saved, and a run that goes on gives what
    one without a fault gives. It does not compute with our weights, which is not looked at here."""
    monkeypatch.setattr(engines, "_compare", lambda *given: None)
    monkeypatch.setattr(engines, "Server", lambda **given: Server(
        **given | {"patience": Patience(timeout=5.0, tries=2, wait=0.001)}))  # fmt: skip
    whole = train(settings(tiny_model, pairs_file, tmp_path / "whole", fake.url))
    enough = len(fake.bodies) * 5 // 8
    fake.bodies.clear()
    fake.fault = lambda answer, times: answer if len(fake.bodies) <= enough else 503
    out = tmp_path / "run"
    with pytest.raises(UserError, match="no whole answer.*Saved .*step-000002.*--resume"):
        train(settings(tiny_model, pairs_file, out, fake.url))
    fake.fault = lambda answer, times: answer
    run = train(settings(tiny_model, pairs_file, out, fake.url, resume=True))
    assert timeless(run.metrics) == timeless(whole.metrics) and same(run.folder, whole.folder)
    assert [m["staleness"] for m in run.metrics] == [0, 0, 0, 0]
    assert run.metrics[0]["sampler_gap"] > 1  # its log-probs are made up; the trainer's count


# --- what the user is told -------------------------------------------------------------------


def flags(**given: Any) -> list[str]:
    return [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", str(v))]


MISTAKES = [
    ({"sampler": "vlm"}, "is neither local, nor vllm, nor an address.*Did you mean 'vllm'?"),
    ({"max_staleness": 1}, "max_staleness: the model samples by itself"),
    ({"sampler": "vllm", "adapter": "lora"}, "adapter"),
    ({"sampler": "vllm", "stop": "END"}, "stop: vLLM is given token ids"),
    ({"sampler": "vllm", "method": "hypo", "max_staleness": 1}, "needs samples of the policy as"),
    ({"sampler": "http://127.0.0.1:9", "model": "m"}, r"no answer.*Start it: VLLM_SERVER_DEV_MODE"),
    ({"use_vllm": "true"}, "sampler"),
]


@pytest.mark.parametrize("given, told", MISTAKES)
def test_mistakes(refused, train, pairs_file: str, given: dict[str, Any], told: str) -> None:
    import re

    base = {"method": "rloo", "reward": "length:min"}
    message = refused(*train(), *flags(**base | given))
    assert re.search(told, message, re.DOTALL), message


def test_several_processes(refused, train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "current", lambda: Team(rank=0, size=2))
    asked = flags(method="rloo", reward="length:min", sampler="vllm")
    assert "and this run has 2" in refused(*train(), *asked)


def test_no_python_with_vllm(refused, train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFTUNE_VLLM_PYTHON", raising=False)
    asked = flags(method="rloo", reward="length:min", sampler="vllm")
    assert "name that environment's python in PREFTUNE_VLLM_PYTHON" in refused(*train(), *asked)
    monkeypatch.setenv("PREFTUNE_VLLM_PYTHON", "/nowhere/python")
    assert "'/nowhere/python' is no program" in refused(*train(), *asked)


SERVERS = [
    ("/weight_info", 404, "no vLLM server that takes weights"),
    ("/v1/models", {"data": [{"max_model_len": 4}]}, "it takes 4 tokens.*--max-model-len"),
    ("/tokenize", {"tokens": [1, 2, 3]}, "another model's tokenizer"),
    ("/server_info", {"vllm_config": "device_config=cpu, load_format=auto"}, "Start it as: "),
]


@pytest.mark.parametrize("path, reply, told", SERVERS)
def test_servers_that_do_not_fit(
    refused, train, fake: FakeVllm, path: str, reply: Any, told: str
) -> None:
    import re

    fake.replies[path] = reply
    message = refused(*train(), *flags(method="rloo", reward="length:min", sampler=fake.url))
    assert re.search(told, message, re.DOTALL), message


def test_a_method_that_draws_nothing_needs_no_server(train, capsys) -> None:
    from preftune import cli

    assert cli.run([*train(), *flags(sampler="http://127.0.0.1:9")]) == 0
    said = capsys.readouterr()
    assert "sampler: 'dpo' takes no fresh samples" in " ".join((said.out + said.err).split())
