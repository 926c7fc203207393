"""A team whose processes are threads: they exchange in memory, and start at once."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from preftune.team import Team, working

T = TypeVar("T")
PATIENCE = 30


class Meeting:
    """Where the threads of a team meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.held: list[Any] = [None] * size
        self.meetings = 0

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        """What one of them calls."""

        def exchange(value: Any) -> list[Any]:
            try:
                self.held[rank] = value
                self.meetings += self.barrier.wait() == 0
                found = list(self.held)
                self.barrier.wait()  # read by all before it is written again
            except threading.BrokenBarrierError as error:
                raise RuntimeError("connection closed by peer") from error
            return found

        return exchange


def team_of(size: int, work: Callable[[Team], T], *, sharded: bool = False) -> list[T | Exception]:
    """What each of so many threads, which are a team, gives or raises."""
    meeting, gradients = Meeting(size), Meeting(size)
    out: list[T | Exception] = [RuntimeError("did not run")] * size

    def one(rank: int) -> None:
        add = gradients.of(rank)

        def summed(tensors: list[Tensor]) -> list[Tensor]:
            return [sum(x[1:], x[0].clone()) for x in zip(*add(tensors), strict=True)]

        try:
            with working(Team(rank, size, meeting.of(rank), summed, sharded=sharded)) as team:
                out[rank] = work(team)
        except Exception as error:
            out[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    return out
