"""The processes of a run: one, or several that `accelerate launch` started.

Draws and the order of data are functions of counters, so every process makes the same plan without
asking. Passes through a model, decoding and rewards are shared out; what comes of them is
exchanged, and every process goes on from the same state. With one process nothing of this happens.
"""

import atexit
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from preftune import startup
from preftune.errors import Elsewhere, UserError, exit_code
from preftune.samples import Samples, join
from preftune.strategy import launched, on_cpu, without_deepspeed

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds that a process which fails waits for the others to hear of it. They do not while they
wait in a pass of sharded weights; then its end is what wakes them."""


@dataclass(frozen=True)
class _Ended:
    """What a process that fails leaves in place of what was asked for."""

    message: str
    code: int


class Team:
    """One of `size` processes that do a run together."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        exchange: Callable[[Any], list[Any]] = lambda value: [value],
        add: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors,
        *,
        device: torch.device | None = None,
        sharded: bool = False,
        note: str | None = None,
    ) -> None:
        """
        Args:
            exchange: gives every process the values of all, by rank.
            add: the sums over all processes.
            device: this process's own.
            sharded: weights are spread over the processes, so that each pass is one of all.
            note: what the user should know of the strategy.
        """
        self.rank, self.size, self.device, self.sharded = rank, size, device, sharded
        self.note = note
        self._exchange, self._add = exchange, add
        self._over = False

    @property
    def main(self) -> bool:
        """This process writes, prints and logs."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; a place where all wait for one another.

        Raises:
            Elsewhere: another process has failed, and says why.
            UserError: another process is gone.
        """
        if self.size == 1:
            return [value]
        try:
            found = self._exchange(value)
        except RuntimeError as error:
            self._over = True
            raise _lost() from error
        ended = next((x for x in found if isinstance(x, _Ended)), None)
        if ended is not None:
            self._over = True
            raise Elsewhere(ended.message, ended.code)
        return found

    def agreed(self, value: T) -> T:
        """The main process's value."""
        return self.gather(value)[0]

    def by_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, alone."""
        if self.size == 1:
            return compute()
        found: Any = compute() if self.main else None
        return self.gather(found)[0]

    def ended(self, error: BaseException) -> BaseException:
        """What to raise for an error of this process, once the others know of it: the error where
        this process is the one to say it."""
        if self.size == 1 or self._over:
            return error
        self._over = True
        found = self._heard(_Ended(str(error), exit_code(error)))
        if isinstance(found, RuntimeError):  # what failed was waiting for a process that is gone
            return _lost()
        first = next((rank for rank, x in enumerate(found) if isinstance(x, _Ended)), self.rank)
        if first == self.rank:
            return error
        return Elsewhere(found[first].message, found[first].code)

    def wait_for_an_end(self) -> None:
        """Until another process has ended, or for a while."""
        self._heard(None)

    def _heard(self, value: Any) -> list[Any] | RuntimeError:
        """What the others say in return for the value; nothing where they do not listen in time."""
        heard: list[list[Any] | RuntimeError] = []

        def exchange() -> None:
            try:
                heard.append(self._exchange(value))
            except RuntimeError as error:
                heard.append(error)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return heard[0] if heard else []

    def mine(self, count: int) -> Tensor:
        """Places of this process's share of so many things."""
        return torch.arange(count)[self.rank :: self.size]

    def turns(self, work: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's share of the work, and whether it counts.

        Where each pass is one of all processes, one that has nothing left repeats a pass that does
        not count.
        """
        if not self.sharded:
            return [(x, True) for x in work[self.rank :: self.size]]
        own = range(self.rank, len(work) + -len(work) % self.size, self.size)
        return [(work[min(i, len(work) - 1)], i < len(work)) for i in own]

    def piece(self, tokens: int, budget: int | None) -> int | None:
        """Tokens of a pass where all of them are cut evenly, each process taking as many passes as
        the others; None: all at once."""
        if self.size == 1:
            return budget
        passes = 1 if budget is None else -(-tokens // budget)
        passes += -passes % self.size
        return max(1, -(-tokens // passes))

    def judged(self, judge: Callable[[Samples], T], samples: Samples) -> T:
        """Rewards [N, K], or a structure of these; each process asks about its share, once."""
        if self.size == 1:
            return judge(samples)
        parts, back = self._shares(len(samples.row), lambda own: judge(samples.take(own)))
        return pytree.tree_map(lambda *x: torch.cat(x)[back], *parts)

    def rows(self, count: int, draw: Callable[[Tensor], Samples]) -> Samples:
        """Samples of so many prompts, of which each process draws its share."""
        if self.size == 1:
            return draw(torch.arange(count))
        parts, back = self._shares(count, draw)
        return join(parts).take(back)

    def _shares(self, count: int, compute: Callable[[Tensor], Any]) -> tuple[list[Any], Tensor]:
        """What each process computed of its share, and the places that put it in order."""
        own = self.mine(count)
        parts = self.gather(compute(own) if len(own) else None)
        order = torch.cat([torch.arange(count)[rank :: self.size] for rank in range(self.size)])
        return [x for x in parts if x is not None], torch.argsort(order)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make every process's gradients the sum over all. Of sharded weights it has been made."""
        if self.size == 1 or self.sharded:
            return
        has = self.gather([p.grad is not None for p in parameters])
        reached = [p for p, *any_of in zip(parameters, *has, strict=True) if any(any_of)]
        for p in reached:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        summed = self._add([p.grad for p in reached if p.grad is not None])
        for p, grad in zip(reached, summed, strict=True):
            p.grad = grad


def _lost() -> UserError:
    return UserError(
        "another process of this run is gone: it was killed, or ran out of memory. "
        "Look at its own messages, then go on with --resume."
    )


_ALONE = Team()
_team: ContextVar[Team] = ContextVar("team", default=_ALONE)  # noqa: B039 - alone, it never changes


def current() -> Team:
    """The team that this process, or thread, works in; by default it is alone."""
    return _team.get()


@contextmanager
def working(team: Team) -> Iterator[Team]:
    """Work in a team. An error ends all of it: one process says why, the others `Elsewhere`."""
    token = _team.set(team)
    try:
        yield team
        team.gather(None)  # none is done before all are
    except BaseException as error:
        ended = team.ended(error)
        if ended is error:
            raise
        raise ended from error
    finally:
        _team.reset(token)


@contextmanager
def together() -> Iterator[Team]:
    """Work with the other processes that `accelerate launch` has started, if it has.

    Raises:
        UserError: a strategy that is not supported.
    """
    if startup.place()[1] == 1 or current().size > 1:
        yield current()
        return
    team = _join()
    try:
        with working(team):
            yield team
    except Elsewhere:
        # a launcher ends all when the first has ended: not before the one who says why
        team.wait_for_an_end()
        raise


def _join() -> Team:
    """Meet the others; waits until all are there."""
    strategy = launched()
    from accelerate import PartialState
    from accelerate.utils import reduce
    from torch import distributed

    with without_deepspeed():
        state = PartialState(cpu=on_cpu() or not torch.cuda.is_available())
    if state.process_index:
        logging.getLogger("preftune").setLevel(logging.ERROR)  # the main process says it
    atexit.register(state.destroy_process_group)
    # messages go by gloo on every device: it sees at once that a process is gone
    gloo = distributed.new_group(backend="gloo")

    def exchange(value: Any) -> list[Any]:
        found: list[Any] = [None] * state.num_processes
        distributed.all_gather_object(found, value, group=gloo)
        return found

    return Team(
        state.process_index, state.num_processes, exchange,
        lambda tensors: reduce(tensors, reduction="sum"),  # type: ignore[reportReturnType]
        device=state.device, sharded=strategy.sharded, note=strategy.note,
    )  # fmt: skip
