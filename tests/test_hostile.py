"""Templates, archives, model folders and keys of somebody else's; and the network, left alone."""

import gzip
import json
import lzma
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from byte_model import CHAT_TEMPLATE
from fake_judge import Judge
from preftune import huggingface, train
from preftune.data import Renderer, load_examples, unpacking
from preftune.data import trial as trials
from preftune.errors import UserError

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 9999999999 }}", "MB of memory"),
        ("{{ [][0].x }}{{ 'a' * 9999999999 }}", "refuses"),
        ("{{ 'a'.center(9999999999) }}", "MB of memory"),
        ("{% set n = namespace(s='a') %}{% for i in range(50) %}{% set n.s = n.s + n.s %}"
         "{% endfor %}", "MB of memory|1 s"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ 'a' * 9999999 }}", "KB of text"),
    ],
)  # fmt: skip
def test_a_template_that_takes_too_much_is_refused(
    template: str, reason: str, tiny_model: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    tokenizer = huggingface.load_tokenizer(tiny_model)
    with pytest.raises(UserError, match=reason):
        Renderer(tokenizer, template=str(path))


def test_what_a_template_does_not_reach_is_not_laid_out(tiny_model: str, tmp_path: Path) -> None:
    """Compiling it computes constants, of 10 GB here."""
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT_TEMPLATE + "{% if false %}{{ 'a' * 9999999999 }}{% endif %}")
    tokenizer = huggingface.load_tokenizer(tiny_model)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert Renderer(tokenizer, template=str(path)).prompt_ids("x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_template_cannot_leave_its_sandbox(tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ cycler.__init__.__globals__.os.popen('touch here').read() }}")
    with pytest.raises(UserError, match="template"):
        Renderer(huggingface.load_tokenizer(tiny_model), template=str(path))
    assert not Path("here").exists()


def test_a_process_that_ends_is_seen() -> None:
    def crash() -> int:
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    assert trials.excess(crash) == "ends its process (SIGSEGV)"


def test_what_is_tried_leaves_nothing_here() -> None:
    seen: list[int] = []
    assert trials.excess(lambda: seen.append(1) or 0) is None
    assert seen == [], "it ran in another process"
    assert trials.excess(lambda: 1 // 0) is None, "an error is for the caller to find"


@pytest.fixture
def little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs of a megabyte, which are made in no time."""
    monkeypatch.setattr(unpacking, "FREE", 2**20)


def test_a_bomb_is_refused_before_it_grows(tmp_path: Path, little_is_free: None) -> None:
    row = json.dumps({"prompt": "a" * 1000, "chosen": "b", "rejected": "c"}) + "\n"
    for ending, packed in ((".gz", gzip), (".xz", lzma)):
        path = tmp_path / f"bomb.jsonl{ending}"
        with packed.open(path, "wt") as out:
            out.write(row * 5000)
        with pytest.raises(UserError, match="decompression bomb"):
            load_examples(path)


def test_a_bomb_of_parquet_is_refused(tmp_path: Path, little_is_free: None) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.array(["a"]).take(pyarrow.array([0] * 10**7, pyarrow.int8()))
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"prompt": rows}), path)
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match="decompression bomb"):
        load_examples(path)


def test_packed_text_is_read(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(row.encode() * 5000))
    assert len(load_examples(path).examples) == 5000


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", 3])
def test_weights_outside_of_the_folder_are_refused(name: Any, make_tiny_model, tmp_path) -> None:
    folder = Path(make_tiny_model(tmp_path / "model"))
    make_tiny_model(tmp_path / "other")
    (folder / "model.safetensors").unlink()
    (folder / "x.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of the folder"):
        huggingface.load_model(str(folder), torch.float32)


KEYS = {"PREFTUNE_JUDGE_KEY": "sk-of-the-judge-1234", "HF_TOKEN": "hf_of_the_hub_1234"}


def settings(model: str, data: str, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "data": data, "output": str(output), "threads": 1, "batch_size": 2,
        "max_steps": 2, "save_every": 1, "max_new_tokens": 4, **more,
    }  # fmt: skip


def test_keys_stand_nowhere(
    tiny_model: str, pairs_file: str, tmp_path: Path, caplog, capsys, monkeypatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    judge = Judge()
    said: list[str] = []
    try:
        judge.reply = lambda question: "7"
        run = train(
            settings(tiny_model, pairs_file, tmp_path / "run", method="on_policy_dpo",
                     reward=f"judge:{judge.url}", judge=judge.url, eval_fraction=0.25),
            callbacks=[lambda event: said.append(f"{event}")],
        )  # fmt: skip
        assert judge.keys and set(judge.keys) == {f"Bearer {KEYS['PREFTUNE_JUDGE_KEY']}"}
        judge.reply = lambda question: (401, {"X": "y"}, f"no such key {judge.keys[0]}")
        with pytest.raises(UserError, match="another key") as refused:
            train(settings(tiny_model, pairs_file, tmp_path / "again", method="on_policy_dpo",
                           reward=f"judge:{judge.url}", judge=judge.url))  # fmt: skip
    finally:
        judge.stop()
    written = [p for p in run.folder.rglob("*") if p.is_file()]
    assert {"config.yaml", "report.html", "state.json"} <= {p.name for p in written}
    texts = [p.read_bytes().decode("utf-8", "replace") for p in written]
    texts += [caplog.text, *capsys.readouterr(), *said, str(refused.value)]
    for value in KEYS.values():
        assert not any(value in text for text in texts)


def test_a_run_needs_no_network(
    tiny_model: str, pairs_file: str, tmp_path: Path, monkeypatch
) -> None:
    def no(*args: Any, **more: Any) -> NoReturn:
        raise AssertionError("a connection was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    with pytest.raises(AssertionError, match="a connection"):
        socket.create_connection(("127.0.0.1", 1))
    run = train(
        settings(tiny_model, pairs_file, tmp_path / "run", method="hypo", eval_fraction=0.25),
        reward=lambda completions: [float(len(c)) for c in completions],
    )
    assert (run.folder / "report.html").is_file()
    assert "http" not in (run.folder / "config.yaml").read_text()
