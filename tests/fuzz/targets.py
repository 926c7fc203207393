"""What is fuzzed: each target takes bytes and returns, or fails with an error that a user is shown.

Anything else that comes out of one is a defect.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import lzma
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from preftune import (
    adapters,
    asking,
    checkpoint,
    cli,
    config,
    durable,
    huggingface,
    judge_server,
    judging,
    loop,
    methods,
    rewards,
)
from preftune.alarms import Watch
from preftune.collecting import Cursor
from preftune.data import chat, formats
from preftune.durable import Damaged
from preftune.errors import UserError
from preftune.policies.categorical import Categorical
from preftune.report import write_report
from preftune.reward_kinds import Judged
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


def packed_rows(data: bytes) -> None:
    """The same, compressed."""
    for ending in (".jsonl.gz", ".jsonl.xz", ".parquet"):
        with contextlib.suppress(UserError):
            formats.load_examples(_file(f"rows{ending}", data), want="any")


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
GOOD_PLAIN: dict[str, Any] = {
    "step": 1, "version": 1, "seconds": 0.5, "watch": asdict(Watch()), "skipped": 0,
    "best": None, "pending": None, "micro_batch_tokens": None, "identity": {},
    "groups": [{"cursor": Cursor().__dict__, "queries": 0, "kept": [], "round": None}],
}  # fmt: skip


def safetensors(data: bytes) -> None:
    """A checkpoint's tensors."""
    _checkpoint(data, json.dumps(GOOD_PLAIN).encode())


def checkpoint_json(data: bytes) -> None:
    """What a checkpoint holds beside them."""
    _checkpoint(_GOOD_TENSORS, data)


def judge_reply(data: bytes) -> None:
    """What a judge's server answers."""
    answer = judge_server.content(asking.parse(data))
    for found in (judging.winner(answer), judging.score(answer)):
        assert found is None or 0 <= found <= 10, found


@functools.cache
def _tiny() -> Path:
    """A model's folder."""
    from byte_model import save_tiny_model

    return Path(save_tiny_model(_folder / "tiny"))


@functools.cache
def _tokenizer() -> Any:
    return huggingface.load_tokenizer(str(_tiny()))


def chat_template(data: bytes) -> None:
    """A chat template of somebody else's."""
    with contextlib.suppress(UserError, chat.RowError):
        renderer = chat.Renderer(_tokenizer(), template=str(_file("chat.jinja", data)))
        renderer.prompt_ids("Say something.")


def _beside(name: str, data: bytes) -> str:
    """A model's folder in which one file is another."""
    folder = _folder / f"with-{name}"
    if not folder.exists():
        shutil.copytree(_tiny(), folder)
    (folder / name).write_bytes(data)
    return str(folder)


def tokenizer_json(data: bytes) -> None:
    """A tokenizer."""
    with contextlib.suppress(UserError):
        huggingface.load_tokenizer(_beside("tokenizer.json", data))


def model_config(data: bytes) -> None:
    """A model's configuration."""
    with contextlib.suppress(UserError):
        huggingface.load_model(_beside("config.json", data), torch.float32)


@functools.cache
def _adapter() -> Path:
    """An adapter's folder."""
    from adapted import write

    return Path(write(_folder / "adapter", str(_tiny())))


def adapter_config(data: bytes) -> None:
    """What a folder says of its adapter."""
    (_adapter() / "adapter_config.json").write_bytes(data)
    with contextlib.suppress(UserError):
        adapters.load(str(_adapter()), torch.float32)


def weight_map(data: bytes) -> None:
    """The list of a model's files."""
    folder = _beside("model.safetensors.index.json", data)
    (Path(folder) / "model.safetensors").unlink(missing_ok=True)
    (Path(folder) / "other.safetensors").write_bytes(b"")
    with contextlib.suppress(UserError):
        huggingface.load_model(folder, torch.float32)


def reward_values(data: bytes) -> None:
    """What a user's reward function returns."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    asked = Judged(prompts=["a", "b"], completions=["c", "d"], tokens=[1, 1])
    with contextlib.suppress(UserError):
        found = rewards.judge(rewards.Function("f", lambda completions: values), asked)
        assert len(found) == 2 and all(math.isfinite(x) for x in found), found


def run_folder(data: bytes) -> None:
    """A run's folder that somebody hands on, in a report."""
    folder = _folder / "run"
    folder.mkdir(exist_ok=True)
    lines = [f"{name}.jsonl" for name in ("metrics", "samples", "times", "alarms")]
    for name in (*lines, "evaluation.json", "config.yaml"):
        (folder / name).write_bytes(data)
    with contextlib.suppress(UserError):
        write_report([folder], _folder / "report.html")


