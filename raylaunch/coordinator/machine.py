"""The coordinator: a pure state machine. Events in, commands out, time inside the event.

It decides one run; or, held by a launcher, several, one after the other on the same groups.

Every rule about what may follow what stands in `TABLE` at the end of this file. `Coordinator.handle` is the only door:

1. An event that the table doesn't allow in this phase raises `InternalError`, and nothing has changed.
2. The event's fact is folded into the roster (`_on_...`), the same way in every phase.
3. The phase's one `decide` function looks at the facts and may leave for another phase, until none wants to.

Nothing here may import ray, torch, clocks, randomness, environment, threads or await: that is what lets ten thousand
failure schedules run in a minute, and a user's bug be replayed from the journal. Who adds a kind of failure: add an
`EndKind`, give it a strength in `rootcause.py`, and, if it is a new fact, an event and a row in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from raylaunch.coordinator import decide, facts, rendezvous, reshape, rootcause
from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import (
    Command,
    KillWorkers,
    Level,
    ReleaseBundles,
    RequestBundles,
    StartWorker,
    Tell,
    WakeAt,
)
from raylaunch.coordinator.phase import LIVE_PHASES, Phase
from raylaunch.coordinator.roster import Group, Roster, Seat, Worker, WorkerState
from raylaunch.errors import InternalError
from raylaunch.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Decision:
    """What one event led to."""

    commands: tuple[Command, ...]
    reason: str
    before: Phase
    after: Phase
    generation: int
    #: The event was impossible, and has changed nothing: a bug of ours.
    refused: bool = False


class Coordinator:
    """Decides everything about a run, or a launcher's. See the module's text for how, `TABLE` for what may follow."""

    def __init__(self) -> None:
        self.phase = Phase.NEW
        self.now = float("-inf")
        self.spec: RunSpec
        self.roster: Roster
        #: Whether a launcher wants its groups kept when a run ends.
        self.held = False
        #: The number of the newest generation; 0 before the first. It goes on rising from run to run.
        self.generation = 0
        #: rank -> worker id of the live generation; empty when there is none.
        self.members: dict[int, int] = {}
        self.first_node = ""  # rank 0's
        self.formed_at = 0.0
        self.promoted_at = 0.0
        self.others_waiting = False
        self.gathering = rendezvous.Gathering(0.0)
        self.plan: reshape.Plan | None = None
        self.spares_due: float | None = None
        self.roll = 0
        self.roll_open: set[int] = set()
        self.roll_until = 0.0
        #: A generation has ended because a node may have gone, and nobody has found out since.
        self.roll_owed = False
        self.pulse_told: set[int] = set()
        self._out: list[Command] = []
        self._reasons: list[str] = []
        self._wake: float | None = None
        self._wake_asked: float | None = None
        self.forget_run()

    def forget_run(self) -> None:
        """Everything that belongs to one run is as before the first."""
        self.world_size = 0
        self.joined = 0
        self.collected = 0
        self.num_nodes = 0
        self.restarts = 0
        self.incident: rootcause.Incident | None = None
        #: The incident that the generation being formed recovers from.
        self.recovering: rootcause.Incident | None = None
        self.recoveries: list[rootcause.Recovered] = []
        self.stop_until = 0.0
        self.verdict = ""  # why the run ends

    # -- the door ----------------------------------------------------------------------------------------------------

    def handle(self, event: e.Event) -> Decision:
        """Take one fact, return what to do. Raises `InternalError`, and changes nothing, for an impossible event."""
        self._check(event)
        before = self.phase
        self.now = event.at
        self._out, self._reasons, self._wake = [], [], None
        if before is Phase.DONE:
            self.because("late: the run is over")
        else:
            FACTS[type(event)](self, event)
        for _ in range(len(Phase)):  # no phase is entered twice for one event
            phase = self.phase
            TABLE[phase].decide(self)
            if self.phase is phase:
                break
        if self.phase is not Phase.DONE and self._wake is not None:
            asked = self._wake_asked
            if asked is None or asked <= self.now or asked > self._wake:
                self._wake_asked = self._wake
                self._out.append(WakeAt(self._wake))
        return Decision(tuple(self._out), "; ".join(self._reasons), before, self.phase, self.generation)

    def refuse(self, error: InternalError) -> Decision:
        """The decision that is recorded for an event that `handle` has refused: nothing, and why."""
        reason = f"InternalError, please report it: {error}"
        return Decision((), reason, self.phase, self.phase, self.generation, refused=True)

    def is_current(self, generation: int) -> bool:
        """Whether a generation is the live one: not fenced, allowed to commit."""
        return generation == self.generation and bool(self.members) and self.phase in LIVE_PHASES

    def _check(self, event: e.Event) -> None:
        if type(event) not in TABLE[self.phase].accepts:
            raise InternalError(f"{type(event).__name__} can't happen in phase {self.phase.value!r}")
        if event.at < self.now:
            raise InternalError(f"time runs backwards: {event.at} after {self.now}")
        if isinstance(event, e.RunRequested) and self.phase is Phase.HELD:
            own = replace(event.spec, run_id=self.spec.run_id, max_restarts=self.spec.max_restarts)
            if own != self.spec:
                raise InternalError("a launcher's run asks for something else than it holds")
        worker, group = getattr(event, "worker", None), getattr(event, "group", None)
        if worker is not None and not 1 <= worker <= self.roster.last_worker:
            raise InternalError(f"{type(event).__name__}: no worker {worker} was ever started")
        if group is not None and not 1 <= group <= self.roster.last_group:
            raise InternalError(f"{type(event).__name__}: no group {group} was ever requested")
        if isinstance(event, e.BundlesPlaced):
            known = self.roster.groups.get(event.group)
            if known is not None and len(event.nodes) != len(known.bundles):
                raise InternalError(f"group {event.group} has {len(known.bundles)} bundles, not {len(event.nodes)}")

    # -- speaking ----------------------------------------------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Add a command to the decision."""
        self._out.append(command)

    def because(self, reason: str) -> None:
        """Add a sentence to the decision's reason."""
        self._reasons.append(reason)

    def tell(self, text: str, level: Level = Level.INFO, *, shortage: bool = False) -> None:
        """Tell the user, and give it as the reason."""
        self.because(text)
        self.command(Tell(text, level, shortage))

    def wake(self, at: float) -> None:
        """Have `decide` run again at this time at the latest."""
        if self._wake is None or at < self._wake:
            self._wake = at

    def enter(self, phase: Phase) -> None:
        """Go to another phase, one that the table allows."""
        assert phase in TABLE[self.phase].leads_to, f"phase {phase.value!r} can't follow {self.phase.value!r}"
        self.phase = phase

    # -- groups and workers ------------------------------------------------------------------------------------------

    def request_group(
        self, bundles: int, *, minimum: bool, avoid: tuple[str, ...] = (), only: tuple[str, ...] = ()
    ) -> None:
        """Ask for a placement group."""
        group = self.roster.add_group(bundles, minimum=minimum, at=self.now)
        self.command(RequestBundles(group.id, bundles, minimum, avoid, only))

    def release_groups(self, groups: list[Group]) -> None:
        """Kill what is in these groups, and give them back."""
        workers = [w for group in groups for bundle in group.bundles for seat in bundle.seats for w in _seated(seat)]
        self.kill(workers)
        for group in groups:
            self.roster.remove_group(group)
        if groups:
            self.command(ReleaseBundles(tuple(group.id for group in groups)))

    def start_worker(self, seat: Seat, *, gently: bool) -> None:
        """Start a spare in a seat that has none."""
        worker = self.roster.add_worker(seat, at=self.now, gently=gently)
        self.command(StartWorker(worker.id, seat.bundle.group.id, seat.bundle.index, gently))

    def kill(self, workers: list[Worker], *, ask: bool = False) -> None:
        """End workers at once; whatever they still say is late, except (`ask`) why the others fail."""
        alive = [worker for worker in workers if worker.state not in (WorkerState.DYING, WorkerState.GONE)]
        for worker in alive:
            self.roster.set_state(worker, WorkerState.DYING)
            self.roll_open.discard(worker.id)
        if alive:
            self.command(KillWorkers(tuple(worker.id for worker in alive), ask))


