"""Any legal event at any time: Hypothesis looks for an order that breaks the machine, and shrinks what it finds.

The simulator knows how a cluster behaves; this knows only which identities there are. Messages come late, twice, out of
order, and contradict one another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from story_driver import CLOSED, FATAL, KILLED, NODE_LOST, OUT_OF_MEMORY, RAISED, SIGKILL, UNREACHABLE

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.invariants import check
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.witness import Witness
from raylaunch.errors import Ending, EndKind
from raylaunch.spec import Bounds, RunSpec, Timeouts

FAILURES = st.sampled_from([RAISED, CLOSED, CLOSED, FATAL, Ending(EndKind.EXITED, exit_code=3)])
LOSSES = st.sampled_from([SIGKILL, KILLED, KILLED, UNREACHABLE, NODE_LOST, OUT_OF_MEMORY])
NODES = ("a", "b", "c", "d", "e")

TIMEOUTS = st.builds(
    Timeouts,
    placement=st.sampled_from([0.0, 10.0]),
    start=st.sampled_from([5.0, 20.0]),
    process_group=st.just(5.0),
    last_call=st.sampled_from([0.0, 1.0]),
    stop=st.sampled_from([0.0, 2.0]),
    unresponsive=st.just(10.0),
    min_generation_age=st.sampled_from([0.0, 3.0]),
)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    unit = draw(st.sampled_from([1, 1, 2]))
    low = draw(st.integers(1, 3))
    high = low + draw(st.integers(0, 2))
    return RunSpec(
        run_id="stateful",
        bounds=Bounds(low * unit, high * unit, unit),
        placement_strategy="STRICT_SPREAD" if unit > 1 else draw(st.sampled_from(["PACK", "SPREAD", "STRICT_PACK"])),
        max_restarts=draw(st.sampled_from([0, 1, 3, -1])),
        grow=draw(st.booleans()),
        spares=draw(st.sampled_from([-1, 0, 1])),
        timeouts=draw(TIMEOUTS),
    )


class AnyOrder(RuleBasedStateMachine):
    """Sends events about whatever exists or has existed."""

    @initialize(spec=specs(), held=st.booleans(), far=st.integers(0, 4), data=st.data())
    def begin(self, spec: RunSpec, held: bool, far: int, data: st.DataObject) -> None:
        """A new run, with or without a launcher, or one that has come some way."""
        self.coordinator = Coordinator()
        self.witness = Witness()
        self.now = 0.0
        self.wake: float | None = None
        self.groups: dict[int, int] = {}
        self.where: dict[tuple[int, int], str] = {}
        self.workers: dict[int, tuple[int, int]] = {}
        self.nodes: dict[int, str] = {}
        self.lost_nodes: set[str] = set()
        self.rolls: list[c.CallRoll] = []
        self.spec = spec
        self.send(e.HoldRequested if held else e.RunRequested, spec)
        if held and far % 2:
            self.another_run_is_requested(3)
        if far > 0:
            self.everything_is_placed(data)
        if far > 1:
            self.everybody_starts_and_is_ready(data)
        if far > 2:
            self.now += 3.0
            self.send(e.Tick)
            self.everybody_joins()
        if far > 3:
            self.now += 3.0
            self.send(e.Tick)
            self.everybody_starts_and_is_ready(data)

    def send(self, event: type[e.Event], *args: Any) -> Decision:
        fact = event(self.now, *args)
        self.broken = True  # until it is seen that it isn't
        decision = self.coordinator.handle(fact)
        for command in decision.commands:
            if isinstance(command, c.RequestBundles):
                self.groups[command.group] = command.bundles
            elif isinstance(command, c.StartWorker):
                self.workers[command.worker] = (command.group, command.bundle)
            elif isinstance(command, c.CallRoll):
                self.rolls.append(command)
            elif isinstance(command, c.WakeAt):
                self.wake = command.at
        self.witness.observe(fact, decision)
        self.broken = False
        return decision

    def node(self, data: st.DataObject) -> str:
        """A node that lives."""
        alive = [node for node in NODES if node not in self.lost_nodes]
        return data.draw(st.sampled_from(alive or [f"z{len(self.lost_nodes)}"]))

    def worker(self, data: st.DataObject) -> int:
        """Any worker that was ever started, the newest ones rather."""
        newest = max(self.workers)
        return newest - min(data.draw(st.integers(0, 12)), newest - 1)

    def generation(self, worker: int) -> int:
        """The generation that a worker was promoted to; 0: none."""
        promoted = self.witness.workers[worker].promoted
        return promoted.generation if promoted else 0

    @invariant()
    def holds(self) -> None:
        self.broken = True
        check(self.coordinator)
        if self.coordinator.phase not in (Phase.RUNNING, Phase.HELD, Phase.DONE):
            assert self.witness.wake is not None, "it waits, and nobody will wake it"
        self.broken = False

    # -- time --------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.wake is not None)
    @rule()
    def it_is_woken(self) -> None:
        assert self.wake is not None
        self.now, self.wake = max(self.now, self.wake) + 0.001, None  # never to the tick
        self.send(e.Tick)

    # -- the cluster -------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def a_group_is_placed(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.groups)))
        nodes = tuple(self.where.setdefault((group, i), self.node(data)) for i in range(self.groups[group]))
        self.send(e.BundlesPlaced, group, nodes)

    @rule(data=st.data())
    def everything_is_placed(self, data: st.DataObject) -> None:
        for group in list(self.groups):
            if group in self.witness.groups and (group, 0) not in self.where:
                nodes = tuple(self.where.setdefault((group, i), self.node(data)) for i in range(self.groups[group]))
                self.send(e.BundlesPlaced, group, nodes)

    @rule(data=st.data())
    def a_group_is_lost(self, data: st.DataObject) -> None:
        self.send(e.BundlesLost, data.draw(st.sampled_from(sorted(self.groups))), "it was removed")

    @rule(data=st.data())
    def a_node_is_lost(self, data: st.DataObject) -> None:
        node = self.node(data)
        self.lost_nodes.add(node)
        self.where = {place: there for place, there in self.where.items() if there != node}
        self.send(e.NodeLost, node)

    @rule(data=st.data())
    def a_node_drains(self, data: st.DataObject) -> None:
        self.send(e.NodeDraining, self.node(data), "spot")

    @rule(waiting=st.booleans())
    def others_wait(self, waiting: bool) -> None:
        self.send(e.OthersWaiting, waiting)

    @rule(really=st.integers(0, 9))
    def a_stop_is_requested(self, really: int) -> None:
        if really == 0:
            self.send(e.StopRequested, "enough")

    @precondition(lambda self: self.coordinator.phase is Phase.HELD)
    @rule(max_restarts=st.sampled_from([0, 1, 3]))
    def another_run_is_requested(self, max_restarts: int) -> None:
        self.send(e.RunRequested, replace(self.spec, run_id="another", max_restarts=max_restarts))

    @rule(really=st.integers(0, 9))
    def the_launcher_is_left(self, really: int) -> None:
        if really == 0:
            self.send(e.ReleaseRequested, "left")

    # -- workers -----------------------------------------------------------------------------------------------------

    def start(self, worker: int, data: st.DataObject) -> None:
        place = self.workers[worker]
        node = self.nodes.setdefault(worker, self.where.setdefault(place, self.node(data)))
        first = 100 * place[0] + 10 * place[1]
        devices = tuple(str(first + slot) for slot in range(self.spec.bounds.unit))
        self.send(e.WorkerStarted, worker, node, f"host-{node}", 100 + worker, 7, {}, devices)

    def get_ready(self, worker: int) -> None:
        self.send(e.WorkerReady, worker, 20_000 + worker, 8 << 30, 1 << 30)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_starts(self, data: st.DataObject) -> None:
        self.start(self.worker(data), data)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_is_ready(self, data: st.DataObject) -> None:
        self.get_ready(self.worker(data))

    @rule(data=st.data())
    def everybody_starts_and_is_ready(self, data: st.DataObject) -> None:
        for worker in sorted(self.workers):
            if not self.witness.workers[worker].port:
                self.start(worker, data)
                self.get_ready(worker)

    @precondition(lambda self: self.rolls)
    @rule(data=st.data())
    def a_spare_answers(self, data: st.DataObject) -> None:
        call = self.rolls[-1]
        self.send(e.WorkerAnswered, data.draw(st.sampled_from(call.workers)), call.roll)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_joins(self, data: st.DataObject) -> None:
        worker = self.worker(data)
        self.send(e.WorkerJoined, worker, self.generation(worker))

    @rule()
    def everybody_joins(self) -> None:
        for worker in list(self.coordinator.members.values()):
            self.send(e.WorkerJoined, worker, self.coordinator.generation)

    @rule()
    def everybody_returns(self) -> None:
        for worker in list(self.coordinator.members.values()):
            self.send(e.WorkerReturned, worker, self.coordinator.generation)
            self.send(e.ResultCollected, worker, self.coordinator.generation)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_returns(self, data: st.DataObject) -> None:
        worker = self.worker(data)
        self.send(e.WorkerReturned, worker, self.generation(worker))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_result_is_collected(self, data: st.DataObject) -> None:
        worker = self.worker(data)
        self.send(e.ResultCollected, worker, self.generation(worker))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), ending=FAILURES)
    def a_worker_fails(self, data: st.DataObject, ending: Ending) -> None:
        worker = self.worker(data)
        self.send(e.WorkerFailed, worker, self.generation(worker), ending)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), ending=LOSSES, killed=st.sampled_from([None, True, False]), certain=st.booleans())
    def a_worker_is_lost(self, data: st.DataObject, ending: Ending, killed: bool | None, certain: bool) -> None:
        self.send(e.WorkerLost, self.worker(data), ending, killed, certain)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), silent=st.sampled_from([2.0, 11.0]))
    def a_pulse_is_missed(self, data: st.DataObject, silent: float) -> None:
        self.send(e.PulseMissed, self.worker(data), silent)

    # -- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Whatever has happened: a stop ends the run, the release all, and nothing is left."""
        if getattr(self, "broken", True):
            return
        self.send(e.StopRequested, "the end")
        self.send(e.StopRequested, "at once")
        self.send(e.Tick)
        check(self.coordinator)
        assert self.coordinator.phase in (Phase.HELD, Phase.DONE)
        assert not self.witness.running
        self.send(e.ReleaseRequested, "left")
        check(self.coordinator)
        assert self.coordinator.phase is Phase.DONE


AnyOrder.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyOrder = AnyOrder.TestCase
