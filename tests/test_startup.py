"""Settings that must precede a process, and that a process replaces itself, once."""

import json
import os
import subprocess
import sys

import pytest

from preftune import startup

SCRIPT = """
import json, os, sys
from preftune import startup
before = os.getpid()
startup.restart()
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "told": os.environ.get(startup.MARK),
                  "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}}))
"""


def run(**environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", startup.MARK))}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "a b", "--c"],
        env=clean | environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    found = json.loads(out)
    assert found["pid"] == child.pid, "the process that was started is the one that goes on"
    assert found["argv"] == ["a b", "--c"]
    return found


glibc = pytest.mark.skipif(not startup.settings({}), reason="the C library is not glibc")


@glibc
def test_a_process_replaces_itself_once() -> None:
    found = run()
    assert found["told"] == "1"
    assert found["malloc"] == startup.settings({})


@glibc
def test_what_the_user_has_set_stays() -> None:
    assert run(MALLOC_ARENA_MAX="2")["malloc"] == {"MALLOC_ARENA_MAX": "2"}
    assert run(LD_PRELOAD="")["told"] == "1"


def test_another_allocator_is_left_alone() -> None:
    assert startup.settings({"LD_PRELOAD": "/usr/lib/libjemalloc.so"}) == {}
