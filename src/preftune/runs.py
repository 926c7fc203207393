"""A run folder: settings, metrics, samples, the model. Every file appears whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preftune.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a crash leaves the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def dumps(value: Any) -> str:
    """JSON on one line; numbers that are not finite become null, as JSON has none."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class RunFolder:
    """Where a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a folder that already holds something, or a file."""
        for place in (path, *path.parents):
            if place.is_file():
                raise UserError(f"output '{path}': '{place}' is a file. Give a folder.")
        if path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"output '{path}' is not empty. Give another folder, or --resume to go on with it."
            )

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """Make the folder and write the resolved settings."""
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_config(config)
        return folder

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml."""
        import yaml

        write_text(
            self.path / "config.yaml",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        )

    def read_config(self) -> dict[str, Any]:
        """config.yaml, as it was written."""
        import yaml

        return yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file of the folder."""
        with open(self.path / name, "a", encoding="utf-8") as out:
            out.writelines(dumps(row) + "\n" for row in rows)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file; a torn last line is left out."""
        path = self.path / name
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_back(self, step: int) -> None:
        """Drop what was logged after `step`: it will be done again."""
        for name in ("metrics.jsonl", "times.jsonl", "samples.jsonl"):
            rows = [r for r in self.read(name) if r.get("step", 0) <= step]
            if (self.path / name).exists():
                write_text(self.path / name, "".join(dumps(r) + "\n" for r in rows))

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file of the folder."""
        write_text(
            self.path / name, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"
        )

    def read_json(self, name: str) -> Any:
        """What a JSON file holds; None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
