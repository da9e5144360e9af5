"""The process's own launcher, and what it has to do with others: `get_current_launcher()` is always valid."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylaunch.elastic.events import Events
from raylaunch.elastic.steps import Steps
from raylaunch.worker.board_copy import BoardCopy

if TYPE_CHECKING:
    from raylaunch.elastic.launcher import ElasticLauncher


@dataclass(frozen=True)
class Here:
    """A launcher with what stands on its process's copy of the board."""

    launcher: ElasticLauncher
    copy: BoardCopy
    events: Events
    steps: Steps

    @classmethod
    def of(cls, launcher: ElasticLauncher, copy: BoardCopy, generation: int | None = None) -> Here:
        """Made for a rank of this generation, or (None) for a process that is no rank."""
        events = Events(copy, generation)
        return cls(launcher, copy, events, Steps(events, copy))


_current: Here | None = None


def get_current_launcher() -> ElasticLauncher:
    """This process's launcher. Outside a launch it is one in eager mode: rank 0 of 1, on the process's own device."""
    return (_current or _outside()).launcher


def current_copy() -> BoardCopy | None:
    """This process's copy of the board; None outside of a launch."""
    return None if _current is None else _current.copy


def here(launcher: ElasticLauncher, copy: BoardCopy, *, launching: bool) -> Here:
    """In a rank, whichever launcher is asked, the process's own, but for one that launches from there; else its own."""
    if _current is None or (launching and copy is not _current.copy):
        return Here.of(launcher, copy)
    return _current


@contextmanager
def entered(launcher: ElasticLauncher, copy: BoardCopy, generation: int | None) -> Iterator[None]:
    """Make it the process's launcher for the block."""
    global _current  # noqa: PLW0603 - the process is the rank
    before, _current = _current, Here.of(launcher, copy, generation)
    try:
        yield
    finally:
        _current = before


@functools.cache
def _outside() -> Here:
    from raylaunch.elastic.launcher import ElasticLauncher

    return Here.of(ElasticLauncher(eager_mode=True).freeze(), BoardCopy())
