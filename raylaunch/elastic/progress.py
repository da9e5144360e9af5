"""How far a launch is, on the driver's console: a bar on a terminal (rich's, else tqdm's), plain lines elsewhere.

Shown once rank 0 has told of it (`between_steps(iteration, total)`, `events.progress`).
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any, Protocol

from raylaunch.coordinator.board import DEBUGGER, PAUSE, PROGRESS, Group
from raylaunch.worker.board_copy import BoardCopy

logger = logging.getLogger("raylaunch")

#: The least time between two looks of a bar, and between two plain lines, in seconds: choices.
BAR_SECONDS = 0.2
PLAIN_SECONDS = 10.0
#: Over how much time the rate is measured, in seconds: at least.
RATE_SECONDS = 2.0
#: How long the thread may take to end, in seconds.
END_SECONDS = 5.0


class Bar(Protocol):
    """A way to show it."""

    def show(self, iteration: int, total: int | None, text: str) -> None:
        """This is how far it is now."""

    def close(self) -> None:
        """Nothing more comes."""


class Pace:
    """Steps per second, of one generation: what was before is of another time."""

    def __init__(self) -> None:
        self._generation = -1
        self._from = self._to = (0, 0.0)
        self.rate: float | None = None

    def note(self, iteration: int, generation: int, now: float) -> None:
        """So far it was at that time (in seconds)."""
        if generation != self._generation or iteration < self._to[0]:
            self._generation, self._from, self.rate = generation, (iteration, now), None
        self._to = (iteration, now)
        steps, seconds = iteration - self._from[0], now - self._from[1]
        if seconds >= RATE_SECONDS:
            self.rate = steps / seconds
            self._from = self._to


def describe(iteration: int, total: int | None, group: Group, rate: float | None, *, paused: bool) -> str:
    """One line: `step 120/1000 (12 %), 35.2 steps/s; 4 ranks, generation 2, 1 restart`."""
    done = f"step {iteration}" if total is None else f"step {iteration}/{total}"
    if total:
        done += f" ({100 * iteration // total} %)"
    if rate is not None:
        done += f", {rate:.3g} steps/s"
    ranks = f"{group.world_size} rank{'s' * (group.world_size != 1)}" if group.world_size else "re-forming"
    restarts = f"{group.restarts} restart{'s' * (group.restarts != 1)}"
    return f"{done}; {ranks}, generation {group.generation}, {restarts}{', paused' if paused else ''}"


class PlainBar:
    """A line now and then: for files, and for consoles without rich and tqdm."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._at = -PLAIN_SECONDS
        self._left: str | None = None

    def show(self, iteration: int, total: int | None, text: str) -> None:
        """Print it, unless the last line was just now."""
        now = time.monotonic()
        self._left = text
        if now - self._at >= PLAIN_SECONDS or iteration == total:
            self._at = now
            self.close()

    def close(self) -> None:
        """Print the last that was not."""
        if self._left is not None:
            print(f"raylaunch: {self._left}", file=self._stream, flush=True)
            self._left = None


class RichBar:
    """rich's."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        # Without its redirections, which would replace this process's sys.stdout and sys.stderr.
        self._progress = Progress(*columns, console=Console(file=stream), redirect_stdout=False, redirect_stderr=False)
        self._progress.start()
        self._task = self._progress.add_task("", total=None)

    def show(self, iteration: int, total: int | None, text: str) -> None:
        """Draw it."""
        self._progress.update(self._task, completed=iteration, total=total, description=text)

    def close(self) -> None:
        """Leave it as it is."""
        self._progress.stop()


class TqdmBar:
    """tqdm's."""

    def __init__(self, stream: IO[str]) -> None:
        tqdm: Any = importlib.import_module("tqdm").tqdm
        self._bar = tqdm(file=stream, bar_format="{bar} {postfix}")

    def show(self, iteration: int, total: int | None, text: str) -> None:
        """Draw it."""
        self._bar.n, self._bar.total = iteration, total
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


def bar_for(stream: IO[str]) -> Bar:
    """The best that this console can show."""
    if stream.isatty():
        for kind in (RichBar, TqdmBar):
            try:
                return kind(stream)
            except ImportError:
                continue
    return PlainBar(stream)


class ProgressDisplay:
    """Shows what the driver's copy of the board says, for the block, in a thread of its own."""

    def __init__(self, copy: BoardCopy, stream: IO[str] | None = None) -> None:
        self._copy = copy
        self._stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._pace = Pace()
        self._shown: tuple[Any, ...] = ()
        self._told: Any = None
        self._live = Group()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raylaunch-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._copy.take({})
        self._thread.join(END_SECONDS)

    def _work(self) -> None:
        while not self._over.is_set():
            self._copy.wait(lambda: self._over.is_set() or self._now() != self._shown, 1.0)
            self._show()
            self._over.wait(BAR_SECONDS)
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _now(self) -> tuple[Any, ...]:
        copy = self._copy
        paused = copy.get(PAUSE, (0, False))[1]
        return copy.get(PROGRESS), copy.group, paused, copy.get(DEBUGGER)

    def _show(self) -> None:
        now = self._now()
        if now == self._shown:
            return
        self._shown = now
        progress, group, paused, debugger = now
        if group.world_size:
            self._live = group
        elif self._over.is_set():  # it has ended, and nothing is formed any more
            group = self._live
        if debugger is not None and debugger != self._told:
            self._told = debugger
            logger.warning("%s", debugger[-1])
        if progress is None:
            return
        iteration, total, generation = progress
        self._pace.note(iteration, generation, time.monotonic())
        if self._bar is None:
            self._bar = bar_for(self._stream)
        self._bar.show(iteration, total, describe(iteration, total, group, self._pace.rate, paused=paused))
