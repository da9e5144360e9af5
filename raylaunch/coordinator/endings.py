"""How workers, generations and runs end, and what is prepared next.

The first failure of any kind ends the whole generation at once: its members are fenced and killed, and the next
rendezvous begins without waiting for them to be gone. Why it ended is settled meanwhile (`rootcause.py`). A worker
without a rank that ends is replaced.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from raylaunch.coordinator import rendezvous, rootcause
from raylaunch.coordinator.commands import CallRoll, CollectResult, Finish, Level, Outcome, Recovery
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.roster import MAX_FAILED_STARTS, MEMBER_STATES, Standing, Worker, WorkerState
from raylaunch.errors import Ending, EndKind, Failure, signal_name

if TYPE_CHECKING:
    from raylaunch.coordinator.machine import Coordinator

#: How long a spare may take to answer a roll call, in seconds (live ones took 40 ms at most).
ROLL_CALL_SECONDS = 0.15
#: Pause before a failed start is repeated: doubles from the first to the second of these, in seconds.
RETRY_SECONDS = (0.25, 5.0)
#: `Ending.error_type` of a worker on a node with other versions than the driver's.
OTHER_VERSIONS = "OtherVersions"
#: Once a generation has formed, the function is known to work: then these say something about the node.
NODE_UNFIT = (OTHER_VERSIONS, "ModuleNotFoundError")

PHASE_WORDS = {
    WorkerState.STARTING: "starting",
    WorkerState.WARMING: "starting",
    WorkerState.JOINING: "forming",
    WorkerState.RUNNING: "running",
    WorkerState.RETURNED: "its value was fetched",
}


def live_workers(c: Coordinator) -> list[Worker]:
    """The workers of the live generation, by rank."""
    return [c.roster.workers[c.members[rank]] for rank in range(c.world_size) if c.members]


def end_generation(c: Coordinator, *, ask: bool = False) -> None:
    """Fence the live generation and kill all of it. Nothing that it sends is accepted from here on.

    `ask`: nobody knows yet why it ends; whoever has left the group while its train_fn goes on may say what it does.
    """
    members = [c.roster.workers[worker] for worker in c.members.values() if worker in c.roster.workers]
    c.members = {}
    c.plan = None
    c.spares_due = None
    c.pulse_told = set()
    c.kill(members, ask=ask)


def fail(c: Coordinator, worker: Worker, ending: Ending) -> None:
    """A worker of the live generation has failed: the generation ends at once, and the next one is prepared."""
    failure = failure_of(c, worker, ending)
    incident = incident_for(c, worker, ending)
    if not incident.failures and incident.generation == c.generation:
        incident.returned = _ranks_in(c, WorkerState.RETURNED, WorkerState.COLLECTED)
        incident.not_joined = tuple(r for r in _ranks_in(c, WorkerState.JOINING) if r != worker.rank)
    for member in live_workers(c):
        incident.members[member.id] = failure_of(c, member, Ending(EndKind.NODE_LOST))
    incident.add(worker.id, failure, c.now)
    c.roll_owed = rootcause.may_be_lost_node(ending)
    end_generation(c, ask=ending.collateral)
    if ending.fatal:
        conclude(c, _fatal_sentence(ending))
        return
    if not charge(c, incident, worker):
        conclude(c, _budget_sentence(c))
        return
    c.recovering = incident
    incident.told = incident.describe()
    text = incident.told if incident.generation == c.generation else failure.describe()
    c.tell(f"generation {c.generation} ended: {text}; re-forming", Level.WARNING)
    prepare_next(c)


def failure_of(c: Coordinator, worker: Worker, ending: Ending) -> Failure:
    """A worker's ending with where it happened."""
    return Failure(
        ending=ending,
        rank=worker.rank,
        local_rank=worker.local_rank,
        node=worker.node or worker.seat.bundle.node,
        host=worker.host,
        pid=ending.pid or (worker.process.pid if worker.process else 0),
        generation=worker.generation,
        phase=PHASE_WORDS.get(worker.state, ""),
        at=c.now,
    )


def incident_for(c: Coordinator, worker: Worker, ending: Ending) -> rootcause.Incident:
    """The open incident if this may belong to it, otherwise a new one.

    A failure that explains itself and comes from a later generation is a new failure, however soon it comes.
    """
    known = c.incident
    if known is not None and not known.settled:
        same_generation = worker.generation in (known.generation, 0)
        consequence = c.phase is not Phase.RUNNING and not rootcause.is_cause(ending)
        if same_generation or consequence or worker.node in known.lost_nodes:
            return known
        settle(c, known)
    c.incident = rootcause.open_incident(c.now, worker.generation, charged=False)
    return c.incident


