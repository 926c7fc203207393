"""A judge's answers on disk: what has been paid for is not asked again.

A run that was killed, or whose server went away, repeats the updates since its last checkpoint.
With the answers kept it repeats them as they were, though a server may answer otherwise later.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path


class JudgeAnswers:
    """JudgeAnswers by question, a line of JSON each, written as they come; for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        torn = False
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            torn = not line.endswith(b"\n")
            try:
                row = json.loads(line)
                self._known[str(row["question"])] = str(row["answer"])
            except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a crash
                continue
        if torn:
            self._append("\n")

    def get(self, model: str, question: str, ask: Callable[[], str]) -> str:
        """The answer that is kept, or the one that `ask` gives.

        Args:
            model: which model of which server is asked.
        """
        digest = hashlib.sha256(f"{model}\0{question}".encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if digest in self._known:
                return self._known[digest]
        answer = ask()
        with self._lock:
            if digest not in self._known:  # two threads may have asked the same
                self._append(json.dumps({"question": digest, "answer": answer}) + "\n")
                self._known[digest] = answer
            return self._known[digest]

    def _append(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(text)
