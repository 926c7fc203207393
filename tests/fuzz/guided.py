"""The same targets, guided by what of the code an input reaches: `make fuzz`.

python tests/fuzz/guided.py [--runs 10000] [--seed 1] [TARGET ...]

Each target is a process of its own, which libFuzzer ends at the first input that breaks it; that
input is printed, and the exit code is 1. Needs atheris (Linux and macOS).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

PATIENCE = 5
"""Seconds a case may take."""
MEMORY = 3 * 2**10
"""MB that a process may take, libraries and the fuzzer's own tables included."""
INSIDE = ["preftune", "yaml", "jinja2"]
"""Packages whose branches guide it."""


def one(name: str, arguments: list[str]) -> None:
    """Fuzz a target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=INSIDE):
        from targets import TARGETS

    target = TARGETS[name]
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


def main() -> int:
    """Fuzz all of them; 1 if any broke."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
        return 0
    from targets import SEEDS, SLOW, TARGETS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    broken = []
    for name in asked.targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            for i, data in enumerate(SEEDS[name]):
                (Path(folder) / str(i)).write_bytes(data)
            runs = asked.runs // SLOW.get(name, 1)
            flags = [f"-runs={runs}", f"-seed={asked.seed}", f"-timeout={PATIENCE}"]
            flags += [f"-rss_limit_mb={MEMORY}", "-max_len=65536", f"-artifact_prefix={folder}/"]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, folder, *flags],
                capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        seconds = time.perf_counter() - began
        print(f"{name}: {runs} cases, {seconds:.0f} s, {'broken' if done.returncode else 'sound'}")
        if done.returncode:
            broken.append(name)
            print(done.stderr[-4000:], file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
