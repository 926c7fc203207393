"""Pairs ahead of their annotators: drawn in a thread of its own, so that nobody waits."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from preftune.labelling.book import Book, Choice, Judgement, Pair
from preftune.numerics import stream_key

Draw = Callable[[int], Pair | None]
"""The pair of a number; None where there is none to judge, the two being one text."""
AHEAD = 4
"""Pairs that are ready before they are asked for."""


@dataclass(frozen=True)
class Shown:
    """A pair on an annotator's screen."""

    pair: Pair
    left: int
    """The response on the left, 0 or 1."""


class Supply:
    """Hands pairs to annotators: each to one, or to two for a share of them."""

    def __init__(self, book: Book, draw: Draw, *, count: int, overlap: float, seed: int) -> None:
        """Begin to draw.

        Args:
            draw: called with 0 to count - 1, those that an earlier session has drawn left out.
            overlap: share of pairs that two annotators are to judge.
        """
        self.book, self.count = book, count
        self.failed: BaseException | None = None
        self._draw, self._overlap, self._seed = draw, overlap, seed
        self._leases: dict[str, int] = {}
        self._next = 1 + max(book.pairs, default=-1)
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="pairs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Draw no more; the one under way is finished."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def show(self, annotator: str, wait: float) -> Shown | None:
        """A pair for them; the same again until they have judged it.

        Args:
            wait: seconds, at most, for one to be drawn.

        Returns:
            None where none is ready (`waiting`) or none is left.

        Raises:
            the error that drawing failed with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._idle() or self._open(annotator) is not None, wait)
            if self.failed is not None:
                raise self.failed
            pair = self._open(annotator)
            if pair is None:
                return None
            self._leases[annotator] = pair.id
            self._changed.notify_all()
            return Shown(pair, self._left(pair, annotator))

    @property
    def waiting(self) -> bool:
        """More is to come."""
        with self._changed:
            return not self._idle()

    def say(self, annotator: str, number: int, choice: Choice, seconds: float) -> bool:
        """Write down a judgement; False where it is not of what stands on their screen, as after a
        second window or a key pressed twice."""
        with self._changed:
            if self._leases.get(annotator) != number:
                return False
            pair = self.book.pairs[number]
            self.book.judge(Judgement(
                pair=number, annotator=annotator, choice=choice,
                left=self._left(pair, annotator), seconds=seconds,
            ))  # fmt: skip
            del self._leases[annotator]
            self._changed.notify_all()
            return True

    def undo(self, annotator: str) -> None:
        """Take back their last judgement, which is then on their screen again."""
        with self._changed:
            pair = self.book.undo(annotator)
            if pair is not None:
                self._leases[annotator] = pair.id

    def _idle(self) -> bool:
        return self._ended or self.failed is not None or self._next >= self.count

    def _open(self, annotator: str) -> Pair | None:
        pairs, judged = self.book.pairs, self.book.judged
        if annotator in self._leases:
            return pairs[self._leases[annotator]]
        taken: dict[int, int] = {}
        for number, _ in judged:
            taken[number] = taken.get(number, 0) + 1
        for number in self._leases.values():
            taken[number] = taken.get(number, 0) + 1
        for number, pair in pairs.items():
            free = taken.get(number, 0) < 1 + self._twice(number)
            if free and (number, annotator) not in judged:
                return pair
        return None

    def _ready(self) -> int:
        taken = {n for n, _ in self.book.judged} | set(self._leases.values())
        return len(self.book.pairs.keys() - taken)

    def _twice(self, number: int) -> bool:
        return _uniform(self._seed, "overlap", number) < self._overlap

    def _left(self, pair: Pair, annotator: str) -> int:
        return int(_uniform(self._seed, "left", pair.id, annotator) < 0.5)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._idle() or self._ready() < AHEAD)
                if self._idle():
                    self._changed.notify_all()
                    return
                number = self._next
            try:
                pair = self._draw(number)
            except BaseException as error:
                with self._changed:
                    self.failed = error
                    self._changed.notify_all()
                return
            with self._changed:
                if pair is not None:
                    self.book.add(pair)
                self._next = number + 1
                self._changed.notify_all()


def _uniform(seed: int, *what: int | str) -> float:
    return stream_key(seed, *what) / 2**63
