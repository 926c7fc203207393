"""A judge that fails while a run asks it."""

import functools
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Trial, Trials, kill_after, start, wait

from fake_judge import Judge
from preftune import asking, judge_server, judging, rewards

KINDS = ("refused for now", "dropped", "cut off", "late", "other ids")


def impatient() -> None:
    """In the run's process: faults that pass take no minutes."""
    quick = functools.partial(judge_server.connect, timeout=0.5, wait=0.01, tries=8)
    rewards.connect = judging.connect = quick
    asking._LONGEST_WAIT = 0.02


def answer(question: str) -> str:
    """A score that anybody can compute again."""
    return str(1 + sum(map(ord, question)) % 10)


def faulty(kind: str, question: str) -> Any:
    """What the server does in place of an answer."""
    if kind == "refused for now":
        return 503
    if kind == "dropped":
        return None
    if kind == "late":
        threading.Event().wait(0.8)
        return answer(question)
    whole = {"id": "of another", "choices": [
        {"index": 7, "message": {"content": answer(question)}},
        {"index": 0, "message": {"content": "1"}},
    ]}  # fmt: skip
    text = json.dumps(whole)
    return text[: len(text) // 2].encode() if kind == "cut off" else text.encode()


class JudgeTrials(Trials):
    """Runs whose rewards and evaluation come from a judge."""

    def __init__(self, model: str, data: str, work: Path, seed: int = 0) -> None:
        self.judge = Judge()
        self.judge.reply = answer
        self.asked = threading.Lock()
        more = {"reward": f"judge:{self.judge.url}", "judge": self.judge.url, "eval_fraction": 0.25}
        super().__init__(model, data, work, "on_policy_dpo", seed, before=impatient, **more)
        self.needed = len(_kept(self.whole))

    def stop(self) -> None:
        """End the server."""
        self.judge.stop()

    def sometimes(self, kind: str) -> Trial:
        """Every tenth request meets a fault, and the run goes on as if none had."""
        settings = self.fresh()
        self.judge.reply = self._one_in(10, lambda question: faulty(kind, question))
        code = wait(start(settings, impatient))
        self.judge.reply = answer
        if code:
            return Trial(f"judge: {kind}", "one in ten", f"ended with {code}")
        return self._checked(f"judge: {kind}", "one in ten", settings)

    def goes_away(self) -> Trial:
        """The server answers so many questions, and is back when the run is resumed."""
        settings = self.fresh()
        left = self.random.randrange(2, self.needed)
        where = f"after {left} answers"
        count = iter(range(left))

        def reply(question: str) -> Any:
            with self.asked:
                return answer(question) if next(count, None) is not None else 503

        self.judge.reply = reply
        code = wait(start(settings, impatient))
        self.judge.reply = answer
        if code not in (0, 2):
            return Trial("judge: goes away", where, f"ended with {code}")
        return self._checked("judge: goes away", where, settings)

    def run_killed(self) -> Trial:
        """kill -9 of the run while it asks."""
        settings = self.fresh()
        moment = self.random.uniform(0, self.seconds)
        kill_after(start(settings, impatient), moment, signal.SIGKILL)
        return self._checked("judge: run killed", f"{moment:.2f} s", settings)

    def _checked(self, kind: str, where: str, settings: Any) -> Trial:
        """Resumed, and each question's answer kept once."""
        folder = Path(settings["output"])
        code = wait(start(settings, impatient))
        if not code and _kept(folder) != _kept(self.whole):
            return Trial(kind, where, "other answers were kept")
        return self.finish(kind, where, settings)

    def _one_in(self, many: int, instead: Callable[[str], Any]) -> Callable[[str], Any]:
        count = iter(range(10**9))

        def reply(question: str) -> Any:
            with self.asked:
                fault = next(count) % many == many - 1
            return instead(question) if fault else answer(question)

        return reply


def _kept(folder: Path) -> list[str]:
    """Answers as they were kept, in the order of their questions."""
    return sorted((folder / "judge.jsonl").read_text(encoding="utf-8").splitlines())
