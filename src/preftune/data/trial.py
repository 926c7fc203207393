"""Somebody else's code, tried in a process of its own with little time and memory.

A chat template is a program that comes with a model. Its sandbox keeps it from files and from the
network, but not from looping for a day or from asking for all of the memory.
"""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 1
"""Of processor time; templates take milliseconds."""
PATIENCE = 20.0
"""Seconds on the clock: the processor may be busy with other things."""
MEMORY = 2**29
"""Bytes."""
LARGEST = 2**20
"""Of what it gives."""
_TIME, _ROOM, _LENGTH = 3, 4, 5
"""Exit codes."""


def excess(work: Callable[[], int]) -> str | None:
    """What `work` takes too much of; None: nothing, or it raises, which it will do here too.

    Args:
        work: gives the size of its result.
    """
    if not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():  # of other threads, none of which the child needs
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            os._exit(_confined(work))
        finally:
            os._exit(0)
    code = _wait(pid)
    if code in (_TIME, -signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {SECONDS} s"
    if code < 0:
        return f"ends its process ({signal.Signals(-code).name})"
    if code == _ROOM:
        return f"takes more than {MEMORY >> 20} MB of memory"
    return f"gives more than {LARGEST >> 10} KB of text" if code == _LENGTH else None


@contextmanager
def little_memory() -> Iterator[None]:
    """Hold this process to `MEMORY` more than it has; where the system cannot, do nothing."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = [n for n in (soft, hard, now + MEMORY) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(least), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _confined(work: Callable[[], int]) -> int:
    """The exit code of the child."""
    import faulthandler
    import resource  # not on Windows

    faulthandler.disable()  # a crash is the finding, and nothing to report
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    try:
        with little_memory():
            return _LENGTH if work() > LARGEST else 0
    except MemoryError:
        return _ROOM
    except Exception:
        return 0


def _wait(pid: int) -> int:
    """The child's exit code, negative for a signal; it is ended when patience is."""
    began = time.monotonic()
    pause = 1e-3
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return _TIME
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
