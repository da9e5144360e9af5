"""Between two steps: what the driver asks for is done by all ranks at the same step.

Each rank hears of a request at its own moment. If it acted at once, one rank would wait before a step in which its
peers already are, and none would ever be paused. So the ranks agree, by a small all-reduce in a group of its own (gloo,
whatever the backend is). It is begun between two steps and its result is looked at between the next two, when it is
long there: nobody waits for it. The first one of a process is waited for, so that a standing pause holds from the first
step.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raylaunch.context import get_context
from raylaunch.coordinator.board import SAVED
from raylaunch.elastic.events import Events
from raylaunch.worker.board_copy import BoardCopy

#: How long ranks wait for one another in an agreement, in seconds: some of them may be saving. A choice; that a rank
#: has ended, its peers notice at once.
AGREE_SECONDS = 86_400.0
#: A paused rank looks around this often, in seconds, also when it is told of nothing: a choice.
LOOK_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed that they are asked for: numbers of requests, 0 for none."""

    pause: int = 0
    save: int = 0
    stop: bool = False


class Steps:
    """The agreements of one rank, or of a process that is alone."""

    def __init__(self, events: Events, copy: BoardCopy) -> None:
        self._events = events
        self._copy = copy
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None
        self._begun = False
        self._saved = 0

    def between(self, save: Callable[[], Any] | None) -> bool:
        """Do what is asked for; whether training goes on."""
        asked = self._result()
        while True:
            if asked.save > self._saved and save is not None:
                save()
                self._saved = asked.save
                asked = self._agree()  # by which all have saved
                if self._copy.writer <= 0:
                    self._copy.put(SAVED, self._saved)
                continue
            if asked.stop:
                return False
            if not asked.pause:
                self._begin()
                return True
            self._wait(asked.pause, can_save=save is not None)
            asked = self._agree()

    def _wait(self, number: int, *, can_save: bool) -> None:
        """Wait in a pause, until it is over or something else is asked for.

        Not bounded by itself: a pause lasts until it is taken back, or the driver ends, and all that it owns with it.
        """
        events = self._events
        if self._copy.writer <= 0:
            events.paused.set()

        def over() -> bool:
            wanted = can_save and events.trigger_save_checkpoint.is_set() and events.save_number > self._saved
            return events.pause_number != number or events.stop_all_tasks.is_set() or wanted

        while not self._copy.wait(over, LOOK_SECONDS):
            pass

    def _heard(self) -> list[int]:
        """What this process has heard."""
        events = self._events
        unsaved = events.save_number if events.trigger_save_checkpoint.is_set() else 0
        return [events.pause_number, unsaved, int(events.stop_all_tasks.is_set())]

    def _begin(self) -> None:
        """Begin the agreement whose result is looked at after the next step."""
        group = self._make_group()
        if group is not None:
            import torch.distributed as dist

            tensor = _tensor(self._heard())
            self._pending = tensor, dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def _result(self) -> Asked:
        if self._pending is None:
            return self._agree()
        (tensor, work), self._pending = self._pending, None
        work.wait()
        return _asked(tensor.tolist())

    def _agree(self) -> Asked:
        """Agree now, and wait for it."""
        group = self._make_group()
        if group is None:
            return _asked(self._heard())
        import torch.distributed as dist

        tensor = _tensor(self._heard())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return _asked(tensor.tolist())

    def _make_group(self) -> Any:
        """The group for agreements: made by all ranks, at their first call. None where there is no process group."""
        dist = sys.modules.get("torch.distributed")
        if not self._begun and dist is not None and dist.is_available() and dist.is_initialized():
            self._begun = True
            # Not torch's number: a rank's group may be there in eager mode, when no other rank comes here.
            if get_context().world_size > 1:
                self._group = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=AGREE_SECONDS))
        return self._group


def _tensor(numbers: list[int]) -> Any:
    import torch

    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _asked(numbers: list[int]) -> Asked:
    return Asked(numbers[0], numbers[1], bool(numbers[2]))