def charge(c: Coordinator, incident: rootcause.Incident, worker: Worker) -> bool:
    """Charge the budget for an incident, once. False: nothing is left of it."""
    node = c.roster.nodes.get(worker.node)
    if incident.charged or (node is not None and node.draining):
        return True
    if 0 <= c.spec.max_restarts <= c.restarts:
        return False
    incident.charged = True
    c.restarts += 1
    return True


def _budget_sentence(c: Coordinator) -> str:
    allowed = c.spec.max_restarts
    if allowed == 0:
        return "max_restarts=0 allows no restart"
    return f"all {allowed} restarts are used up" if allowed > 1 else "the one restart is used up"


def prepare_next(c: Coordinator) -> None:
    """Gather the next generation; first find out which spares are still there, if a node may have gone."""
    spares = [spare.id for spare in c.roster.workers.values() if spare.state is WorkerState.READY]
    if c.roll_owed and spares:
        _call_roll(c, spares)
    else:
        rendezvous.begin(c)


def _call_roll(c: Coordinator, spares: list[int]) -> None:
    c.roll += 1
    c.roll_open = set(spares)
    c.roll_until = c.now + ROLL_CALL_SECONDS
    for worker in spares:
        c.roster.workers[worker].roll = c.roll
    c.command(CallRoll(c.roll, tuple(spares)))
    c.enter(Phase.ROLL_CALL)


def conclude(c: Coordinator, verdict: str) -> None:
    """The run has failed: end everything that is not held for another, and wait until the root cause is settled.

    The groups are given back in the end: Ray kills whatever is in a group that is removed, and those deaths would look
    like causes.
    """
    c.verdict = verdict
    c.because(verdict)
    end_generation(c)
    if not c.held:
        dismiss_spares(c)
    c.enter(Phase.SETTLING)


def dismiss_spares(c: Coordinator) -> None:
    """End every worker without a rank: no further generation will need one."""
    c.kill([worker for worker in c.roster.workers.values() if worker.state not in MEMBER_STATES])


def finish(c: Coordinator, outcome: Outcome, reason: str, incident: rootcause.Incident | None = None) -> None:
    """The run is over; `incident` is what brought it down, if anything did.

    A launcher goes on holding its groups, and makes its seats ready for the next run; but it doesn't hold what was too
    small for this one.
    """
    culprit = 0
    cause: Failure | None = None
    failures: tuple[Failure, ...] = ()
    if incident is not None:
        culprit, cause = incident.cause()
        failures = tuple(incident.failures.values())
    workers = tuple(c.members[rank] for rank in sorted(c.members))
    end_generation(c)
    c.roll_open = set()
    if not c.held or outcome is Outcome.NO_ROOM:
        c.release_groups(list(c.roster.groups.values()))
    c.tell(reason, Level.INFO if outcome is Outcome.SUCCEEDED else Level.WARNING)
    c.command(
        Finish(
            outcome,
            reason,
            cause,
            failures,
            culprit,
            workers,
            c.world_size,
            c.generation,
            c.restarts,
            tuple(Recovery(f.generation, f.incident.describe(), f.seconds, f.world_size) for f in c.recoveries),
        )
    )
    if not c.held:
        c.enter(Phase.DONE)
        return
    c.enter(Phase.HELD)
    rendezvous.man_seats(c, given_up=False)


def release(c: Coordinator, reason: str) -> None:
    """The launcher is left while no run is going on: nothing is held any more."""
    c.release_groups(list(c.roster.groups.values()))
    c.because(reason)
    c.enter(Phase.DONE)


def settle(c: Coordinator, incident: rootcause.Incident) -> None:
    """The cause is as well known as it will be: tell it, where it differs from what was told at once."""
    if incident.settled:
        return
    incident.settled = True
    text = incident.describe()
    if incident.told and text != incident.told:
        c.tell(f"generation {incident.generation} ended because {text}", Level.WARNING)


def watch_incident(c: Coordinator) -> None:
    """Settle the open incident when its window is over."""
    if c.incident is not None and not c.incident.settled:
        if c.now >= c.incident.settle_at:
            settle(c, c.incident)
        else:
            c.wake(c.incident.settle_at)


def member_ended(c: Coordinator, worker: Worker, ending: Ending) -> None:
    """A rank of the live generation has ended without success. While stopping, that is all that was wanted."""
    if c.phase is Phase.STOPPING:
        c.kill([worker])
    else:
        fail(c, worker, ending)