def command_line(data: bytes) -> None:
    """A file of rows given to a command: 0, or 2 and a sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        rows = str(_file("given.jsonl", data))
        code = cli.run(["inspect", "--model", str(_tiny()), "--data", rows])
    assert code in (0, 2) and "Traceback" not in err.getvalue(), (code, err.getvalue())


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        config_yaml, data_rows, packed_rows, manifest, safetensors, checkpoint_json, judge_reply,
        chat_template, tokenizer_json, model_config, adapter_config, weight_map,
        reward_values, run_folder, command_line,
    )
}  # fmt: skip

SLOW = {
    "chat_template": 4,
    "run_folder": 10,
    "command_line": 10,
    "model_config": 5,
    "adapter_config": 5,
}
"""How many times fewer cases these get."""
TEMPLATE = (
    b"{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    b"{% endfor %}"
)
GOOD_MODEL = json.loads((_tiny() / "config.json").read_bytes())
GOOD_ADAPTER = json.loads((_adapter() / "adapter_config.json").read_bytes())
CONFIG_KEYS = list(config.Config.model_fields)
_ROWS = [
    b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": true}\n',
]
SEEDS: dict[str, list[bytes]] = {
    "config_yaml": [
        b"method: dpo\nmodel: m\ndata: d.jsonl\nbeta: 0.1\n",
        b"method: {name: mine, terms: [{source: offline, labeller: given, objective: dpo}]}\n",
        b"a: &a [1, 2]\nb: *a\n", b"learning_rate: 1e-6\nmax_steps: 10\nresume: true\n",
        b"? [1]\n: 2\n", b"!!python/object/apply:os.system ['true']\n", b"d: 2001-99-99\n",
    ],
    "data_rows": [
        *_ROWS, b"prompt,chosen,rejected\na,b,c\n", b'[{"prompt": "a"}, null, 3]', b"\xff\xfe\x00",
    ],
    "packed_rows": [
        gzip.compress(_ROWS[0] * 9), lzma.compress(_ROWS[0]), gzip.compress(b"[" * 10**6), b"PAR1",
    ],
    "manifest": [
        b'{"format": 1, "files": {"a": {"bytes": 1, "sha256": "ca978112"}}}',
        b'{"format": 1, "files": {"a": {"bytes": Infinity, "sha256": "ca978112"}}}',
        b'{"files": {"../a": {}}}', b"[]", b"{",
    ],
    "safetensors": [
        _GOOD_TENSORS, save({"policy/logits": torch.zeros(3, 2), "x": torch.zeros(0)}),
        (2**63).to_bytes(8, "little") + b"{}", b"",
    ],
    "checkpoint_json": [json.dumps(GOOD_PLAIN).encode(), b'{"step": []}', b"[" * 5000],
    "judge_reply": [
        b'{"choices": [{"message": {"content": "A"}}]}',
        b'{"choices": [{"message": {"content": "Score: 7/10"}}]}',
        b'{"choices": [{"message": {"content": "<think>A</think>[[B]]"}}]}', b'{"choices": []}',
    ],
    "chat_template": [
        TEMPLATE, b"{{ raise_exception('no') }}", b"{% for i in range(3) %}{{ i }}{% endfor %}",
        b"{{ ''.__class__ }}", b"{{ messages[5].x.y }}", b"{% if",
    ],
    "tokenizer_json": [(_tiny() / "tokenizer.json").read_bytes(), b"{}"],
    "model_config": [json.dumps(GOOD_MODEL).encode(), b"{}", b'{"model_type": "llama"}'],
    "adapter_config": [json.dumps(GOOD_ADAPTER).encode(), b"{}", b'{"peft_type": "LORA"}'],
    "weight_map": [
        b'{"weight_map": {"lm_head.weight": "other.safetensors"}}',
        b'{"metadata": {}, "weight_map": {"a": "../tiny/model.safetensors"}}',
    ],
    "reward_values": [b"[1, 2.5]", b"[NaN, 1]", b'{"a": [1, 2]}', b"[[1], [2]]", b"[true, null]"],
    "run_folder": [
        b'{"step": 1, "loss": 0.5, "kl": 0.1, "seconds": 1}\n{"step": 2, "loss": null}\n',
        b'{"step": 1, "prompt": "<script>", "response": "x", "reward": 1, "tokens": 3}\n',
        b"method: dpo\nmodel: m\n", b'{2, "loss": null}\n',
    ],
    "command_line": _ROWS,
}  # fmt: skip
