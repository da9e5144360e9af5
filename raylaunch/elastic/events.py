"""What the driver and the ranks of a launch tell one another between the steps: `Events`.

    launcher.events.pause.set()                  # on the driver, in another thread than the one that launches
    launcher.events.paused.wait(60)

They go over the coordinator, so they cross nodes, and stand until they are taken back: a generation that is formed
while a pause goes on is paused from its first step. Reading an event asks nobody.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from raylaunch.coordinator.board import PAUSE, PAUSED, PROGRESS, SAVE, SAVED, STOP
from raylaunch.worker.board_copy import BoardCopy

#: How long `Event.wait` waits unless it is told otherwise, in seconds.
WAIT_SECONDS = 60.0


class Event:
    """One event, used as a `threading.Event`, but that every wait is bounded."""

    def __init__(self, name: str, copy: BoardCopy, is_set: Callable[[], bool], set_it: Callable[[], None]) -> None:
        self._name = name
        self._copy = copy
        self._is_set = is_set
        self._set = set_it

    def set(self) -> None:
        """Tell it. Returns at once."""
        self._set()

    def is_set(self) -> bool:
        """Whether it stands, as far as it is known here. Asks nobody."""
        return self._is_set()

    def wait(self, timeout: float = WAIT_SECONDS) -> bool:
        """Wait until it stands, at most so many seconds; whether it does."""
        return self._copy.wait(self._is_set, timeout)

    def __repr__(self) -> str:
        return f"<event {self._name}: {'set' if self._is_set() else 'not set'}>"


class Events:
    """The events of a launcher. What is set on the driver before a launch stands when it begins; its end clears all.

    Attributes:
        pause: all ranks shall wait between two steps. Set until `resume` is.
        paused: they do so, all ranks of the live generation, or of the one that is formed next.
        resume: no pause goes on.
        stop_all_tasks: all ranks shall end in order: `between_steps` returns False.
        trigger_save_checkpoint: all ranks shall save. Set until they have.
        finished_save_checkpoint: every checkpoint that was asked for has been saved.
    """

    def __init__(self, copy: BoardCopy, generation: int | None = None) -> None:
        self._copy = copy
        self._generation = generation
        self.pause = Event("pause", copy, lambda: self.pause_number > 0, self._pause)
        self.paused = Event("paused", copy, self._is_paused, self._tell_paused)
        self.resume = Event("resume", copy, lambda: self.pause_number == 0, self._resume)
        self.stop_all_tasks = Event("stop_all_tasks", copy, lambda: bool(copy.get(STOP)), lambda: copy.put(STOP, True))
        self.trigger_save_checkpoint = Event(
            "trigger_save_checkpoint", copy, lambda: self.save_number > copy.get(SAVED, 0), self._trigger_save
        )
        self.finished_save_checkpoint = Event(
            "finished_save_checkpoint",
            copy,
            lambda: copy.get(SAVED, 0) >= self.save_number > 0,
            lambda: copy.put(SAVED, self.save_number),
        )

    def progress(self, iteration: int, total: int | None = None) -> None:
        """Tell how far training is: the driver shows what rank 0 says. Returns at once.

        Args:
            iteration: how many steps are done.
            total: of how many; None: nobody knows.

        Raises:
            TypeError: these are no whole numbers.
        """
        numbers = operator.index(iteration), None if total is None else operator.index(total)
        if self._copy.writer <= 0:
            self._copy.put(PROGRESS, (*numbers, self._generation or 0))

    @property
    def iteration(self) -> int:
        """How many steps are done; 0 before the first word of it."""
        return int(self._copy.get(PROGRESS, (0, None, 0))[0])

    @property
    def total(self) -> int | None:
        """Of how many."""
        total: int | None = self._copy.get(PROGRESS, (0, None, 0))[1]
        return total

    @property
    def pause_number(self) -> int:
        """Which pause goes on, counted from 1; 0: none."""
        number, goes_on = self._copy.get(PAUSE, (0, False))
        return int(number) if goes_on else 0

    @property
    def save_number(self) -> int:
        """How many checkpoints have been asked for."""
        return int(self._copy.get(SAVE, 0))

    def _pause(self) -> None:
        number, goes_on = self._copy.get(PAUSE, (0, False))
        if not goes_on:
            self._copy.put(PAUSE, (number + 1, True))

    def _resume(self) -> None:
        number, goes_on = self._copy.get(PAUSE, (0, False))
        if goes_on:
            self._copy.put(PAUSE, (number, False))

    def _is_paused(self) -> bool:
        number, generation = self._copy.get(PAUSED, (0, 0))
        live = self._copy.group.generation if self._generation is None else self._generation
        return bool(self.pause_number == number > 0 and generation >= live)

    def _tell_paused(self) -> None:
        self._copy.put(PAUSED, (self.pause_number, self._generation or 0))

    def _trigger_save(self) -> None:
        self._copy.put(SAVE, self.save_number + 1)