def learnt(c: Coordinator, worker: int, ending: Ending) -> None:
    """How a worker that was killed meanwhile, or is gone, had ended by itself before: it belongs to the incident."""
    incident = c.incident
    if incident is None or incident.settled:
        return c.because("late: the cause is settled")
    failed = incident.failures.get(worker)
    known = failed or incident.members.get(worker)
    if known is None:
        return c.because("it was no rank of the generation that ended")
    if failed is None and signal_name(ending.signal) == "SIGTERM":  # Ray 2.60's way of killing, on our behalf
        return c.because("our own kill")
    incident.add(worker, replace(known, ending=ending, pid=ending.pid or known.pid, at=c.now), c.now)
    if ending.fatal and c.phase in (Phase.RENDEZVOUS, Phase.ROLL_CALL, Phase.FORMING, Phase.RUNNING):
        conclude(c, _fatal_sentence(ending))
    return None


def starts_timed_out(c: Coordinator, reason: str) -> None:
    """Workers hang while they start: one failure, and others are started in their seats."""
    late = [w for w in c.roster.workers.values() if w.state in (WorkerState.STARTING, WorkerState.WARMING)]
    late = [worker for worker in late if worker.seat.bundle.standing is Standing.COMING]
    c.wake(c.now + c.spec.timeouts.start)
    if not late:  # their seats wait for the next start
        return
    ending = Ending(EndKind.TIMED_OUT, message=reason)
    if c.incident is not None:
        settle(c, c.incident)  # each time is a failure of its own
    incident = incident_for(c, late[0], ending)
    incident.add(late[0].id, failure_of(c, late[0], ending), c.now)
    if not charge(c, incident, late[0]):
        conclude(c, _budget_sentence(c))
        return
    c.tell(f"{incident.describe()}; starting others", Level.WARNING)
    c.kill(late)
    for worker in late:
        c.start_worker(worker.seat, gently=False)


def spare_failed(c: Coordinator, worker: Worker, ending: Ending) -> None:
    """A worker without a rank has ended: it is replaced, after a pause if it never got ready."""
    seat, state = worker.seat, worker.state
    failure = failure_of(c, worker, ending)
    c.roll_open.discard(worker.id)
    c.kill([worker])
    gathering = c.phase in (Phase.RENDEZVOUS, Phase.ROLL_CALL)
    if ending.fatal and not c.generation:
        if not gathering:  # a launcher waits for its first run, which will meet it too, and fail with it
            seat.failed_starts = MAX_FAILED_STARTS
            return c.tell(failure.describe(), Level.WARNING)
        incident = incident_for(c, worker, ending)
        incident.add(worker.id, failure, c.now)
        return conclude(c, _fatal_sentence(ending))
    if ending.error_type in NODE_UNFIT:
        node = c.roster.node(failure.node)
        node.unfit = ending.describe()
        c.roster.refresh_node(node)
        c.tell(f"{node.unfit}; the run goes on without that node", Level.WARNING)
        if seat.bundle.group.id in c.roster.groups and not seat.bundle.group.minimum and not seat.bundle.manned:
            c.release_groups([seat.bundle.group])
        return None
    if state is WorkerState.WARMING and gathering and ending.kind not in (EndKind.UNREACHABLE, EndKind.NODE_LOST):
        incident = incident_for(c, worker, ending)
        incident.add(worker.id, failure, c.now)
        if not charge(c, incident, worker):
            return conclude(c, _budget_sentence(c))
        c.tell(f"{failure.describe()}; starting another", Level.WARNING)
    seat.failed_starts += 1
    if seat.bundle.group.id not in c.roster.groups:
        return None
    if gathering or not seat.given_up or not seat.bundle.placed:
        first, longest = RETRY_SECONDS
        pause = min(longest, first * 2 ** (seat.failed_starts - 1))
        c.roster.retry(seat, c.now + pause)
    return None


def _ranks_in(c: Coordinator, *states: WorkerState) -> tuple[int, ...]:
    return tuple(worker.rank for worker in live_workers(c) if worker.state in states and worker.rank is not None)


def _fatal_sentence(ending: Ending) -> str:
    return "no restart can mend this" if ending.kind is EndKind.CANNOT_WORK else "no_retry names this exception"


def collect_returned(c: Coordinator) -> None:
    """Fetch the values of those that returned while the group was still forming."""
    for number in c.members.values():
        worker = c.roster.workers.get(number)
        if worker is not None and worker.state is WorkerState.RETURNED:
            c.command(CollectResult(worker.id, c.generation))
