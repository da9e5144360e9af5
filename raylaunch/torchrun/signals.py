"""Signals that end a launcher in order: each becomes an exception, on whose way the run is stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from raylaunch.errors import signal_name


class Stopped(SystemExit):
    """The launcher was told to end by a signal; its exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal_name(number)


def interrupt(number: int) -> BaseException:
    """What a signal is for the command: Ctrl-C as ever, and of the others each its exit code."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


@contextlib.contextmanager
def raising(
    numbers: Sequence[signal.Signals], made: Callable[[int], BaseException] = interrupt
) -> Iterator[Callable[[], None]]:
    """While the block runs, these signals raise what is `made` of them. On the main thread only; elsewhere nothing.

    A SIGHUP that is ignored, as under `nohup`, stays ignored: who has started it so wants it to survive its terminal.

    Yields a function that installs the handlers again: ray.init (2.60) takes SIGTERM over, and its C++ side would abort
    the process three seconds after one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        raise made(number)

    def install() -> None:
        for number in before:
            signal.signal(number, handle)

    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
