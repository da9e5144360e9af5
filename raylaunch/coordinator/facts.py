"""How each event's fact is folded in: one function an event, the same in every phase.

These functions note what happened; they leave deciding what to do next to `decide.py`, except that a failure ends its
generation on the spot. A fact about something that has ended since is late, and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylaunch.coordinator import endings
from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import CollectResult, Level, Outcome, Process, StopWorkers
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.rendezvous import Gathering
from raylaunch.coordinator.roster import MEMBER_STATES, Bundle, Roster, Worker, WorkerState
from raylaunch.errors import Ending, EndKind, short_id
from raylaunch.spec import RunSpec

if TYPE_CHECKING:
    from raylaunch.coordinator.machine import Coordinator


def hold_requested(c: Coordinator, event: e.HoldRequested) -> None:
    c.held = True
    c.because(f"{_span(event.spec)} workers are to be held")
    _reserve(c, event.spec)
    c.enter(Phase.HELD)


def run_requested(c: Coordinator, event: e.RunRequested) -> None:
    c.because(f"a run of {_span(event.spec)} workers was requested")
    if c.phase is Phase.NEW:
        _reserve(c, event.spec)
        return c.enter(Phase.RENDEZVOUS)
    if c.incident is not None:
        endings.settle(c, c.incident)
    c.spec = event.spec
    c.forget_run()
    if not c.roster.groups and c.gathering.ask_at is None:  # there was no room for the last one
        c.gathering.ask_at = c.now
    return endings.prepare_next(c)


def _reserve(c: Coordinator, spec: RunSpec) -> None:
    c.spec = spec
    c.roster = Roster(spec.bounds.unit)
    c.gathering = Gathering(c.now)
    c.request_group(spec.bounds.min_units, minimum=True)


def bundles_placed(c: Coordinator, event: e.BundlesPlaced) -> None:
    group = c.roster.groups.get(event.group)
    if group is None:
        return c.because("late: the group was released")
    if c.phase in (Phase.STOPPING, Phase.SETTLING) and not c.held:
        return c.because("the run is about to end")
    for bundle, node in zip(group.bundles, event.nodes, strict=True):
        if not bundle.placed:
            c.roster.place(bundle, node)
        for seat in bundle.seats:
            if seat.spare is None and seat.member is None:
                c.start_worker(seat, gently=c.phase is Phase.RUNNING)
    c.because(f"group {group.id} is placed on {len(set(event.nodes))} nodes")
    return None


def bundles_lost(c: Coordinator, event: e.BundlesLost) -> None:
    group = c.roster.groups.get(event.group)
    if group is None:
        return c.because("late: the group was released")
    members = [seat.member for bundle in group.bundles for seat in bundle.seats if seat.member is not None]
    if members:
        endings.member_ended(
            c, members[0], Ending(EndKind.KILLED, message=f"its placement group is gone: {event.reason}")
        )
    if event.group in c.roster.groups:
        c.release_groups([group])
        c.because(f"group {group.id} is gone: {event.reason}")
        if group.minimum:
            c.gathering.refusal = event.reason
            c.gathering.ask_at = c.now + 1.0
    return None


def worker_started(c: Coordinator, event: e.WorkerStarted) -> None:
    worker = _spare(c, event.worker, WorkerState.STARTING)
    if worker is None:
        return
    bundle = worker.seat.bundle
    worker.node, worker.host = event.node, event.host
    worker.process = Process(event.pid, event.pid_started)
    bundle.devices = event.devices
    if not bundle.placed or bundle.node != event.node:
        c.roster.place(bundle, event.node)
    c.roster.set_state(worker, WorkerState.WARMING)
    c.roster.suspect(event.node, suspect=False)
    wrong = _differences(c.spec.versions, event.versions)
    if wrong:
        ending = Ending(
            EndKind.CANNOT_WORK,
            error_type=endings.OTHER_VERSIONS,
            message=f"node {short_id(event.node)} has {wrong}",
            fatal=True,
        )
        endings.spare_failed(c, worker, ending)
    elif worker.early is not None:
        worker_ready(c, worker.early)


def worker_ready(c: Coordinator, event: e.WorkerReady) -> None:
    known = c.roster.workers.get(event.worker)
    if known is not None and known.state is WorkerState.STARTING:  # it has overtaken its own start
        known.early = event
        return
    worker = _spare(c, event.worker, WorkerState.WARMING)
    if worker is None:
        return
    worker.port = event.port
    node = c.roster.node(worker.node)
    node.memory_available, node.memory_per_worker = event.memory_available, event.memory_used
    c.roster.set_state(worker, WorkerState.READY)


def worker_answered(c: Coordinator, event: e.WorkerAnswered) -> None:
    worker = c.roster.workers.get(event.worker)
    if worker is None or worker.roll != event.roll:
        return c.because("late: the roll call is over")
    worker.roll = 0
    c.roll_open.discard(worker.id)
    if worker.state is WorkerState.SILENT:
        c.roster.set_state(worker, WorkerState.READY)
        c.roster.suspect(worker.node, suspect=False)
    return None


def worker_joined(c: Coordinator, event: e.WorkerJoined) -> None:
    worker = _member(c, event.worker, event.generation, WorkerState.JOINING)
    if worker is not None:
        c.roster.set_state(worker, WorkerState.RUNNING)
        c.roster.forget_predecessors(worker.seat)
        worker.seat.failed_starts = 0
        c.joined += 1
        if c.phase is Phase.STOPPING:
            c.command(StopWorkers((worker.id,)))


def worker_returned(c: Coordinator, event: e.WorkerReturned) -> None:
    known = c.roster.workers.get(event.worker)
    if known is not None and known.state is WorkerState.JOINING:  # it has overtaken its own joining
        worker_joined(c, e.WorkerJoined(event.at, event.worker, event.generation))
    worker = _member(c, event.worker, event.generation, WorkerState.RUNNING)
    if worker is not None:
        c.roster.set_state(worker, WorkerState.RETURNED)
        if c.phase is not Phase.FORMING:  # a rank leaves its group when asked: those that still join it would fail
            c.command(CollectResult(worker.id, c.generation))


def result_collected(c: Coordinator, event: e.ResultCollected) -> None:
    worker = _member(c, event.worker, event.generation, WorkerState.RETURNED)
    if worker is not None:
        c.roster.set_state(worker, WorkerState.COLLECTED)
        c.collected += 1


def worker_failed(c: Coordinator, event: e.WorkerFailed) -> None:
    worker = c.roster.workers.get(event.worker)
    if worker is None:
        return c.because("late: the worker is gone")
    if worker.state in MEMBER_STATES and event.generation == c.generation:
        return endings.member_ended(c, worker, event.ending)
    if worker.state in (WorkerState.STARTING, WorkerState.WARMING):
        return endings.spare_failed(c, worker, event.ending)
    if worker.state is WorkerState.DYING and event.generation == worker.generation:
        return endings.learnt(c, worker.id, event.ending)
    return c.because("late: the worker's generation is over")


def worker_lost(c: Coordinator, event: e.WorkerLost) -> None:
    worker = c.roster.workers.get(event.worker)
    if worker is not None and event.ending.kind in (EndKind.UNREACHABLE, EndKind.NODE_LOST):
        c.roster.suspect(worker.node or worker.seat.bundle.node, suspect=True)
    if worker is None or worker.state is WorkerState.DYING:
        if event.killed or (event.killed is None and event.ending.kind is EndKind.KILLED):
            c.because("our own kill")
        else:
            endings.learnt(c, event.worker, event.ending)
    elif worker.state in MEMBER_STATES:
        endings.member_ended(c, worker, event.ending)
    else:
        endings.spare_failed(c, worker, event.ending)
    # What may still live has been killed, and stays on the list of its seat's predecessors.
    gone = event.certain and event.ending.kind is not EndKind.UNREACHABLE
    if worker is not None and worker.state is not WorkerState.GONE and gone:
        c.roster.set_state(worker, WorkerState.GONE)


def node_lost(c: Coordinator, event: e.NodeLost) -> None:
    node = c.roster.nodes.get(event.node)
    if node is None or node.lost:
        return c.because("the run has nothing there")
    if c.incident is not None and not c.incident.settled:
        c.incident.lose_node(node.id, c.now)
    node.lost = True
    c.roster.draining.discard(node.id)
    seats = [seat for bundle in node.bundles.values() for seat in bundle.seats]
    c.kill([seat.spare for seat in seats if seat.spare is not None])
    members = [seat.member for seat in seats if seat.member is not None]
    if members:
        endings.member_ended(c, members[0], Ending(EndKind.NODE_LOST))
    for worker in [w for w in c.roster.workers.values() if w.state is WorkerState.DYING and w.node == node.id]:
        c.roster.set_state(worker, WorkerState.GONE)  # whoever could not be reached there is gone now
    forget_bundles(c, [bundle for bundle in node.bundles.values() if bundle.group.id in c.roster.groups])
    return c.because(f"Ray has declared node {short_id(event.node)} dead")


def forget_bundles(c: Coordinator, bundles: list[Bundle]) -> None:
    """Bundles went with their node. A unit of growth is given back; the minimum's come back by Ray's own doing."""
    growth = {bundle.group.id: bundle.group for bundle in bundles if not bundle.group.minimum}
    for bundle in bundles:
        c.kill([seat.spare for seat in bundle.seats if seat.spare is not None])
        if bundle.group.minimum:
            c.roster.lose(bundle)
            for seat in bundle.seats:
                c.roster.retry(seat, c.now + endings.RETRY_SECONDS[0])
    c.release_groups(list(growth.values()))


def node_draining(c: Coordinator, event: e.NodeDraining) -> None:
    node = c.roster.node(event.node)
    if not node.draining:
        node.draining = True
        c.roster.draining.add(node.id)
        c.roster.refresh_node(node)
        if node.bundles:
            c.tell(f"node {short_id(event.node)} is being drained{': ' + event.reason if event.reason else ''}")


def others_waiting(c: Coordinator, event: e.OthersWaiting) -> None:
    c.others_waiting = event.waiting


def pulse_missed(c: Coordinator, event: e.PulseMissed) -> None:
    worker = c.roster.workers.get(event.worker)
    if worker is None or worker.state is WorkerState.DYING:
        return c.because("late: the worker has been killed")
    spec = c.spec.timeouts
    if worker.state in MEMBER_STATES:
        if event.silent >= spec.unresponsive:
            ending = Ending(EndKind.UNRESPONSIVE, message=f"no pulse for {event.silent:.0f} s")
            return endings.member_ended(c, worker, ending)
        if worker.id not in c.pulse_told:
            c.pulse_told.add(worker.id)
            c.tell(
                f"rank {worker.rank} (node {short_id(worker.node)}) has sent no pulse for {event.silent:.0f} s;"
                f" it is given up at {spec.unresponsive:.0f} s",
                Level.WARNING,
            )
    elif event.silent >= (spec.lease if worker.state is WorkerState.READY else spec.unresponsive):
        # A spare that imports may hold the GIL for long; one that only waits has no reason to be silent.
        endings.spare_failed(c, worker, Ending(EndKind.UNRESPONSIVE))
    return None


def stop_requested(c: Coordinator, event: e.StopRequested) -> None:
    if c.phase is Phase.HELD:
        return c.because("late: no run is going on")
    if c.phase is Phase.SETTLING:
        assert c.incident is not None
        c.incident.settle_at = c.now
        return None
    c.verdict = event.reason
    if c.phase not in (Phase.FORMING, Phase.RUNNING):
        return endings.finish(c, Outcome.STOPPED, f"run {c.spec.run_id} was stopped: {event.reason}")
    if c.phase is Phase.FORMING:
        endings.collect_returned(c)
    c.enter(Phase.STOPPING)
    c.stop_until = c.now + c.spec.timeouts.stop
    running = tuple(w.id for w in endings.live_workers(c) if w.state is WorkerState.RUNNING)
    if not c.held:
        endings.dismiss_spares(c)
    c.tell(f"stopping: {event.reason}; the workers have {c.spec.timeouts.stop:g} s", Level.WARNING)
    return c.command(StopWorkers(running)) if running else None


def release_requested(c: Coordinator, event: e.ReleaseRequested) -> None:
    if c.phase is Phase.HELD:
        return endings.release(c, event.reason)
    c.held = False
    if c.phase not in (Phase.STOPPING, Phase.SETTLING):
        return stop_requested(c, e.StopRequested(c.now, event.reason))
    return endings.dismiss_spares(c)  # the run is about to end, and everything with it


def tick(c: Coordinator, event: e.Tick) -> None:
    pass


def _spare(c: Coordinator, worker: int, state: WorkerState) -> Worker | None:
    """The worker, if it is a spare in this state; otherwise the event is late or repeated."""
    known = c.roster.workers.get(worker)
    if known is None or known.state is not state:
        c.because("late, or repeated")
        return None
    return known


def _member(c: Coordinator, worker: int, generation: int, state: WorkerState) -> Worker | None:
    known = c.roster.workers.get(worker)
    if known is None or known.state is not state or generation != c.generation:
        c.because("late, or repeated")
        return None
    return known


def _span(spec: RunSpec) -> str:
    low, high = spec.bounds.min_workers, spec.bounds.max_workers
    return str(low) if low == high else f"{low} to {high}"


def _differences(driver: dict[str, str], node: dict[str, str]) -> str:
    """Which versions differ from the driver's, in words; empty where none does."""
    wrong = []
    for name, version in driver.items():
        there = node.get(name, "none")
        if there.split("+")[0] != version.split("+")[0]:  # torch's local part (+cpu, +cu130) may differ
            wrong.append(f"{name} {there} where the driver has {version}")
    return ", ".join(wrong)
