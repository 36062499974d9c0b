"""Ctrl-C and SIGTERM: the first ends the work and keeps what is done, the second kills."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from kvtool import ending
from kvtool.ending import End, Ended, check, held, until_ended

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")
BOTH = pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, End.INTERRUPTED), (signal.SIGTERM, End.TERMINATED)]
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"now": 100.0}
    fake = type("Clock", (), {"monotonic": staticmethod(lambda: now["now"])})
    monkeypatch.setattr(ending, "time", fake)
    return now


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What would have killed the process."""
    found: list[int] = []

    def kill(pid: int, number: int) -> None:
        assert signal.getsignal(number) is signal.SIG_DFL
        found.append(number)

    monkeypatch.setattr(ending, "os", type("Os", (), {"kill": kill, "getpid": os.getpid}))
    return found


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_ends_the_block_and_what_is_done_is_kept(number: int, how: End) -> None:
    done = []
    with until_ended() as outcome:
        for step in range(5):
            if step == 3:
                send(number)
            done.append(step)
    assert done == [0, 1, 2]
    assert outcome.how is how and how.exit_code == 128 + number


def test_a_block_that_comes_to_its_end_was_not_ended() -> None:
    with until_ended() as outcome:
        pass
    assert outcome.how is None


def test_errors_are_not_taken_for_an_end() -> None:
    with pytest.raises(ZeroDivisionError), until_ended():
        raise ZeroDivisionError


def test_pythons_own_ctrl_c_is_understood_too() -> None:
    with until_ended() as outcome:
        raise KeyboardInterrupt
    assert outcome.how is End.INTERRUPTED


@BOTH
def test_a_second_signal_kills_at_once(
    clock: dict[str, float], killed: list[int], number: int, how: End
) -> None:
    with until_ended():
        send(number)
    clock["now"] += 2 * ending.ECHO
    send(number)
    assert killed == [number]


def test_the_echo_of_a_signal_is_not_a_second_one(
    clock: dict[str, float], killed: list[int]
) -> None:
    """`timeout` sends it to the process and then to its group."""
    with until_ended():
        send(signal.SIGTERM)
    clock["now"] += ending.ECHO / 2
    send(signal.SIGTERM)
    assert killed == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@BOTH
def test_a_signal_that_got_lost_in_a_callback_is_raised_at_the_next_check(
    number: int, how: End
) -> None:
    import ctypes

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        send(number)

    with until_ended() as outcome:
        callback()  # Python prints what is raised in it, and goes on
        check()
        pytest.fail("nothing was raised")
    assert outcome.how is how
    check()  # it has arrived: nothing is raised again


def test_a_lost_signal_is_found_at_the_end_of_the_block() -> None:
    with until_ended() as outcome, contextlib.suppress(Ended):
        send(signal.SIGTERM)
    assert outcome.how is End.TERMINATED


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending.listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_the_second_signal_kills_a_process_that_does_not_come_to_its_end() -> None:
    code = """
import os, signal, time
from kvtool import ending
ending.listen()
ending.ECHO = 0
with ending.until_ended():
    os.kill(os.getpid(), signal.SIGTERM)
print("shown", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "shown\n")


@BOTH
def test_a_signal_in_a_held_block_is_obeyed_at_its_end(number: int, how: End) -> None:
    done = []
    with pytest.raises(Ended) as ended, held():
        send(number)
        done.append("in the block")
    assert done and ended.value.how is how


def test_a_signal_is_obeyed_though_the_held_block_fails_and_none_is_without_one() -> None:
    with held():
        pass
    with pytest.raises(Ended), held():
        send(signal.SIGINT)
        raise ValueError("lost beside the signal")
    assert signal.getsignal(signal.SIGINT) is ending._receive


def test_only_a_later_second_signal_kills_in_a_held_block(
    clock: dict[str, float], killed: list[int]
) -> None:
    with pytest.raises(Ended), held():
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # as `timeout` does
        assert not killed
        clock["now"] += 1
        send(signal.SIGINT)
    assert killed == [signal.SIGINT]
