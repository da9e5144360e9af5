"""Whether to leave a phase: one function a phase, called after every event. The table in `machine.py` names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylaunch.coordinator import endings, rendezvous, reshape, rootcause
from raylaunch.coordinator.commands import Level, Outcome
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.roster import WorkerState
from raylaunch.errors import Ending, EndKind

if TYPE_CHECKING:
    from raylaunch.coordinator.machine import Coordinator

#: A spare that stays silent for longer than this is replaced.
SILENT_SECONDS = 5.0

_BUSY = frozenset({WorkerState.JOINING, WorkerState.RUNNING})


def nothing(c: Coordinator) -> None:
    pass


def held(c: Coordinator) -> None:
    endings.watch_incident(c)
    start_due_workers(c)
    replace_silent(c)
    if c.roster.groups or c.gathering.ask_at is not None:  # otherwise there was no room: the next run asks for it
        reshape.ask_for_growth(c)


def gathering(c: Coordinator) -> None:
    endings.watch_incident(c)
    start_due_workers(c)
    replace_silent(c)
    reshape.ask_for_growth(c)
    verdict = rendezvous.decide(c)
    if verdict is not None and verdict.outcome is Outcome.NO_ROOM:
        endings.finish(c, verdict.outcome, verdict.reason, c.recovering)
    elif verdict is not None:
        endings.starts_timed_out(c, verdict.reason)


def roll_call(c: Coordinator) -> None:
    endings.watch_incident(c)
    if c.roll_open and c.now < c.roll_until:
        return c.wake(c.roll_until)
    for number in c.roll_open:
        worker = c.roster.workers[number]
        worker.silent_since = c.now
        c.roster.set_state(worker, WorkerState.SILENT)
        c.roster.suspect(worker.node, suspect=True)
    silent = len(c.roll_open)
    c.because(f"{silent} spares did not answer the roll call" if silent else "the roll call is over")
    c.roll_open = set()
    c.roll_owed = False
    return rendezvous.begin(c)


def forming(c: Coordinator) -> None:
    endings.watch_incident(c)
    start_due_workers(c)
    if c.joined == c.world_size:
        return formed(c)
    limits = c.spec.timeouts
    until = c.promoted_at + limits.start + limits.process_group
    if c.now < until:
        rendezvous.tell_forming(c)
        return c.wake(until)
    late = [worker for worker in endings.live_workers(c) if worker.state is WorkerState.JOINING]
    ranks = ", ".join(str(worker.rank) for worker in late[:10])
    seconds = c.now - c.promoted_at
    message = f"ranks {ranks} had not joined the process group after {seconds:.0f} s"
    return endings.fail(c, late[0], Ending(EndKind.TIMED_OUT, message=message))


def formed(c: Coordinator) -> None:
    c.formed_at = c.now
    c.roll_owed = False
    c.spares_due = c.now + reshape.SPARES_AFTER_SECONDS if c.spec.spares else None
    size = f"{c.world_size}/{c.spec.bounds.max_workers} on {c.num_nodes} node{'s'[: c.num_nodes != 1]}"
    if c.recovering is not None:
        seconds = c.now - c.recovering.opened_at
        c.recoveries.append(rootcause.Recovered(c.recovering, c.generation, seconds, c.world_size))
        c.recovering = None
        c.tell(f"re-formed {size} in {seconds:.2f} s (generation {c.generation})", Level.WARNING)
    else:
        c.tell(f"formed {size} (generation {c.generation})")
    c.enter(Phase.RUNNING)
    endings.collect_returned(c)


def running(c: Coordinator) -> None:
    endings.watch_incident(c)
    if c.collected == c.world_size:
        text = f"run {c.spec.run_id} finished: {c.world_size} workers returned"
        return endings.finish(c, Outcome.SUCCEEDED, text)
    start_due_workers(c)
    replace_silent(c)
    reshape.ask_for_growth(c)
    reshape.replenish_spares(c)
    return reshape.decide(c)


def settling(c: Coordinator) -> None:
    assert c.incident is not None, "a run settles the cause of its failure"
    endings.watch_incident(c)
    if c.incident.settled:
        text = f"run {c.spec.run_id} failed: {c.incident.describe()}"
        endings.finish(c, Outcome.FAILED, f"{text}; {c.verdict}" if c.verdict else text, c.incident)


def stopping(c: Coordinator) -> None:
    busy = any(w in c.roster.workers and c.roster.workers[w].state in _BUSY for w in c.members.values())
    if busy and c.now < c.stop_until:
        return c.wake(c.stop_until)
    return endings.finish(c, Outcome.STOPPED, f"run {c.spec.run_id} was stopped: {c.verdict}")


def start_due_workers(c: Coordinator) -> None:
    """Repeat the starts whose pause is over."""
    for seat in c.roster.due_retries(c.now):
        c.start_worker(seat, gently=c.phase is Phase.RUNNING)
    due = c.roster.next_retry()
    if due is not None:
        c.wake(due)


def replace_silent(c: Coordinator) -> None:
    """Spares that stay silent are killed, and others started in their seats."""
    if not c.roster.silent:
        return None
    oldest = next(iter(c.roster.silent.values())).silent_since
    if c.now < oldest + SILENT_SECONDS:
        return c.wake(oldest + SILENT_SECONDS)
    for worker in [w for w in c.roster.silent.values() if w.silent_since + SILENT_SECONDS <= c.now]:
        endings.spare_failed(c, worker, Ending(EndKind.UNREACHABLE))
    return start_due_workers(c)
