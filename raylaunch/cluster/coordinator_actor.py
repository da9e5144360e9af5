"""The coordinator actor: the pure machine behind one door, and beside it the workers' pulses and the board.

The door is `handle(first, events) -> decisions`. It is idempotent: events are numbered, and a batch that was handled
before is answered from memory. After the actor's own death Ray starts it anew (`max_restarts=-1`), empty; it then
answers `Behind`, and the shell sends the journal from the start. The machine is pure, so it is where it was.

Pulses and `is_current` are soft state: never in the journal. The actor is async (Ray 2.60: all its methods run on one
event loop), so that a thousand pulses wait for nobody; only `is_current` waits for a restored machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylaunch.cluster.board_door import BoardDoor, News
from raylaunch.cluster.pulse import PulseReply, Pulses
from raylaunch.coordinator.board import Group, Note
from raylaunch.coordinator.commands import Process
from raylaunch.coordinator.events import Event
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.coordinator.roster import WorkerState
from raylaunch.errors import InternalError, RunInUseError
from raylaunch.spec import Timeouts

NAMESPACE = "raylaunch"


@dataclass(frozen=True)
class Behind:
    """The coordinator has handled events up to `seq` only; it wants the later ones first."""

    seq: int


@dataclass(frozen=True)
class Member:
    """One rank of the live generation."""

    rank: int
    node: str
    host: str
    process: Process


@dataclass(frozen=True)
class Status:
    """A view of the run at one moment."""

    phase: str
    generation: int
    members: dict[int, Member]
    ready_spares: int
    restarts: int


def actor_name(run_id: str) -> str:
    """The coordinator's name in Ray, in the namespace `raylaunch`."""
    return f"raylaunch:{run_id}:coordinator"


def group_name(run_id: str, group: int, *, minimum: bool) -> str:
    """The name of one of the run's placement groups."""
    return f"raylaunch:{run_id}:{'minimum' if minimum else 'growth'}:{group}"


class CoordinatorActor:
    """One run's coordinator. Every public method is called remotely, by the shell or by workers."""

    def __init__(self, run_id: str, timeouts: Timeouts, driver_pid: int, owns_job: bool) -> None:
        self._run_id = run_id
        self._machine = Coordinator()
        self._seq = 0
        self._last: dict[int, Decision] = {}
        self._restored = asyncio.Event()
        self._pulses = Pulses(timeouts)
        self._board = BoardDoor()
        if not owns_job:
            self._watch_driver(driver_pid)

    async def handle(self, first: int, events: list[Event], *, replay: bool = False) -> list[Decision] | Behind:
        """Handle events numbered from `first`. `replay`: their decisions are known, and not wanted again."""
        if first > self._seq + 1:
            return Behind(self._seq)
        decisions: list[Decision] = []
        for seq, event in enumerate(events, first):
            if seq > self._seq:
                self._last = {known: decision for known, decision in self._last.items() if known >= first}
                self._last[seq] = self._decide(event)
                self._seq = seq
            decisions += [] if replay else [self._last[seq]]
        machine = self._machine
        self._board.set_group(Group(machine.generation, len(machine.members), machine.restarts))
        if replay:
            self._last.clear()
            return []
        self._restored.set()
        return decisions

    def _decide(self, event: Event) -> Decision:
        try:
            return self._machine.handle(event)
        except InternalError as error:  # by the machine's promise nothing has changed
            return self._machine.refuse(error)

    async def pulse(self, workers: list[int]) -> PulseReply:
        """These workers are alive, and have their coordinator: a node's agent speaks for them, or one for itself."""
        self._pulses.heard(workers, time.monotonic())
        if not self._restored.is_set():
            return PulseReply(self._pulses.interval(0), ())
        roster = self._machine.roster
        known = [roster.workers.get(worker) for worker in workers]
        ended = [
            n for n, record in zip(workers, known, strict=True) if record is None or record.state is WorkerState.DYING
        ]
        return PulseReply(self._pulses.interval(len(roster.nodes)), tuple(ended))

    async def is_current(self, generation: int) -> bool:
        """Whether a generation may commit. A coordinator that is not restored yet doesn't know, and waits."""
        await self._restored.wait()
        return self._machine.is_current(generation)

    async def offer(self, notes: dict[str, Note], generation: int | None) -> bool:
        """Somebody tells what stands on his copy of the board: a rank of this generation, or (None) the driver.

        Whether it was heard: what a generation says that is not the live one isn't.
        """
        heard = generation is None or await self.is_current(generation)
        if heard:
            self._board.offer(notes, by_driver=generation is None)
        return heard

    async def news(self, epoch: str, seq: int, names: frozenset[str] | None, group: Group) -> News:
        """Wait, bounded, for news on the board. See `BoardDoor.news`."""
        return await self._board.news(epoch, seq, names, group)

    async def status(self) -> Status:
        """What the run is doing now, for people and for tests."""
        await self._restored.wait()
        machine = self._machine
        workers = machine.roster.workers
        members = {
            rank: Member(rank, worker.node, worker.host, worker.process)
            for rank, number in sorted(machine.members.items())
            if (worker := workers.get(number)) is not None and worker.process is not None
        }
        spares = sum(worker.state is WorkerState.READY for worker in workers.values())
        return Status(machine.phase.value, machine.generation, members, spares, machine.restarts)

    async def over(self) -> None:
        """Wait until this actor is gone: for whoever follows the run from elsewhere, and would like to be told."""
        await asyncio.Event().wait()

    async def next_silent(self) -> list[tuple[int, float]]:
        """Wait until some worker's pulse stays away; returns (worker, seconds of silence).

        A worker is reported when it has been silent for its lease (told to the user) and for `timeouts.unresponsive`.
        """
        while True:
            await asyncio.sleep(self._pulses.patience)
            workers = self._machine.roster.workers if self._restored.is_set() else {}
            if silent := self._pulses.silent(workers, time.monotonic()):
                return silent

    def _watch_driver(self, pid: int) -> None:
        """Remove the run's placement groups when the driver dies, which Ray 2.60 does only when its whole job ends.

        The driver is a Ray task or actor on this node, and this actor is detached: Ray ends at once what a dead actor
        owned. In a thread, because this is called outside the loop that serves the methods.
        """

        def watch() -> None:
            with contextlib.suppress(ProcessLookupError):  # it died while this actor was being restarted
                select.select([os.pidfd_open(pid)], [], [])
            for number, info in placement_group_table().items():
                if info["name"].startswith(f"raylaunch:{self._run_id}:"):
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
            ray.kill(ray.get_runtime_context().current_actor)

        threading.Thread(target=watch, name="raylaunch-driver-watch", daemon=True).start()


def start_coordinator(run_id: str, timeouts: Timeouts, *, owns_job: bool) -> Any:
    """Start the coordinator actor on this node, without resources. A run id in use raises `RunInUseError`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote_class: Any = ray.remote(CoordinatorActor)
    try:
        return remote_class.options(
            name=actor_name(run_id),
            namespace=NAMESPACE,
            lifetime=None if owns_job else "detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=100_000,  # pulses and is_current calls that wait while it restarts
            scheduling_strategy=here,
        ).remote(run_id, timeouts, os.getpid(), owns_job)
    except ValueError as error:
        if "already" in str(error) or "exists" in str(error):
            raise RunInUseError(
                f"run_id={run_id!r} is in use: a run with this id is going on in this cluster"
            ) from error
        raise
