"""The pulse: how the coordinator knows that workers live, and how they know that it does.

    worker: WorkerPulse   --->   node agent: NodePulse   --->   coordinator: Pulses
    always one call open         one call for its workers       who was heard when, who is silent

A worker without contact to the coordinator ends itself when its lease is over. What a node's agent says for all its
workers costs the coordinator one call; a worker whose agent is gone, or stuck, speaks for itself. Soft state: never in
the journal.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
import ray.exceptions

from raylaunch.coordinator.roster import Worker, WorkerState
from raylaunch.spec import Timeouts
from raylaunch.worker.processes import REPLACED, LastWords

#: One call of a node with eight workers costs the coordinator some 1.3 ms of a core, nearly all of it Ray's (2.60).
#: With this many seconds per node between calls, all of them together cost it less than a tenth of one.
SECONDS_PER_NODE = 0.02
#: ... and nobody speaks more often than this, in seconds.
SHORTEST_SECONDS = 1.0
#: How long a worker that speaks for itself waits for an answer, in seconds.
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class PulseReply:
    """What the coordinator says to a pulse."""

    #: Seconds until the next one is due.
    interval: float
    #: Those of the workers that have been replaced: they should not be there any more.
    ended: tuple[int, ...]


class Pulses:
    """The coordinator's side: when each worker was heard. Times are of the coordinator's monotonic clock."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._thresholds = sorted((timeouts.lease, timeouts.unresponsive))
        self._seen: dict[int, float] = {}
        self._reported: dict[int, int] = {}  # worker -> how many thresholds of silence have been reported

    def heard(self, workers: list[int], now: float) -> None:
        """These workers are alive."""
        for worker in workers:
            self._seen[worker] = now
            self._reported.pop(worker, None)

    def interval(self, nodes: int) -> float:
        """Seconds between two pulses in a run on so many nodes. A lease holds several, whatever that costs."""
        return min(
            max(SHORTEST_SECONDS, nodes * SECONDS_PER_NODE), self._timeouts.lease / 4, self._timeouts.unresponsive / 4
        )

    @property
    def patience(self) -> float:
        """How often to look for silence, in seconds."""
        return min(1.0, self._thresholds[0] / 4)

    def silent(self, workers: Mapping[int, Worker], now: float) -> list[tuple[int, float]]:
        """Workers that have been silent for their lease, or for `timeouts.unresponsive`, each told once; seconds."""
        self._seen = {worker: at for worker, at in self._seen.items() if worker in workers}
        found = []
        for worker, record in workers.items():
            if record.state in (WorkerState.STARTING, WorkerState.DYING):
                continue
            seconds = now - self._seen.setdefault(worker, now)
            passed = sum(seconds >= threshold for threshold in self._thresholds)
            if passed > self._reported.get(worker, 0):
                self._reported[worker] = passed
                found.append((worker, seconds))
        return found


class NodePulse:
    """The node agent's side: the workers' calls wait here for the next call to the coordinator. Lives on its loop."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._task: asyncio.Task[None] | None = None

    async def beat(self, worker: int) -> bool:
        """A worker is alive. Returns when the coordinator has been told: whether the worker has been replaced."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._speak())
        if worker not in self._waiting:  # otherwise it has given an earlier call up
            self._waiting[worker] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._waiting[worker])

    async def _speak(self) -> None:
        interval = SHORTEST_SECONDS
        while True:
            waiting, self._waiting = self._waiting, {}
            try:
                if waiting:
                    reply: PulseReply = await self._coordinator.pulse.remote(list(waiting))
                    interval = reply.interval
                    for worker, answer in waiting.items():
                        answer.set_result(worker in reply.ended)
            except ray.exceptions.RayError:  # it is being restarted, or gone: the workers' leases tell which
                self._waiting = {**waiting, **self._waiting}
            await asyncio.sleep(interval)


class WorkerPulse:
    """The worker's side, in a thread of its own; it ends the process that has been replaced, or whose lease is over."""

    def __init__(self, worker: int, coordinator: Any, lease: float, last_words: LastWords) -> None:
        self._worker = worker
        self._coordinator = coordinator
        self._lease = lease
        self._last_words = last_words
        #: The node's agent, once it is known and as long as it answers.
        self.agent: Any = None
        threading.Thread(target=self._beat, name="raylaunch-pulse", daemon=True).start()

    def _beat(self) -> None:
        """A process that was stopped, or a long hold of the GIL, makes the lease look over: so one more try first."""
        contact = time.monotonic()
        while True:
            over = time.monotonic() - contact > self._lease
            try:
                replaced, pause = self._ask_agent() if self.agent is not None and not over else self._ask()
            except Exception:  # restarting, unreachable or gone: the lease tells which
                if over:
                    self._end(f"its lease of {self._lease:g} s without contact to the coordinator is over")
                replaced, pause = False, min(SHORTEST_SECONDS, self._lease / 4)
            else:
                contact = time.monotonic()
            if replaced:
                self._end(REPLACED)
            time.sleep(pause)

    def _ask_agent(self) -> tuple[bool, float]:
        agent = self.agent
        try:
            return ray.get(agent.pulse.remote(self._worker), timeout=self._lease / 2), 0.0
        except Exception:
            self.agent = None
            raise

    def _ask(self) -> tuple[bool, float]:
        reply: PulseReply = ray.get(
            self._coordinator.pulse.remote([self._worker]), timeout=min(ANSWER_SECONDS, self._lease / 2)
        )
        return bool(reply.ended), reply.interval

    def _end(self, reason: str) -> NoReturn:
        print(f"raylaunch: this worker ends itself: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - its own log
        self._last_words.exit(1, reason)
