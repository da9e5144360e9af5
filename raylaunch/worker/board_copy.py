"""A process's own copy of the board, for its threads: reading it asks nobody.

The driver has one, and each rank; `cluster/board_link.py` keeps them and the coordinator's together. Without a link, as
in a process that runs alone, it is all there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from raylaunch.coordinator.board import Board, Group, Note

#: Who writes: a rank, or this.
DRIVER = -1


class BoardCopy:
    """The copy. Every method may be called from any thread."""

    def __init__(self, writer: int = DRIVER) -> None:
        self.writer = writer
        self._board = Board()
        self._group = Group()
        self._changed = threading.Condition(threading.RLock())  # conditions read the copy

    @property
    def group(self) -> Group:
        """The run as it stands; only the driver is told."""
        return self._group

    def get(self, name: str, default: Any = None) -> Any:
        """What stands there, as far as it is known here.

        Without the lock: in a forked process, a DataLoader's say, it may be held for ever by a thread that isn't there.
        """
        return self._board.get(name, default)

    def put(self, name: str, value: Any) -> None:
        """Write a value; whoever is linked hears of it before long."""
        with self._changed:
            self._board.put(name, value, self.writer)
            self._changed.notify_all()

    def take(self, notes: Mapping[str, Note], group: Group | None = None, version: int = 0) -> None:
        """Take in what was heard."""
        with self._changed:
            self._board.offer(notes, version)
            self._group = group or self._group
            self._changed.notify_all()

    def everything(self) -> tuple[dict[str, Note], int]:
        """All that is known, and the number of the last change."""
        with self._changed:
            return self._board.since(0), self._board.seq

    def own_news(self, seq: int, timeout: float) -> tuple[dict[str, Note], int]:
        """Wait for a change after `seq`; what this process has written since, and the number of the last change."""
        with self._changed:
            self._changed.wait_for(lambda: self._board.seq > seq, timeout)
            changed = self._board.since(seq).items()
            return {name: note for name, note in changed if note.writer == self.writer}, self._board.seq

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until something holds, at most so many seconds; whether it does. It is looked at after every change."""
        until = time.monotonic() + timeout
        with self._changed:
            while not (holds := condition()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return holds

    def clear(self) -> None:
        """Forget all: the next run begins with nothing."""
        with self._changed:
            self._board, self._group = Board(), Group()
            self._changed.notify_all()
