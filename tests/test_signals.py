"""Signals that ask a run to end, and one that makes it."""

import os
import signal
import threading

import pytest

from preftune import cli
from preftune.signals import Signals

pytestmark = pytest.mark.long


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks(number: int) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.asked is None
        send(number)
        assert signals.asked == number
        send(signal.SIGTERM)
        assert signals.asked == number, "the first decides the exit code"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        send(signal.SIGINT)
        assert signals.asked == signal.SIGINT
        send(signal.SIGINT)
        raise AssertionError("still here")


def test_another_thread_leaves_signals_alone() -> None:
    found: list[object] = []

    def work() -> None:
        with Signals() as signals:
            found.append(signals.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_exit_codes(number, code, train, here, capsys, monkeypatch) -> None:
    from preftune import run_output

    log = run_output.log

    def signalled(*args: object) -> None:
        log(*args)  # type: ignore[arg-type]
        send(number)

    monkeypatch.setattr(run_output, "log", signalled)
    assert cli.run(train("--max-steps", "3")) == code
    assert "--resume" in capsys.readouterr().err
    assert [p.name for p in (here / "out" / "checkpoints").iterdir()] == ["step-000001"]
    monkeypatch.setattr(run_output, "log", log)
    assert cli.run(["train", "--output", "out", "--resume"]) == 0
