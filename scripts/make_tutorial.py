"""Run the commands of docs/tutorial.md and write what they print below them.

python scripts/make_tutorial.py            about fifteen minutes on two cores

Each ```console block holds one command behind `$ ` and its output, which is replaced; nothing else
on the page is. Everything happens in a folder that is thrown away. Only stdout is shown.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from preftune import durable

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"```console\n\$ (.*?[^\\])\n(.*?)```", re.S)
FILE = re.compile(r"`(\w+\.(?:py|yaml|jsonl))`:\n\n```\w+\n(.*?)```", re.S)
MOST = 40
"""Lines of an output that are shown."""
WIDTH = "100"


def run(command: str, place: str) -> str:
    """What a command prints in `place`.

    Raises:
        SystemExit: it fails.
    """
    binaries = Path(sys.executable).parent
    began = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", f'export PATH="{binaries}:$PATH" COLUMNS={WIDTH}; {command}'],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    print(f"{time.perf_counter() - began:5.0f} s  {command.splitlines()[0]}", file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    more = [f"... {len(lines) - MOST} more lines"] if len(lines) > MOST else []
    return "".join(f"{line}\n" for line in [*lines[:MOST], *more])


def main() -> None:
    """Write the page anew."""
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        for name, content in FILE.findall(text):
            (Path(place) / name).write_text(content, encoding="utf-8")
        new = BLOCK.sub(lambda m: f"```console\n$ {m[1]}\n{run(m[1], place)}```", text)
    durable.write_text(PAGE, new)


if __name__ == "__main__":
    main()
