"""What is fuzzed: each target takes bytes and returns, or fails with an error that a user is shown.

Anything else that comes out of one is a defect.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from preftune import checkpoint, config, durable, judge_server, judging, loop, methods
from preftune.collecting import Cursor
from preftune.data import chat, formats
from preftune.durable import Damaged
from preftune.errors import UserError
from preftune.policies.categorical import Categorical
from preftune.rounds import World

_folder = Path(tempfile.mkdtemp(prefix="preftune-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _folder / name
    path.write_bytes(data)
    return path


def config_yaml(data: bytes) -> None:
    """A configuration file."""
    with contextlib.suppress(UserError):
        config.load(_file("config.yaml", data))


def data_rows(data: bytes) -> None:
    """A file of rows, in four formats."""
    for ending in (".jsonl", ".json", ".csv", ".txt"):
        with contextlib.suppress(UserError):
            loaded = formats.load_examples(_file(f"rows{ending}", data), want="any")
            json.dumps([r.reason for r in loaded.rejected])


def manifest(data: bytes) -> None:
    """A checkpoint's manifest."""
    folder = _folder / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"a")
    (folder / durable.MANIFEST).write_bytes(data)
    with contextlib.suppress(Damaged):
        durable.verify(folder)


def _state() -> loop.State:
    world = World(
        policy=Categorical(torch.zeros(2, 3)), reference=None, data=None, prompts=None,
        reward=None, seed=0, batch_size=1, micro_batch_tokens=None,
    )  # fmt: skip
    return loop.start(methods.get("sft"), world, loop.Settings(max_steps=1, learning_rate=0.1))


def _checkpoint(tensors: bytes, plain: bytes) -> None:
    """Load a checkpoint whose manifest is right."""
    folder = _folder / "step-000001"
    folder.mkdir(exist_ok=True)
    files = {}
    for name, data in (("state.safetensors", tensors), ("state.json", plain)):
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / durable.MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    with contextlib.suppress(UserError):
        checkpoint.load(_state(), folder)


_GOOD_TENSORS = save({"policy/logits": torch.zeros(2, 3)})
_GOOD_PLAIN: dict[str, Any] = {
    "step": 1, "version": 1, "seconds": 0.5, "warned": [], "skipped": 0, "best": None,
    "first_entropy": None, "micro_batch_tokens": None, "identity": {},
    "groups": [{"cursor": Cursor().__dict__, "queries": 0, "kept": [], "round": None}],
}  # fmt: skip


def safetensors(data: bytes) -> None:
    """A checkpoint's tensors."""
    _checkpoint(data, json.dumps(_GOOD_PLAIN).encode())


def checkpoint_json(data: bytes) -> None:
    """What a checkpoint holds beside them."""
    _checkpoint(_GOOD_TENSORS, data)


def judge_reply(data: bytes) -> None:
    """What a judge's server answers."""
    answer = judge_server.content(judge_server.parse(data))
    for found in (judging.winner(answer), judging.score(answer)):
        assert found is None or 0 <= found <= 10, found


_tokenizer: list[Any] = []


def chat_template(data: bytes) -> None:
    """A chat template of somebody else's."""
    if not _tokenizer:
        from conftest import save_tiny_model
        from preftune import huggingface

        _tokenizer.append(huggingface.load_tokenizer(save_tiny_model(_folder / "tiny")))
    with contextlib.suppress(UserError, chat.RowError):
        renderer = chat.Renderer(_tokenizer[0], template=str(_file("chat.jinja", data)))
        renderer.prompt_ids("Say something.")


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        config_yaml, data_rows, manifest, safetensors, checkpoint_json, judge_reply, chat_template,
    )
}  # fmt: skip

_TEMPLATE = (
    b"{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    b"{% endfor %}"
)
SEEDS: dict[str, list[bytes]] = {
    "config_yaml": [
        b"method: dpo\nmodel: m\ndata: d.jsonl\nbeta: 0.1\n",
        b"method: {name: mine, terms: [{source: offline, labeller: given, objective: dpo}]}\n",
        b"a: &a [1, 2]\nb: *a\n", b"learning_rate: 1e-6\nmax_steps: 10\nresume: true\n",
        b"? [1]\n: 2\n", b"!!python/object/apply:os.system ['true']\n", b"d: 2001-99-99\n",
    ],
    "data_rows": [
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": true}\n',
        b"prompt,chosen,rejected\na,b,c\n", b'[{"prompt": "a"}, null, 3]', b"\xff\xfe\x00",
    ],
    "manifest": [
        b'{"format": 1, "files": {"a": {"bytes": 1, "sha256": "ca978112"}}}',
        b'{"files": {"../a": {}}}', b"[]", b"{",
    ],
    "safetensors": [
        _GOOD_TENSORS, save({"policy/logits": torch.zeros(3, 2), "x": torch.zeros(0)}),
        (2**63).to_bytes(8, "little") + b"{}", b"",
    ],
    "checkpoint_json": [json.dumps(_GOOD_PLAIN).encode(), b'{"step": []}', b"[" * 5000],
    "judge_reply": [
        b'{"choices": [{"message": {"content": "A"}}]}',
        b'{"choices": [{"message": {"content": "Score: 7/10"}}]}',
        b'{"choices": [{"message": {"content": "<think>A</think>[[B]]"}}]}', b'{"choices": []}',
    ],
    "chat_template": [
        _TEMPLATE, b"{{ raise_exception('no') }}", b"{% for i in range(3) %}{{ i }}{% endfor %}",
        b"{{ ''.__class__ }}", b"{{ messages[5].x.y }}", b"{% if",
    ],
}  # fmt: skip
