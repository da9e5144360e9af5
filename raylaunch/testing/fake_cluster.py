"""A cluster that exists only in virtual time, and carries the coordinator's commands out the way Ray 2.60 does.

Placement groups are placed whole or wait; after a node loss the lost bundles come back together or not at all; what
was queued in a lost bundle starts when it is back, or dies when it was queued before Ray knew of the loss; a dead
worker's peers report "connection closed"; what a frozen or unreachable worker has to say arrives late or never.

Everything is drawn from one random stream, so a run is a function of its schedule and seed. What *goes wrong* stands
in `fake_faults.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.errors import Ending, EndKind
from raylaunch.testing.fake_parts import (
    CONNECTION_CLOSED,
    GROUP_TIMEOUT,
    KNOWABLE,
    FakeClock,
    FakeGeneration,
    FakeWorker,
)
from raylaunch.testing.fake_placement import FakePlacement
from raylaunch.testing.schedules import Schedule

#: How long training takes, in seconds: one of these ranges is drawn for each generation. A launcher's runs are shorter,
#: so that several meet the faults.
TRAINING_SECONDS = ((0.05, 0.5), (10.0, 40.0), (20.0, 70.0), (20.0, 70.0))
HELD_TRAINING_SECONDS = ((0.05, 0.5), (0.5, 5.0), (5.0, 20.0))


class FakeCluster:
    """Worker processes and what they say; `placement` holds the nodes and groups, `clock` all that is under way."""

    def __init__(self, schedule: Schedule, rng: random.Random) -> None:
        self.spec = schedule.spec
        self.clock = FakeClock(rng)
        self.placement = FakePlacement(self.spec, self.clock, self._begin)
        self.workers: dict[int, FakeWorker] = {}
        self.generations: dict[int, FakeGeneration] = {}
        self.wake: float | None = None
        self.durations = HELD_TRAINING_SECONDS if schedule.runs else TRAINING_SECONDS
        # Set by faults: how many more starts or joins misbehave, and until when every generation crashes.
        self.start_fails = self.start_hangs = self.cannot_work = self.join_hangs = 0
        self.crash_until = 0.0
        self._carry: dict[type[c.Command], Callable[[Any], None]] = {
            c.RequestBundles: self._request,
            c.ReleaseBundles: self._release,
            c.StartWorker: self._start,
            c.CallRoll: self._call_roll,
            c.Promote: self._promote,
            c.CollectResult: self._collect,
            c.StopWorkers: self._stop,
            c.KillWorkers: self._kill,
            c.WakeAt: self._wake_at,
            c.Tell: lambda _: None,
            c.Finish: lambda _: None,
        }
        for slots in schedule.nodes:
            self.placement.add_node(slots)

    # -- commands, messages and deeds ---------------------------------------------------------------------------------

    def say(self, worker: FakeWorker, event: type[e.Event], *args: Any) -> None:
        """A worker tells something: at once, or when it can again, or never."""
        if worker.alive and (worker.frozen or worker.cut):
            worker.held.append((event, args))
        else:
            self.clock.post(0.0005 + self.clock.rng.random() * 0.004, event, *args)

    def act(self, worker: FakeWorker, delay: float, function: Callable[..., None], *args: Any) -> None:
        """Let a worker do something later: not when it is dead by then, and only after a freeze."""
        self.clock.after(delay, self._act, worker, function, args)

    def _act(self, worker: FakeWorker, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not worker.alive:
            return
        if worker.frozen:
            worker.pending.append((function, args))
        else:
            function(worker, *args)

    def carry_out(self, command: c.Command) -> None:
        """Do what the coordinator says."""
        self._carry[type(command)](command)

    def _wake_at(self, command: c.WakeAt) -> None:
        self.wake = max(command.at, self.clock.now) + self.clock.rng.random() * 0.002

    def _request(self, command: c.RequestBundles) -> None:
        self.placement.request(command)

    def _release(self, command: c.ReleaseBundles) -> None:
        for number in command.groups:
            self.remove_group(number)

    def remove_group(self, number: int) -> None:
        """A placement group goes: Ray ends what runs in it."""
        if number not in self.placement.groups:
            return
        for worker in self.workers.values():
            if worker.group == number and worker.alive:
                self.clock.after(0.01, self.die, worker, Ending(EndKind.KILLED, message="its group was removed"))
        self.placement.remove(number)

    # -- the life of a worker ----------------------------------------------------------------------------------------

    def _start(self, command: c.StartWorker) -> None:
        worker = FakeWorker(command.worker, command.group, command.bundle, slow=1.5 if command.gently else 1.0)
        self.workers[worker.id] = worker
        if command.group in self.placement.groups:  # otherwise Ray never answers
            self._begin(worker)

    def _begin(self, worker: FakeWorker) -> None:
        group = self.placement.groups[worker.group]
        name = group.nodes[worker.bundle]
        if name is None:
            group.queued.append(worker)
        elif not self.placement.nodes[name].alive:
            self.placement.nodes[name].doomed.append(worker)  # Ray does not know yet; it will die when Ray does
        else:
            worker.node, worker.alive, worker.state = name, True, "starting"
            worker.frozen = self.placement.nodes[name].frozen
            self.act(worker, self.clock.any(0.05, 0.6) * worker.slow, self._started)

    def _started(self, worker: FakeWorker) -> None:
        host = self.placement.nodes[worker.node].host
        slots = (
            self.placement.groups[worker.group].slots[worker.bundle] if worker.group in self.placement.groups else []
        )
        devices = tuple(str(slot) for slot in sorted(slots)) if self.spec.gpus_per_worker else ()
        versions = self.spec.versions
        if self.cannot_work > 0 and self.clock.rng.random() < 0.5:
            self.cannot_work -= 1
            versions = {"torch": "2.12.1"}
        self.say(worker, e.WorkerStarted, worker.id, worker.node, host, 100 + worker.id, 7, versions, devices)
        worker.state = "warming"
        if self.start_hangs > 0:
            self.start_hangs -= 1
            return
        self.act(worker, self.clock.any(0.2, 2.5) * worker.slow, self._ready)

    def _ready(self, worker: FakeWorker) -> None:
        if self.cannot_work > 0:
            self.cannot_work -= 1
            self.fail(worker, Ending(EndKind.CANNOT_WORK, message="torch is 2.12 here, 2.13 there", fatal=True))
        elif self.start_fails > 0:
            self.start_fails -= 1
            if self.clock.rng.random() < 0.5:
                self.fail(worker, Ending(EndKind.RAISED, error_type="ImportError", message="no torch"))
            else:
                self.die(worker, Ending(EndKind.KILLED))
        else:
            worker.state = "spare"
            memory = self.clock.rng.choice((1 << 30, 8 << 30, 64 << 30))
            self.say(worker, e.WorkerReady, worker.id, 20_000 + worker.id, memory, 300 << 20)

    def _call_roll(self, command: c.CallRoll) -> None:
        for number in command.workers:
            worker = self.workers[number]
            self.act(worker, self.clock.any(0.004, 0.036), self._answer, command.roll)

    def _answer(self, worker: FakeWorker, roll: int) -> None:
        self.say(worker, e.WorkerAnswered, worker.id, roll)

    def _promote(self, command: c.Promote) -> None:
        worker, number = self.workers[command.worker], command.assignment.generation
        generation = self.generations.setdefault(number, FakeGeneration(number, command.assignment.world_size))
        generation.members.append(worker)
        worker.generation = generation
        if worker.alive:
            worker.state = "promoted"
            self.act(worker, self.clock.any(0.002, 0.05), self._arrive)
        else:  # it died, and nobody knows yet
            generation.deaths += 1
            self.break_up(generation)

    def _arrive(self, worker: FakeWorker) -> None:
        generation = worker.generation
        assert generation is not None
        worker.state = "joining"
        generation.arrived += 1
        if self.clock.rng.random() < 0.5:  # the others leave it to the coordinator
            patience = self.spec.timeouts.process_group * self.clock.any(0.6, 1.6)
            self.act(worker, patience, self._suffer, GROUP_TIMEOUT, "joining")
        if generation.broken:
            self.act(worker, self.clock.any(0.05, 1.0), self._suffer, CONNECTION_CLOSED, "joining")
        elif generation.arrived == generation.world_size:
            if self.join_hangs > 0:
                self.join_hangs -= 1
                return
            self.clock.after(self.clock.any(0.01, 0.04), self._formed, generation)

    def _formed(self, generation: FakeGeneration) -> None:
        if generation.broken or any(w.frozen for w in generation.members):
            return
        seconds = self.clock.any(*self.clock.rng.choice(self.durations))
        for worker in generation.members:
            worker.state = "running"
            self.say(worker, e.WorkerJoined, worker.id, generation.number)
            self.act(worker, seconds + self.clock.any(0.0, 0.2), self._return)
        if self.clock.now < self.crash_until:
            victim = self.clock.rng.choice(generation.members)
            ending = Ending(EndKind.RAISED, error_type="ValueError", message="the same every time")
            self.act(victim, self.clock.any(0.01, 0.4), self.fail, ending)

    def _return(self, worker: FakeWorker) -> None:
        generation = worker.generation
        if worker.state == "running" and generation is not None and not generation.broken:
            if any(w.frozen and w.state == "running" for w in generation.members):
                self.act(worker, 1.0, self._return)  # blocked in a collective until its peer thaws
                return
            worker.state = "returned"
            self.say(worker, e.WorkerReturned, worker.id, generation.number)

    def _collect(self, command: c.CollectResult) -> None:
        worker = self.workers[command.worker]
        if worker.alive:
            self.act(worker, self.clock.any(0.001, 0.05), self._collected, command.generation)
        else:
            self.clock.post(0.02, e.WorkerLost, worker.id, Ending(EndKind.KILLED, message="its value went with it"))

    def _collected(self, worker: FakeWorker, generation: int) -> None:
        self.say(worker, e.ResultCollected, worker.id, generation)

    # -- how a worker ends -------------------------------------------------------------------------------------------

    def fail(self, worker: FakeWorker, ending: Ending) -> None:
        """A worker tells how it failed; its process lives on."""
        if worker.state in ("failed", "returned"):
            return
        worker.state = "failed"
        self.say(worker, e.WorkerFailed, worker.id, worker.generation.number if worker.generation else 0, ending)
        if worker.generation is not None:
            self.break_up(worker.generation, worker, ending)

    def die(self, worker: FakeWorker, ending: Ending) -> None:
        """A worker's process ends; the shell hears of it a little later."""
        if not worker.alive:
            return
        worker.alive = False
        self.clock.after(self.clock.any(0.005, 0.03), self._tell_of_death, worker, ending, worker.killed)
        if worker.generation is not None:
            worker.generation.deaths += not worker.killed
            if worker.state != "returned":
                self.break_up(worker.generation, worker, ending)

    def _tell_of_death(self, worker: FakeWorker, ending: Ending, ours: bool) -> None:
        """The shell hears of a death: how it came, if it came before our own kill."""
        if ours:
            self.clock.post(0.0, e.WorkerLost, worker.id, Ending(EndKind.SIGNALED, signal=9), True)
            return
        self.clock.post(0.001, e.WorkerLost, worker.id, ending, False)
        if ending.kind is EndKind.KILLED and self.clock.rng.random() < 0.3:  # the kernel tells, a little later
            known = Ending(EndKind.SIGNALED, signal=9)
            self.clock.post(self.clock.any(0.002, 1.0), e.WorkerLost, worker.id, known, False)

    def break_up(self, generation: FakeGeneration, by: FakeWorker | None = None, ending: Ending | None = None) -> None:
        """A member is gone: most peers see their connections close, the others hang until the group's timeout."""
        if generation.broken:
            return
        generation.broken = True
        audible = by is not None and not (by.cut or by.frozen or by.killed)
        if ending is not None and audible and not ending.collateral and ending.kind in KNOWABLE:
            generation.cause = ending
        for worker in generation.members:
            if worker.alive and worker.state in ("joining", "running"):
                if self.clock.rng.random() < 0.7:
                    self.act(worker, self.clock.any(0.001, 0.5), self._suffer, CONNECTION_CLOSED, worker.state)
                else:
                    self.act(worker, self.clock.any(5.0, 30.0), self._suffer, GROUP_TIMEOUT, worker.state)

    def _suffer(self, worker: FakeWorker, ending: Ending, state: str) -> None:
        if worker.state == state:
            self.fail(worker, ending)

    def _stop(self, command: c.StopWorkers) -> None:
        for number in command.workers:
            self.act(self.workers[number], self.clock.any(0.01, 1.5), self._terminated)

    def _terminated(self, worker: FakeWorker) -> None:
        if worker.stubborn or worker.generation is None:
            return
        if worker.state == "running" and self.clock.rng.random() < 0.5:
            worker.state = "returned"  # it has saved, and left
            self.say(worker, e.WorkerReturned, worker.id, worker.generation.number)
            self.break_up(worker.generation)
        else:
            self.fail(worker, Ending(EndKind.SIGNALED, signal=15))

    def _kill(self, command: c.KillWorkers) -> None:
        for number in command.workers:
            worker = self.workers[number]
            if worker.killed:
                continue
            worker.killed = True
            gone = Ending(EndKind.KILLED)
            if worker.state == "queued":
                self._forget(worker)
                self.clock.post(self.clock.any(0.002, 0.005), e.WorkerLost, worker.id, gone)
            elif not worker.alive:  # Ray learns of the death by and by, or believes its own kill at once
                if self.clock.rng.random() < 0.5:
                    self.clock.post(self.clock.any(0.002, 0.05), e.WorkerLost, worker.id, gone)
            elif worker.frozen and not self.placement.nodes[worker.node].frozen:
                if self.clock.rng.random() < 0.5:  # Ray may call it dead long before it is
                    self.clock.post(0.004, e.WorkerLost, worker.id, gone)
                self.clock.after(self.clock.any(4.0, 7.0), self.die, worker, gone)
            elif not worker.frozen and not worker.cut:
                self.clock.after(self.clock.any(0.003, 0.05), self.die, worker, gone)
            # A frozen node's or an unreachable worker gets the message when it can be reached, or its lease ends it.

    def _forget(self, worker: FakeWorker) -> None:
        worker.state = "killed"
        if worker.group in self.placement.groups and worker in self.placement.groups[worker.group].queued:
            self.placement.groups[worker.group].queued.remove(worker)
        for node in self.placement.nodes.values():
            if worker in node.doomed:
                node.doomed.remove(worker)
