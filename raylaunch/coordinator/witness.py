"""What must hold at the machine's door: `Witness` sees every event and decision, and knows nothing of the inside.

It holds the machine to its promises: one live generation, contiguous ranks, nothing leaked, nothing promoted twice, no
budget overdrawn, no command after the end; and of a launcher's runs, that each ends once, and none pays for another. It
is no part of a run; the simulation and the tests use it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.machine import Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import EndKind
from raylaunch.spec import RunSpec

#: A failure of this kind, unless it is collateral, has no other behind it.
_EXPLAINS_ITSELF = frozenset({EndKind.RAISED, EndKind.EXITED, EndKind.SIGNALED, EndKind.OUT_OF_MEMORY})
#: After one of these a generation may be smaller than the one before.
_TROUBLE = (e.WorkerFailed, e.WorkerLost, e.NodeLost, e.BundlesLost, e.PulseMissed, e.OthersWaiting)


@dataclass(slots=True)
class _Seen:
    """What the witness knows of one worker."""

    group: int
    bundle: int
    node: str = ""
    host: str = ""
    port: int = 0
    process: c.Process | None = None
    promoted: c.Assignment | None = None
    returned: bool = False
    collected: bool = False
    killed: bool = False
    lost: bool = False
    gone: bool = False  # lost, and known not to live


@dataclass(slots=True)
class Witness:
    """Watches events and decisions, knows nothing of the machine's inside, and holds it to its promises."""

    spec: RunSpec | None = None
    workers: dict[int, _Seen] = field(default_factory=dict)
    #: Groups that have been asked for and not given back: group -> bundles.
    groups: dict[int, int] = field(default_factory=dict)
    all_groups: set[int] = field(default_factory=set)
    dead_nodes: set[str] = field(default_factory=set)
    #: The newest generation: rank -> worker.
    members: dict[int, int] = field(default_factory=dict)
    generation: int = 0
    restarts: int = 0
    wake: float | None = None
    #: World size of the generation that was ended last, if that was without any failure, in order to grow; 0 otherwise.
    outgrown: int = 0
    draining: bool = False
    #: The newest generation was ended while running, by a failure that explains itself: it must be charged.
    owed: bool = False
    stop_requested: bool = False
    #: A launcher wants its groups kept between runs.
    held: bool = False
    #: A run is going on; `finish` is how the last one ended.
    running: bool = False
    finish: c.Finish | None = None
    #: The end: nothing may follow.
    over: bool = False

    def observe(self, event: e.Event, decision: Decision) -> None:
        """Assert what must hold for this event and its decision, after all those before."""
        late = self._is_late(event)
        self._take_in(event)
        self._watch_growth(event, decision)
        self._watch_budget(event, decision)
        assert decision.generation >= self.generation, "a generation's number fell"
        assert decision.generation <= self.generation + 1, "a generation's number was left out"
        if self.over:
            assert not decision.commands, f"a command after the end: {decision.commands}"
            return
        assert decision.before is decision.after or decision.reason, f"no reason for {decision.after.value}"
        for command in decision.commands:
            ended = not (self.running or self.held or isinstance(event, e.ReleaseRequested))
            assert not ended, f"a command after the end: {command}"
            assert not late or isinstance(command, (c.Tell, c.WakeAt)), f"{event} is late, and led to {command}"
            getattr(self, f"_see_{type(command).__name__}")(command, event)
        promoted = [command for command in decision.commands if isinstance(command, c.Promote)]
        assert bool(promoted) == (decision.generation > self.generation), (
            "a generation without promotions, or the reverse"
        )
        if promoted:
            assert self.running, "a generation is formed, and nobody has asked for a run"
            self._see_generation([(command.worker, command.assignment) for command in promoted], decision.generation)
        self._see_phase(decision.after)

    def _see_phase(self, phase: Phase) -> None:
        """What the end of a run, and the end of all, leave."""
        assert not self.running or phase not in (Phase.HELD, Phase.DONE), f"a run is going on in phase {phase.value}"
        if phase is Phase.HELD:
            assert self.held, "what nobody wants to be held is held"
            left = [n for n, w in self.workers.items() if w.promoted is not None and not (w.killed or w.gone)]
            assert not left, f"workers {left} outlive their run"
        if phase is Phase.DONE:
            self.over = True
            assert not self.groups, f"groups {sorted(self.groups)} were never given back"
            left = [n for n, w in self.workers.items() if not (w.killed or w.gone)]
            assert not left, f"workers {left} outlive the run"

    def _watch_growth(self, event: e.Event, decision: Decision) -> None:
        """Note when a generation is ended without need: the next one should be larger."""
        seen = self.workers.get(getattr(event, "worker", 0))
        if isinstance(event, _TROUBLE) and not (seen is not None and seen.killed):
            self.outgrown = 0
        elif decision.before is Phase.RUNNING and not self.draining:
            killed = {
                worker
                for command in decision.commands
                if isinstance(command, c.KillWorkers)
                for worker in command.workers
            }
            if not killed.isdisjoint(self.members.values()):
                self.outgrown = len(self.members)

    def _watch_budget(self, event: e.Event, decision: Decision) -> None:
        """Note when a running generation is ended by a failure that is nobody else's consequence."""
        if isinstance(event, (e.WorkerFailed, e.WorkerLost)) and decision.before is Phase.RUNNING:
            seen = self.workers[event.worker]
            own = event.ending.kind in _EXPLAINS_ITSELF and not event.ending.collateral
            spared = self.draining or seen.node in self.dead_nodes
            if own and not spared and decision.after is not Phase.RUNNING and event.worker in self.members.values():
                self.owed = True

    # -- events ------------------------------------------------------------------------------------------------------

    def _is_late(self, event: e.Event) -> bool:
        """Whether an event is about something that has ended (and no deadline happens to pass with it)."""
        if self.wake is not None and event.at >= self.wake - 1e-6:  # the sums of floats differ in their last digits
            return False
        seen = self.workers.get(getattr(event, "worker", 0))
        if seen is None:
            return False
        if isinstance(event, (e.WorkerFailed, e.WorkerLost)) and event.ending.fatal:
            return False  # it may still show what ended the generation
        if isinstance(event, e.WorkerLost):
            return seen.gone
        return seen.killed or seen.lost or 0 < getattr(event, "generation", self.generation) < self.generation

    def _take_in(self, event: e.Event) -> None:
        if isinstance(event, e.HoldRequested):
            self.spec, self.held = event.spec, True
        elif isinstance(event, e.RunRequested):
            self._begin_run(event.spec)
        elif isinstance(event, e.BundlesLost):
            pass  # the machine gives it back by itself
        elif isinstance(event, e.NodeLost):
            self.dead_nodes.add(event.node)
        elif isinstance(event, e.NodeDraining):
            self.draining = True
        elif isinstance(event, e.StopRequested):
            self.stop_requested = True
        elif isinstance(event, e.ReleaseRequested):
            self.stop_requested, self.held = True, False
        elif isinstance(event, e.Tick):
            self.wake = self.wake if self.wake is not None and self.wake > event.at else None
        elif isinstance(event, (e.WorkerStarted, e.WorkerReady, e.WorkerReturned, e.ResultCollected, e.WorkerLost)):
            self._take_in_worker(event, self.workers[event.worker])

    def _begin_run(self, spec: RunSpec) -> None:
        """A run owes nothing to those before it."""
        self.spec, self.running, self.finish = spec, True, None
        self.restarts, self.outgrown, self.owed, self.stop_requested = 0, 0, False, False

    def _take_in_worker(self, event: e.Event, seen: _Seen) -> None:
        if isinstance(event, e.WorkerStarted):
            if not seen.killed and not seen.lost and not seen.node:
                seen.node, seen.host = event.node, event.host
                seen.process = c.Process(event.pid, event.pid_started)
        elif isinstance(event, e.WorkerReady):
            seen.port = event.port
        elif isinstance(event, e.WorkerReturned):
            seen.returned = True
        elif isinstance(event, e.ResultCollected):
            seen.collected = True
        elif isinstance(event, e.WorkerLost):
            seen.lost = True
            seen.gone = seen.gone or (event.certain and event.ending.kind is not EndKind.UNREACHABLE)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _see_RequestBundles(self, command: c.RequestBundles, _: e.Event) -> None:  # noqa: N802 - named after the command
        assert self.spec is not None
        bounds = self.spec.bounds
        assert command.group not in self.all_groups, f"group {command.group} was asked for twice"
        assert command.bundles == (bounds.min_units if command.minimum else 1), f"{command} has the wrong size"
        self.all_groups.add(command.group)
        self.groups[command.group] = command.bundles
        total = sum(self.groups.values())
        assert total <= bounds.max_units, f"{total} bundles asked for, {bounds.max_units} allowed"

    def _see_ReleaseBundles(self, command: c.ReleaseBundles, _: e.Event) -> None:  # noqa: N802
        for group in command.groups:
            assert group in self.groups, f"group {group} was given back without being held"
            del self.groups[group]
            left = [n for n, w in self.workers.items() if w.group == group and not (w.killed or w.gone)]
            assert not left, f"group {group} was given back before its workers {left} were killed"

    def _see_StartWorker(self, command: c.StartWorker, _: e.Event) -> None:  # noqa: N802
        assert self.spec is not None
        assert command.worker not in self.workers, f"worker {command.worker} was started twice"
        assert command.bundle < self.groups.get(command.group, 0), f"{command} in a bundle that is not held"
        self.workers[command.worker] = _Seen(command.group, command.bundle)
        place = (command.group, command.bundle)
        here = sum((w.group, w.bundle) == place and not (w.killed or w.lost) for w in self.workers.values())
        assert here <= 2 * self.spec.bounds.unit, f"{here} workers in bundle {place} of {self.spec.bounds.unit} seats"

    def _see_CallRoll(self, command: c.CallRoll, _: e.Event) -> None:  # noqa: N802
        assert command.workers, "a roll call of nobody"
        for worker in command.workers:
            self._assert_spare(worker)

    def _see_Promote(self, command: c.Promote, _: e.Event) -> None:  # noqa: N802
        self._assert_spare(command.worker)
        self.workers[command.worker].promoted = command.assignment

    def _assert_spare(self, worker: int) -> None:
        seen = self.workers[worker]
        assert seen.port, f"worker {worker} is not ready"
        assert seen.promoted is None, f"worker {worker} has been promoted before"
        assert not seen.killed, f"worker {worker} has been killed"
        assert not seen.lost, f"worker {worker} is lost"

    def _see_CollectResult(self, command: c.CollectResult, _: e.Event) -> None:  # noqa: N802
        seen = self.workers[command.worker]
        assert seen.returned, f"worker {command.worker} has no result"
        assert not seen.killed, f"worker {command.worker} was killed, its result with it"
        assert command.generation == self.generation, "a result of an old generation is fetched"

    def _see_StopWorkers(self, command: c.StopWorkers, _: e.Event) -> None:  # noqa: N802
        assert self.stop_requested, "workers are asked to stop, and nobody wants it"
        assert set(command.workers) <= set(self.members.values()), "a worker without a rank is asked to stop"

    def _see_KillWorkers(self, command: c.KillWorkers, _: e.Event) -> None:  # noqa: N802
        assert command.workers, "nobody is killed"
        for worker in command.workers:
            assert not self.workers[worker].killed, f"worker {worker} was killed twice"
            self.workers[worker].killed = True

    def _see_WakeAt(self, command: c.WakeAt, event: e.Event) -> None:  # noqa: N802
        assert command.at > event.at - 1e-6, f"{command} lies in the past at {event.at}"
        self.wake = command.at

    def _see_Tell(self, command: c.Tell, _: e.Event) -> None:  # noqa: N802
        assert command.text.strip(), "an empty sentence"

    def _see_Finish(self, command: c.Finish, _: e.Event) -> None:  # noqa: N802
        assert self.spec is not None
        assert self.running, "a run ends twice, or before it began"
        self.running, self.finish = False, command
        if command.outcome is c.Outcome.NO_ROOM:
            assert not self.groups, f"groups {sorted(self.groups)} were too small, and are held"
        assert command.reason, "the run ends without a reason"
        assert command.generation == self.generation, f"generation {command.generation} is not the last"
        assert self.restarts <= command.restarts, "the number of restarts fell"
        assert self.spec.max_restarts < 0 or command.restarts <= self.spec.max_restarts, "the budget is overdrawn"
        if command.outcome is c.Outcome.SUCCEEDED:
            ranks = tuple(self.members[rank] for rank in range(len(self.members)))
            assert command.workers == ranks, f"workers {command.workers} are not the ranks {ranks}"
            assert all(self.workers[worker].collected for worker in ranks), "a result is missing"
        if command.outcome is c.Outcome.STOPPED:
            assert self.stop_requested, "stopped, and nobody wanted it"
        if command.root_cause is not None:
            assert command.culprit in self.workers, "the root cause is nobody's failure"
            assert not command.root_cause.ending.collateral or all(f.ending.collateral for f in command.failures), (
                "a consequence is called the cause"
            )

    def _see_generation(self, promoted: list[tuple[int, c.Assignment]], generation: int) -> None:
        """Ranks, sizes, endpoint, devices and predecessors of a new generation."""
        assert self.spec is not None
        bounds, world = self.spec.bounds, len(promoted)
        unkilled = [w for w in self.members.values() if not (self.workers[w].killed or self.workers[w].gone)]
        assert not unkilled, f"generation {self.generation} is not fenced: workers {unkilled} were not killed"
        assert bounds.min_workers <= world <= bounds.max_workers, f"{world} workers, outside of {bounds}"
        assert world % bounds.unit == 0, f"{world} workers, not in units of {bounds.unit}"
        promoted = sorted(promoted, key=lambda pair: pair[1].rank)
        assert [a.rank for _, a in promoted] == list(range(world)), "ranks are not 0 to the world's size"
        per_bundle = Counter((self.workers[w].group, self.workers[w].bundle) for w, _ in promoted)
        assert set(per_bundle.values()) == {bounds.unit}, f"bundles with another number of ranks than {bounds.unit}"
        master, first = self.workers[promoted[0][0]], promoted[0][1]
        assert first.restart_count >= self.restarts, "the number of restarts fell"
        assert self.spec.max_restarts < 0 or first.restart_count <= self.spec.max_restarts, "the budget is overdrawn"
        assert not self.owed or first.restart_count > self.restarts, "a failure of its own was not charged"
        self.owed = False
        nodes = list(dict.fromkeys(self.workers[w].node for w, _ in promoted))
        on_node = Counter(self.workers[w].node for w, _ in promoted)
        local_ranks: Counter[str] = Counter()
        last_node = ""
        for worker, a in promoted:
            node = self.workers[worker].node
            assert node == last_node or not local_ranks[node], f"the ranks on node {node} are not contiguous"
            assert node not in self.dead_nodes, f"rank {a.rank} is on node {node}, which is dead"
            assert a.generation == generation, f"rank {a.rank} belongs to generation {a.generation}"
            assert (a.master_addr, a.master_port) == (master.host, master.port), "the endpoint is not rank 0's"
            assert (a.world_size, a.restart_count) == (world, first.restart_count), "ranks disagree about their world"
            expected = (local_ranks[node], on_node[node], nodes.index(node), len(nodes))
            found = (a.local_rank, a.local_world_size, a.node_rank, a.num_nodes)
            assert found == expected, f"rank {a.rank}: local rank, local size, node rank, nodes {found}, not {expected}"
            local_ranks[node] += 1
            last_node = node
        self._see_devices(promoted)
        self._see_predecessors(promoted)
        self.members = {a.rank: worker for worker, a in promoted}
        self.generation, self.restarts = generation, first.restart_count

    def _see_devices(self, promoted: list[tuple[int, c.Assignment]]) -> None:
        """The ranks of a node see the same list; no GPU that a rank wants whole is given to two."""
        assert self.spec is not None
        gpus = self.spec.gpus_per_worker
        lists: dict[str, tuple[str, ...]] = {}
        taken: dict[str, set[int]] = {}
        for worker, a in promoted:
            node = self.workers[worker].node
            assert lists.setdefault(node, a.devices) == a.devices, f"ranks of node {node} see different devices"
            if gpus >= 1:
                assert len(a.own_devices) == gpus, f"rank {a.rank} has {len(a.own_devices)} GPUs, not {gpus:g}"
                own = taken.setdefault(node, set())
                assert own.isdisjoint(a.own_devices), f"rank {a.rank} shares a GPU of node {node}"
                own.update(a.own_devices)

    def _see_predecessors(self, promoted: list[tuple[int, c.Assignment]]) -> None:
        """Who held a rank in a bundle before, and may still live, is told to those who come after."""
        told: dict[tuple[int, int], set[c.Process]] = {}
        for worker, a in promoted:
            seen = self.workers[worker]
            told.setdefault((seen.group, seen.bundle), set()).update(a.predecessors)
        newest = {worker for worker, _ in promoted}
        before = [w for n, w in self.workers.items() if w.promoted is not None and n not in newest]
        for old in before:
            place = (old.group, old.bundle)
            if old.gone or old.process is None or place not in told or old.promoted is None:
                continue
            here = any(self.workers[w].node == old.node for w in newest if self._place(w) == place)
            last = old.promoted.generation == self.generation  # earlier ones were told to a generation since
            assert not (here and last) or old.process in told[place], f"the ranks in {place} may meet {old.process}"

    def _place(self, worker: int) -> tuple[int, int]:
        return self.workers[worker].group, self.workers[worker].bundle
