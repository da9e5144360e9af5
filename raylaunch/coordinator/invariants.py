"""What must always hold inside the machine, between its fields: `check`. What can be seen from outside: `witness.py`.

It is no part of a run. The simulation and the tests call it after every event; a broken invariant is our bug, and says
so in a sentence.
"""

from __future__ import annotations

from collections import Counter

from raylaunch.coordinator.machine import Coordinator
from raylaunch.coordinator.phase import LIVE_PHASES, Phase
from raylaunch.coordinator.roster import MEMBER_STATES, Roster, Seat, Standing, WorkerState

_SPARE_STATES = frozenset({WorkerState.STARTING, WorkerState.WARMING, WorkerState.READY, WorkerState.SILENT})


def check(coordinator: Coordinator) -> None:
    """Assert what must hold between the machine's fields after every event."""
    phase = coordinator.phase
    if phase is Phase.NEW:
        return
    roster, spec = coordinator.roster, coordinator.spec
    _check_bundles(roster)
    _check_workers(coordinator)
    _check_members(coordinator)
    assert roster.asked <= spec.bounds.max_units, f"{roster.asked} bundles asked for, {spec.bounds.max_units} allowed"
    minimum = [group for group in roster.groups.values() if group.minimum]
    assert len(minimum) <= 1, "two groups hold the minimum"
    assert spec.max_restarts < 0 or coordinator.restarts <= spec.max_restarts, "the budget is overdrawn"
    assert phase is Phase.ROLL_CALL or not coordinator.roll_open, "a roll call is open outside its phase"
    assert phase is not Phase.SETTLING or coordinator.incident is not None, "nothing is there to be settled"
    if phase is Phase.DONE:
        assert not roster.groups, f"groups {sorted(roster.groups)} are held after the end"
    if phase is Phase.HELD:
        assert coordinator.held, "nobody wants it held"
        _check_held(roster)
    if phase is Phase.DONE or (phase is Phase.SETTLING and not coordinator.held):
        assert all(worker.state is WorkerState.DYING for worker in roster.workers.values()), "a worker outlives the run"


def _check_bundles(roster: Roster) -> None:
    """The counters say what a count says."""
    standings: Counter[Standing] = Counter()
    unmanned: Counter[Standing] = Counter()
    usable, minimum_pending = set(), 0
    for number, group in roster.groups.items():
        for bundle in group.bundles:
            key = (number, bundle.index)
            standing = roster._standing(bundle)  # noqa: SLF001 - the definition that the counters must agree with
            assert bundle.standing is standing, f"bundle {key} counts as {bundle.standing}, and is {standing}"
            standings[standing] += 1
            if not bundle.manned:
                unmanned[standing] += 1
            if standing is Standing.USABLE:
                usable.add(key)
            if standing is Standing.PENDING and group.minimum:
                minimum_pending += 1
            assert bundle.placed == bool(bundle.node), f"bundle {key} is placed nowhere, or not placed somewhere"
            assert not bundle.node or roster.nodes[bundle.node].bundles.get(key) is bundle, f"bundle {key} is misfiled"
            for seat in bundle.seats:
                _check_seat(roster, seat)
    assert standings == +roster.standings, f"standings {roster.standings} should be {standings}"
    assert unmanned == +roster.unmanned, f"unmanned bundles {roster.unmanned} should be {unmanned}"
    assert usable == set(roster.usable), f"usable bundles {sorted(roster.usable)} should be {sorted(usable)}"
    assert minimum_pending == roster.minimum_pending, f"{minimum_pending} bundles of the minimum are pending"
    filed = sum(len(node.bundles) for node in roster.nodes.values())
    assert filed == sum(bundle.placed for bundle in roster.bundles()), "a node holds a bundle that is not there"


def _check_seat(roster: Roster, seat: Seat) -> None:
    for worker, states in ((seat.spare, _SPARE_STATES), (seat.member, MEMBER_STATES)):
        if worker is not None:
            assert worker.state in states, f"worker {worker.id} is {worker.state} in its seat"
            assert worker.seat is seat, f"worker {worker.id} sits in two seats"
            assert roster.workers.get(worker.id) is worker, f"worker {worker.id} is seated and forgotten"
    for worker in seat.predecessors:
        assert worker.state is WorkerState.DYING, f"worker {worker.id} is {worker.state} and has a successor"


def _check_workers(coordinator: Coordinator) -> None:
    roster = coordinator.roster
    for number, worker in roster.workers.items():
        assert worker.state is not WorkerState.GONE, f"worker {number} is gone and still counted"
        assert (worker.state is WorkerState.SILENT) == (number in roster.silent), f"worker {number} is misfiled"
        if worker.state in _SPARE_STATES:
            assert worker.seat.spare is worker, f"worker {number} is {worker.state} without a seat"
            assert worker.rank is None, f"worker {number} is a spare with rank {worker.rank}"
        if worker.state in (WorkerState.READY, WorkerState.SILENT) or worker.state in MEMBER_STATES:
            assert worker.process is not None, f"worker {number} is ready without a process"
            assert worker.node, f"worker {number} is ready on no node"
            assert worker.port, f"worker {number} is ready without a store"
        if worker.state in MEMBER_STATES:
            assert coordinator.members.get(worker.rank if worker.rank is not None else -1) == number, (
                f"worker {number} holds rank {worker.rank} of no live generation"
            )


def _check_held(roster: Roster) -> None:
    """Between runs every seat has a spare, or will have one."""
    for bundle in roster.bundles():
        fit = bundle.placed and not (roster.nodes[bundle.node].lost or roster.nodes[bundle.node].unfit)
        for seat in bundle.seats:
            manned = seat.spare is not None or seat.retry_at is not None or seat.given_up
            assert manned or not fit, f"a seat of bundle {bundle.index} of group {bundle.group.id} waits for nobody"


def _check_members(coordinator: Coordinator) -> None:
    members, workers = coordinator.members, coordinator.roster.workers
    if coordinator.phase not in LIVE_PHASES:
        assert not members, f"generation {coordinator.generation} is live in phase {coordinator.phase.value}"
        return
    assert sorted(members) == list(range(coordinator.world_size)), (
        f"ranks {sorted(members)} of {coordinator.world_size}"
    )
    assert coordinator.is_current(coordinator.generation), "the newest generation is fenced in a live phase"
    assert not coordinator.is_current(coordinator.generation - 1), "an old generation is not fenced"
    if coordinator.phase is Phase.STOPPING:
        return
    states = [workers[worker].state if worker in workers else WorkerState.GONE for worker in members.values()]
    assert all(state in MEMBER_STATES for state in states), f"the live generation has members that are {states}"
    joined = sum(state is not WorkerState.JOINING for state in states)
    assert joined == coordinator.joined, f"{joined} have joined, {coordinator.joined} were counted"
    collected = sum(state is WorkerState.COLLECTED for state in states)
    assert collected == coordinator.collected, f"{collected} results are there, {coordinator.collected} were counted"
    if coordinator.phase is Phase.RUNNING:
        assert joined == coordinator.world_size, "running, but not all have joined"
