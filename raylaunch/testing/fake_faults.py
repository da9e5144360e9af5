"""What goes wrong in a fake cluster: one method per kind of fault in `schedules.KINDS`, of the same name.

Each returns whether it found a victim: a fault that hits nothing has not happened.
"""

from __future__ import annotations

from raylaunch.coordinator import events as e
from raylaunch.errors import Ending, EndKind
from raylaunch.testing.fake_cluster import FakeCluster
from raylaunch.testing.fake_parts import FakeNode, FakeWorker
from raylaunch.testing.schedules import FAULTS_END, KINDS, Fault

_STARTING = ("starting", "warming")
_RANKED = ("promoted", "joining", "running", "returned")


class FakeFaults:
    """Lets the faults of a schedule happen, each at its time or in its phase."""

    def __init__(self, cluster: FakeCluster, faults: tuple[Fault, ...]) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        #: Faults whose time has come and that wait for their phase.
        self.waiting: list[Fault] = []
        #: Faults that have hit something.
        self.fired: list[Fault] = []
        #: Whether the coordinator is to be replaced by one that has read its journal.
        self.coordinator_died = False
        #: Whether the launcher has been left.
        self.left = False
        for fault in faults:
            self.clock.after(fault.at, self._due, fault)

    @property
    def harm(self) -> int:
        """How many restarts the faults so far may have cost at most."""
        return sum(KINDS[fault.kind].harm for fault in self.fired)

    def on_phase(self, phase: str) -> None:
        """The coordinator is in this phase: faults that wait for it happen now, or a few milliseconds later."""
        for fault in [fault for fault in self.waiting if fault.phase == phase]:
            self.waiting.remove(fault)
            if self.clock.now < FAULTS_END:
                self.clock.after(self.clock.rng.choice((0.0, 0.002, 0.02, 0.1)), self._fire, fault)

    def _due(self, fault: Fault) -> None:
        if fault.phase:
            self.waiting.append(fault)
        else:
            self._fire(fault)

    def _fire(self, fault: Fault) -> None:
        if getattr(self, fault.kind)(fault):
            self.fired.append(fault)
        elif self.clock.now < FAULTS_END:
            self.clock.after(0.9, self._due, fault)  # nobody is there to be hit; so it waits

    # -- victims -----------------------------------------------------------------------------------------------------

    def _worker(self, fault: Fault, *states: str) -> FakeWorker | None:
        found = [w for w in self.cluster.workers.values() if w.alive and not w.frozen and w.state in states]
        return found[fault.target % len(found)] if found else None

    def _node(self, fault: Fault) -> FakeNode | None:
        found = [node for node in self.cluster.placement.nodes.values() if node.alive]
        return found[fault.target % len(found)] if found else None

    def _on(self, node: FakeNode) -> list[FakeWorker]:
        return [w for w in self.cluster.workers.values() if w.alive and w.node == node.name]

    # -- workers -----------------------------------------------------------------------------------------------------

    def kill(self, fault: Fault) -> bool:
        """A rank's process ends, in one of the ways in which processes end."""
        endings = (
            Ending(EndKind.SIGNALED, signal=9),
            Ending(EndKind.KILLED),
            Ending(EndKind.OUT_OF_MEMORY),
            Ending(EndKind.EXITED, exit_code=7),
        )
        return self._end(self._worker(fault, *_RANKED), endings[fault.target % 4])

    def kill_spare(self, fault: Fault) -> bool:
        """A warm spare's process ends."""
        return self._end(self._worker(fault, "spare"), Ending(EndKind.KILLED))

    def kill_starting(self, fault: Fault) -> bool:
        """A worker's process ends while it imports."""
        return self._end(self._worker(fault, *_STARTING), Ending(EndKind.KILLED))

    def _end(self, worker: FakeWorker | None, ending: Ending) -> bool:
        if worker is None:
            return False
        self.cluster.die(worker, ending)
        return True

    def raise_error(self, fault: Fault) -> bool:
        """train_fn raises on one rank."""
        return self._raise(fault, Ending(EndKind.RAISED, error_type="ValueError", message="no such column"))

    def fatal(self, fault: Fault) -> bool:
        """train_fn raises what the user named in `no_retry`."""
        return self._raise(fault, Ending(EndKind.RAISED, error_type="KeyError", message="'model'", fatal=True))

    def exit(self, fault: Fault) -> bool:
        """train_fn calls sys.exit(3)."""
        return self._raise(fault, Ending(EndKind.EXITED, exit_code=3))

    def raise_everywhere(self, fault: Fault) -> bool:
        """Every rank raises the same, within milliseconds."""
        running = [w for w in self.cluster.workers.values() if w.alive and w.state == "running"]
        for worker in running:
            ending = Ending(EndKind.RAISED, error_type="ValueError", message=f"batch {fault.target} is empty")
            self.cluster.act(worker, self.clock.any(0.0, 0.02), self.cluster.fail, ending)
        return bool(running)

    def _raise(self, fault: Fault, ending: Ending) -> bool:
        worker = self._worker(fault, "running")
        if worker is not None:
            self.cluster.fail(worker, ending)
        return worker is not None

    def return_early(self, fault: Fault) -> bool:
        """One rank returns; its peers, if they still need it, see their connections close."""
        worker = self._worker(fault, "running")
        if worker is None or worker.generation is None:
            return False
        worker.state = "returned"
        self.cluster.say(worker, e.WorkerReturned, worker.id, worker.generation.number)
        if fault.target % 4:
            self.cluster.break_up(worker.generation)
        return True

    def stubborn(self, _: Fault) -> bool:
        """Nobody listens to SIGTERM."""
        for worker in self.cluster.workers.values():
            worker.stubborn = True
        return True

    # -- starting and forming ----------------------------------------------------------------------------------------

    def start_fails(self, fault: Fault) -> bool:
        """The next few workers fail while they import."""
        self.cluster.start_fails += int(fault.amount)
        return True

    def start_hangs(self, fault: Fault) -> bool:
        """The next few workers never get ready."""
        self.cluster.start_hangs += int(fault.amount)
        return True

    def cannot_work(self, _: Fault) -> bool:
        """The next worker finds that it can never work."""
        self.cluster.cannot_work += 1
        return True

    def join_hangs(self, fault: Fault) -> bool:
        """The next few process groups never form."""
        self.cluster.join_hangs += int(fault.amount)
        return True

    def crash_loop(self, fault: Fault) -> bool:
        """For a while every generation crashes as soon as it runs."""
        self.cluster.crash_until = self.clock.now + fault.amount
        return True

    # -- silence -----------------------------------------------------------------------------------------------------

    def freeze(self, fault: Fault) -> bool:
        """A process stops (SIGSTOP): it says nothing and does nothing, and later goes on where it was."""
        worker = self._worker(fault, "spare", *_STARTING, *_RANKED)
        if worker is None:
            return False
        self._freeze(worker)
        self.clock.after(fault.amount, self._thaw, worker)
        return True

    def _freeze(self, worker: FakeWorker) -> None:
        worker.frozen = True
        self._pulse(worker, self.clock.now)
        if worker.generation is not None and worker.state in ("joining", "running"):
            self.clock.after(self.clock.any(5.0, 40.0), self._missed_by_peers, worker)

    def _missed_by_peers(self, worker: FakeWorker) -> None:
        if worker.frozen and worker.generation is not None:
            self.cluster.break_up(worker.generation)

    def _thaw(self, worker: FakeWorker) -> None:
        if not worker.alive or not worker.frozen:
            return
        worker.frozen = False
        self._flush(worker)
        pending, worker.pending = worker.pending, []
        for function, args in pending:
            if worker.alive:
                function(worker, *args)

    def _flush(self, worker: FakeWorker) -> None:
        held, worker.held = worker.held, []
        for event, args in held:
            if self.clock.rng.random() < 0.8:  # the rest is lost for good
                self.clock.post(self.clock.any(0.001, 0.05), event, *args)

    def _pulse(self, worker: FakeWorker, since: float) -> None:
        """The shell misses a worker's pulse, and goes on missing it."""
        if worker.alive and (worker.frozen or worker.cut) and not worker.killed:
            silent = self.clock.now - since
            if silent > 1.0:
                self.clock.post(0.001, e.PulseMissed, worker.id, silent)
            self.clock.after(max(1.0, self.cluster.spec.timeouts.unresponsive / 3) + 0.01, self._pulse, worker, since)

    def freeze_node(self, fault: Fault) -> bool:
        """A whole machine stops. After some time Ray calls it dead; should it wake up after that, its workers end."""
        node = self._node(fault)
        if node is None or node.frozen:
            return False
        node.frozen = True
        for worker in self._on(node):
            self._freeze(worker)
        patience = self.clock.any(12.0, 30.0)
        if patience < fault.amount:
            self.clock.after(patience, self._declare, node)
        self.clock.after(fault.amount, self._thaw_node, node)
        return True

    def _thaw_node(self, node: FakeNode) -> None:
        node.frozen = False
        for worker in self._on(node):
            self._thaw(worker)
            if node.known_dead or worker.killed:
                self.clock.after(0.02, self.cluster.die, worker, Ending(EndKind.KILLED))
        self.cluster.placement.change()

    def cut(self, fault: Fault) -> bool:
        """Ray loses contact with a worker that lives: it trains on, and ends itself when its lease is over."""
        worker = self._worker(fault, "spare", *_RANKED)
        if worker is None or worker.cut:
            return False
        worker.cut = True
        self.clock.post(self.clock.any(0.01, 0.05), e.WorkerLost, worker.id, Ending(EndKind.UNREACHABLE))
        self._pulse(worker, self.clock.now)
        lease = self.cluster.spec.timeouts.lease
        self.clock.after(min(fault.amount, lease), self._mend, worker, fault.amount >= lease)
        return True

    def _mend(self, worker: FakeWorker, expired: bool) -> None:
        worker.cut = False
        if worker.alive:
            self._flush(worker)
            if expired or worker.killed:
                self.clock.after(0.01, self.cluster.die, worker, Ending(EndKind.KILLED))

    # -- nodes and groups --------------------------------------------------------------------------------------------

    def lose_node(self, fault: Fault) -> bool:
        """A node goes: at once known (it was shut down), or silently (its power failed)."""
        node = self._node(fault)
        if node is None:
            return False
        self._lose(node, gracefully=fault.amount < 2, declared=fault.amount)
        return True

    def lose_two_nodes(self, fault: Fault) -> bool:
        """Two nodes go at the same moment."""
        return self.lose_node(fault) and (self.lose_node(fault) or True)

    def _lose(self, node: FakeNode, *, gracefully: bool, declared: float) -> None:
        node.alive = False
        node.frozen = False
        for worker in self._on(node):
            worker.alive = False
            node.corpses.append(worker)
            if worker.generation is not None and worker.state != "returned":
                self.cluster.break_up(worker.generation)
            if not gracefully and self.clock.rng.random() < 0.8:
                ending = Ending(EndKind.UNREACHABLE)
                self.clock.post(self.clock.any(1.3, 1.9), e.WorkerLost, worker.id, ending)
        self.clock.after(self.clock.any(0.01, 0.03) if gracefully else declared, self._declare, node)

    def _declare(self, node: FakeNode) -> None:
        if node.known_dead:
            return
        self.cluster.placement.declare_dead(node)
        self.clock.post(self.clock.any(0.0, 0.05), e.NodeLost, node.name)
        for worker in node.corpses + node.doomed + self._on(node):  # the last ones are frozen, not dead
            if not (worker.killed and self.clock.rng.random() < 0.5):
                self.clock.post(self.clock.any(0.0, 0.1), e.WorkerLost, worker.id, Ending(EndKind.NODE_LOST))

    def add_node(self, fault: Fault) -> bool:
        """A node joins."""
        self.cluster.placement.add_node(max(1, int(fault.amount)) * self.cluster.spec.bounds.unit)
        return True

    def drain(self, fault: Fault) -> bool:
        """Ray is told that a node will go, and then it goes."""
        node = self._node(fault)
        if node is None or node.draining:
            return False
        node.draining = True
        self.clock.post(0.01, e.NodeDraining, node.name, "spot instance reclaimed")
        self.clock.after(fault.amount, self._drained, node)
        return True

    def _drained(self, node: FakeNode) -> None:
        if node.alive:
            self._lose(node, gracefully=True, declared=0.0)

    def others(self, fault: Fault) -> bool:
        """Another job wants slots, for a while."""
        self.cluster.placement.others.append((1 + fault.target % 4, fault.amount))
        self.cluster.placement.look()
        return True

    def remove_group(self, fault: Fault) -> bool:
        """Somebody removes one of the run's placement groups."""
        groups = list(self.cluster.placement.groups)
        if not groups:
            return False
        number = groups[fault.target % len(groups)]
        self.cluster.remove_group(number)
        self.clock.post(0.02, e.BundlesLost, number, "it was removed")
        return True

    # -- the rest ----------------------------------------------------------------------------------------------------

    def stop(self, _: Fault) -> bool:
        """Somebody asks the run to end."""
        self.clock.post(0.001, e.StopRequested, "enough")
        return True

    def stop_now(self, _: Fault) -> bool:
        """Somebody asks the run to end, and loses patience."""
        self.clock.post(0.001, e.StopRequested, "enough")
        self.clock.post(self.clock.any(0.001, 1.0), e.StopRequested, "now!")
        return True

    def release(self, _: Fault) -> bool:
        """The launcher is left; without one, it is only another way to stop."""
        self.leave()
        return True

    def leave(self) -> None:
        """The launcher is left, and nobody will ask it for another run."""
        self.left = True
        self.clock.post(0.001, e.ReleaseRequested, "the launcher was left")

    def slow(self, fault: Fault) -> bool:
        """For a while every message is late by up to a second, so that they overtake one another."""
        self.clock.slow_until = self.clock.now + fault.amount
        return True

    def repeat(self, fault: Fault) -> bool:
        """For a while some messages arrive twice."""
        self.clock.repeat_until = self.clock.now + fault.amount
        return True

    def coordinator_dies(self, _: Fault) -> bool:
        """The coordinator's process ends; another reads the journal and goes on."""
        self.coordinator_died = True
        return True
