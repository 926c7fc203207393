"""A process that runs jobs of a folder until it is told to end: `python -m ... FOLDER THREADS`."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from preftune.comparing.fleet import LOOK, work
from preftune.errors import Saved


def main(folder: Path, threads: int) -> int:
    """Take and run jobs.

    Returns:
        75 when it was asked to end and saved its run.
    """
    torch.set_num_threads(threads)
    _end_with_parent()
    signal.signal(signal.SIGTERM, _asked)
    try:
        while True:
            if not work(folder):
                time.sleep(LOOK)
    except (Saved, KeyboardInterrupt):
        return 75


def _asked(number: int, frame: object) -> None:
    raise Saved("asked to end")


def _end_with_parent() -> None:
    """Ask this process to end, and to save, where its parent was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
