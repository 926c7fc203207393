"""Inputs for each target: near a seed, by edits of bytes, or of its form with wrong parts in it."""

import gzip
import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st
from targets import CONFIG_KEYS, GOOD_ADAPTER, GOOD_MODEL, GOOD_PLAIN, SEEDS, TEMPLATE

_PIECES = [
    b"null", b"true", b"1e999", b"-1", b"9" * 400, b"NaN", b'"', b"'", b"{", b"}", b"[", b"]",
    b":", b",", b"\n", b"\t", b"\0", b"\xff", b"\xed\xa0\x80", b"{{", b"}}", b"{%", b"%}", b"&a ",
    b"*a", b"!!", b"<script>", b"../", b"\xe2\x80\xae", b"# ", b"? ", b"- ", b"| ",
]  # fmt: skip
LARGEST = 2**16


@st.composite
def near(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with a few edits: bits turned, cut, put in, repeated, spliced, nested."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 6))
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == 2:
            data[place:place] = draw(st.sampled_from(_PIECES))
        elif kind == 3:
            piece = data[place : place + draw(st.integers(1, 16))]
            data[place:place] = piece * draw(st.sampled_from((1, 2, 3, 50)))
        elif kind == 4:
            other = draw(st.sampled_from(seeds))
            data[place:] = other[draw(st.integers(0, len(other))) :]
        elif kind == 5:
            opening, closing = draw(st.sampled_from(((b"[", b"]"), (b"{", b"}"), (b"(", b")"))))
            depth = draw(st.sampled_from((2, 20, 200, 1200)))
            data = bytearray(opening * depth + bytes(data) + closing * depth)
        else:
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data[:LARGEST])


_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**12]),
    st.floats(), st.text(max_size=20),
    st.sampled_from(["", "auto", "../..", "/", "<script>", "{{ 7 }}", "\ud800", "1e3", "nan"]),
)  # fmt: skip
anything = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Whatever JSON can hold."""


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _mapping(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), anything, max_size=5)


@st.composite
def _replaced(draw: st.DrawFn, whole: Any) -> Any:
    """A nested value, some part of which is anything."""
    whole = json.loads(json.dumps(whole))
    place, key, now = None, None, whole
    for _ in range(draw(st.integers(1, 6))):
        if not isinstance(now, (dict, list)) or not now:
            break
        keys = list(now) if isinstance(now, dict) else list(range(len(now)))
        place, key = now, draw(st.sampled_from(keys))
        now = now[key]
    if place is not None:
        place[key] = draw(anything)
    return whole


@st.composite
def _safetensors(draw: st.DrawFn) -> bytes:
    """A header of anything before bytes of anything."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "F8", "x"]),
            "shape": st.lists(st.integers(-1, 2**40), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 2**40), min_size=2, max_size=2),
        }
    )
    names = st.sampled_from(["policy/logits", "__metadata__", "group0/kept0/tokens"])
    header = _json(draw(st.dictionaries(names, entry | anything, max_size=3)))
    size = draw(st.sampled_from([len(header), 0, 2**31, 2**63]))
    return size.to_bytes(8, "little") + header + draw(st.binary(max_size=64))


_PARTS = [
    "{% for i in range(9) %}", "{% for m in messages %}", "{% endfor %}", "{% if m %}",
    "{% endif %}", "{{ 'a' * 9999999999 }}", "{{ m['content'] }}", "{{ 'a'.center(9**11) }}",
    "{% set x = messages * 9999 %}", "{{ x }}", "{% macro f() %}", "{{ f() }}", "{% endmacro %}",
    "{{ messages | tojson(indent=99999999) }}", "{% set n = namespace(s='a') %}",
    "{% set n.s = n.s + n.s %}", "{{ n.s }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}",
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum(2) }}", TEMPLATE.decode(),
]  # fmt: skip
_ROWS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "score", "columns"]
STRUCTURED: dict[str, st.SearchStrategy[bytes]] = {
    "config_yaml": _mapping(CONFIG_KEYS).map(
        lambda v: yaml.safe_dump(v).encode("utf-8", "replace")
    ),
    "data_rows": st.lists(_mapping(_ROWS).map(_json), max_size=4).map(b"\n".join),
    "packed_rows": near(SEEDS["data_rows"]).map(gzip.compress),
    "manifest": _replaced(json.loads(SEEDS["manifest"][0])).map(_json),
    "safetensors": _safetensors(),
    "checkpoint_json": _replaced(GOOD_PLAIN).map(_json),
    "judge_reply": _replaced(json.loads(SEEDS["judge_reply"][0])).map(_json),
    "chat_template": st.lists(st.sampled_from(_PARTS), max_size=8).map(
        lambda p: "".join(p).encode()
    ),
    "reward_values": anything.map(_json),
    "model_config": _replaced(GOOD_MODEL).map(_json),
    "adapter_config": _replaced(GOOD_ADAPTER).map(_json),
    "run_folder": st.lists(_mapping(["step", "loss", "reward", "kl", "prompt"]).map(_json)).map(
        b"\n".join
    ),
}
STRATEGIES: dict[str, Callable[[], st.SearchStrategy[bytes]]] = {
    name: lambda name=name: (
        near(SEEDS[name]) | STRUCTURED[name] if name in STRUCTURED else near(SEEDS[name])
    )
    for name in SEEDS
}
