"""The board's place in the coordinator actor: who offers, and who waits for news. Soft state, never in the journal.

When the actor is restarted its board is empty: everybody sees that by its epoch, and offers his whole copy. Workers
hear nothing before the driver has done so, or a rank that has just begun would not know of a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from raylaunch.coordinator.board import Board, Group, Note

#: How long a call waits for news, in seconds, before it is answered without any.
NEWS_SECONDS = 10.0


@dataclass(frozen=True)
class News:
    """What has changed since the asker's last call."""

    epoch: str
    seq: int
    version: int
    notes: dict[str, Note]
    group: Group


class BoardDoor:
    """The board, for calls that wait. Lives on the actor's loop."""

    def __init__(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._board = Board()
        self._group = Group()
        self._driver_told = asyncio.Event()
        self._waiting: dict[asyncio.Event, frozenset[str] | None] = {}

    def offer(self, notes: Mapping[str, Note], *, by_driver: bool) -> None:
        """Take in what somebody tells."""
        before = self._board.seq
        self._board.offer(notes)
        changed = self._board.since(before).keys()
        for event, names in self._waiting.items():
            if names is None or names & changed:
                event.set()
        if by_driver:
            self._driver_told.set()

    def set_group(self, group: Group) -> None:
        """The run stands so now."""
        if group != self._group:
            self._group = group
            for event, names in self._waiting.items():
                if names is None:
                    event.set()

    async def news(self, epoch: str, seq: int, names: frozenset[str] | None, group: Group) -> News:
        """Wait, bounded, for something new of these names; `names` None: the driver, who hears all, and of the group.

        `epoch`, `seq` and `group` are those of the last answer.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wait(epoch, seq, names, group), NEWS_SECONDS)
        told = self._driver_told.is_set() or names is None
        if not told:  # not this epoch's yet: the asker must ask again
            return News("", 0, 0, {}, self._group)
        return News(self._epoch, self._board.seq, self._board.version, self._since(epoch, seq, names), self._group)

    async def _wait(self, epoch: str, seq: int, names: frozenset[str] | None, group: Group) -> None:
        if names is not None:
            await self._driver_told.wait()
        event = asyncio.Event()
        self._waiting[event] = names
        try:
            while (
                epoch == self._epoch
                and not self._since(epoch, seq, names)
                and (names is not None or group == self._group)
            ):
                await event.wait()
                event.clear()
        finally:
            del self._waiting[event]

    def _since(self, epoch: str, seq: int, names: frozenset[str] | None) -> dict[str, Note]:
        known = seq if epoch == self._epoch else 0
        return self._board.since(known) if names is None else self._board.since(known, names)
