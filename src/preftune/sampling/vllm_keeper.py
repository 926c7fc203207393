"""Keeps a server for as long as somebody holds our standard input open, however they end.

    python vllm_keeper.py COMMAND …

A file by itself, run by its path: it imports nothing but the standard library. It leads a process
group of its own, which it ends with itself, so that no worker of the server outlives the run.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between asking and ending."""


def _end_when_let_go(server: "subprocess.Popen[bytes]") -> None:
    """The other end closes the pipe, or the system does for it."""
    sys.stdin.buffer.read()
    server.terminate()
    try:
        server.wait(GRACE)
    except subprocess.TimeoutExpired:
        server.kill()


def main(command: list[str]) -> int:
    """Run the command until it ends, or until standard input does."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: server.terminate())
    threading.Thread(target=_end_when_let_go, args=(server,), daemon=True).start()
    code = server.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)  # what the server left behind
        time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)  # and this process
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
