"""A process that runs jobs of a folder until it is told to end: `python -m ... FOLDER THREADS
DEVICE`."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from preftune.comparing.fleet import CANNOT, LOOK, REASON, SAVED, work
from preftune.comparing.running import Unable
from preftune.errors import Saved


class Asked(BaseException):
    """Asked to end outside of training, where nothing is to be saved. No `Exception`: what a
    reward raises is caught and told to the user, and this must not be."""


def main(folder: Path, threads: int, device: str) -> int:
    """Take and run jobs.

    Returns:
        `SAVED` when it was asked to end and saved its run, `CANNOT` where jobs cannot be run here;
        why is said on stderr.
    """
    torch.set_num_threads(threads)
    _end_with_parent()
    signal.signal(signal.SIGTERM, _asked)
    try:
        while True:
            if not work(folder, threads=threads, device=device):
                time.sleep(LOOK)
    except (Asked, Saved, KeyboardInterrupt):
        return SAVED
    except Unable as error:
        print(f"{REASON}{error}", file=sys.stderr)
        return CANNOT


def _asked(number: int, frame: object) -> None:
    raise Asked


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
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