@dataclass(frozen=True, slots=True)
class Row:
    """What a phase allows: which events, the function that decides about leaving it, and where that may lead."""

    accepts: frozenset[type[e.Event]]
    decide: Callable[[Coordinator], None]
    leads_to: frozenset[Phase]


_BEGINNINGS = frozenset({e.HoldRequested, e.RunRequested})
#: Every event but the first is legal in every phase of a run: facts don't ask whether it suits. What they can't do is
#: come before the run, start it twice, or speak of something that was never asked for.
_ANY_FACT = frozenset(e.EVENTS.values()) - _BEGINNINGS
_ENDS = frozenset({Phase.SETTLING, Phase.HELD, Phase.DONE})

TABLE: dict[Phase, Row] = {
    Phase.NEW: Row(_BEGINNINGS, decide.nothing, frozenset({Phase.HELD, Phase.RENDEZVOUS})),
    Phase.HELD: Row(
        _ANY_FACT | {e.RunRequested}, decide.held, frozenset({Phase.RENDEZVOUS, Phase.ROLL_CALL, Phase.DONE})
    ),
    Phase.RENDEZVOUS: Row(_ANY_FACT, decide.gathering, _ENDS | {Phase.FORMING}),
    Phase.ROLL_CALL: Row(_ANY_FACT, decide.roll_call, _ENDS | {Phase.RENDEZVOUS}),
    Phase.FORMING: Row(
        _ANY_FACT,
        decide.forming,
        _ENDS | {Phase.RUNNING, Phase.ROLL_CALL, Phase.RENDEZVOUS, Phase.STOPPING},
    ),
    Phase.RUNNING: Row(_ANY_FACT, decide.running, _ENDS | {Phase.ROLL_CALL, Phase.RENDEZVOUS, Phase.STOPPING}),
    Phase.SETTLING: Row(_ANY_FACT, decide.settling, frozenset({Phase.HELD, Phase.DONE})),
    Phase.STOPPING: Row(_ANY_FACT, decide.stopping, frozenset({Phase.HELD, Phase.DONE})),
    Phase.DONE: Row(_ANY_FACT, decide.nothing, frozenset()),
}

#: How each event's fact is folded in. After the end of a run every fact is late.
FACTS: dict[type[e.Event], Callable[[Coordinator, Any], None]] = {
    e.HoldRequested: facts.hold_requested,
    e.RunRequested: facts.run_requested,
    e.BundlesPlaced: facts.bundles_placed,
    e.BundlesLost: facts.bundles_lost,
    e.WorkerStarted: facts.worker_started,
    e.WorkerReady: facts.worker_ready,
    e.WorkerAnswered: facts.worker_answered,
    e.WorkerJoined: facts.worker_joined,
    e.WorkerReturned: facts.worker_returned,
    e.ResultCollected: facts.result_collected,
    e.WorkerFailed: facts.worker_failed,
    e.WorkerLost: facts.worker_lost,
    e.NodeLost: facts.node_lost,
    e.NodeDraining: facts.node_draining,
    e.OthersWaiting: facts.others_waiting,
    e.PulseMissed: facts.pulse_missed,
    e.StopRequested: facts.stop_requested,
    e.ReleaseRequested: facts.release_requested,
    e.Tick: facts.tick,
}


def _seated(seat: Seat) -> list[Worker]:
    return [worker for worker in (seat.spare, seat.member) if worker is not None]
