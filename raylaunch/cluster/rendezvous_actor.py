"""The rendezvous of one job of torchrun's agents, in an actor: the pure core behind one method.

Detached: it belongs to no agent, so that it outlives each, and it ends when the last one has gone. Should it die
itself, Ray restarts it empty, and the agents' next reports tell it what goes on. It sits on the head's node, without
which there is no cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

import ray

from raylaunch.cluster.coordinator_actor import NAMESPACE
from raylaunch.coordinator.agent_messages import Answer, Heard, Report, Tick
from raylaunch.coordinator.agent_rendezvous import AgentRendezvous

logger = logging.getLogger("raylaunch")

#: How long it waits for its first agent, in seconds: the one that started it may have been killed since.
FIRST_REPORT_SECONDS = 60.0
#: The last agent's answer is on its way for so long before the actor ends, in seconds.
FAREWELL_SECONDS = 0.2
#: Ray's own resource of the head's node (2.60), of which this takes next to nothing.
_ON_THE_HEAD = {"node:__internal_head__": 0.0001}


def rendezvous_name(job: str) -> str:
    """The actor's name in Ray, in the namespace `raylaunch`."""
    return f"raylaunch:{job}:rendezvous"


class RendezvousActor:
    """Holds the rendezvous of one job. Async (Ray 2.60: all its methods run on one event loop)."""

    def __init__(self, job: str) -> None:
        self._core = AgentRendezvous(job)
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at = float("inf")
        self._lonely = threading.Timer(FIRST_REPORT_SECONDS, _end)  # the loop serves nothing yet
        self._lonely.daemon = True
        self._lonely.start()

    async def contact(self, report: Report, known: Answer | None) -> Answer:
        """An agent reports. Answered when there is something else to say than it knows, at the latest in time for its
        next report.
        """  # noqa: D205 - one sentence
        self._lonely.cancel()
        self._handle(Heard(time.monotonic(), report))
        until = time.monotonic() + report.settings.keep_alive
        while True:
            changed = self._changed
            answer = self._core.answer(report)
            left = until - time.monotonic()
            if answer != known or left <= 0 or report.leaving:
                return answer
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    def _handle(self, event: Heard | Tick) -> None:
        decision = self._core.handle(event)
        loop = asyncio.get_running_loop()
        if decision.reason:
            logger.warning("rendezvous %s: %s", self._core.job, decision.reason)  # into Ray's log of this actor
        if decision.changed:
            self._changed.set()
            self._changed = asyncio.Event()
        if self._core.deserted:
            loop.call_later(FAREWELL_SECONDS, self._end_if_deserted)
        elif decision.wake_at != self._wake_at:
            self._wake_at = decision.wake_at
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(max(0.0, decision.wake_at - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._wake_at = float("inf")
        self._handle(Tick(time.monotonic()))

    def _end_if_deserted(self) -> None:
        if self._core.deserted:
            _end()


def _end() -> None:
    ray.kill(ray.get_runtime_context().current_actor)


def find_rendezvous(job: str, *, start: bool) -> Any:
    """The actor of this job. Every agent finds the same. If there is none: `start` it, or raise ValueError."""
    if not start:
        return ray.get_actor(rendezvous_name(job), namespace=NAMESPACE)
    remote_class: Any = ray.remote(RendezvousActor)
    return remote_class.options(
        name=rendezvous_name(job),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        resources=_ON_THE_HEAD,
        max_restarts=-1,
        max_concurrency=100_000,  # every agent has a call waiting here
    ).remote(job)
