"""Gathering ready seats until the bounds hold: when to wait, when to form, when to give up.

All seats ready: form at once. The minimum ready: last call; wait for seats that are on their way, but no longer than
gathering has taken so far (so that a slow file system, which slows all of them, is given its time), and at least
`timeouts.last_call`; units that Ray has not placed yet are waited for by the first generation only (growth takes them
in later). Below the minimum: wait, as long as `timeouts.placement` (no room) and `timeouts.start` (room,
but workers not ready) allow, and say what for.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raylaunch.coordinator.commands import Level, Outcome, Promote
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.ranks import assign
from raylaunch.coordinator.roster import Bundle, Standing, WorkerState

if TYPE_CHECKING:
    from raylaunch.coordinator.machine import Coordinator

#: A user hears what a rendezvous waits for after this many seconds, and then at doubling intervals.
FIRST_TELL_SECONDS = 5.0
#: `timeouts.placement=0` means "at once"; Ray places a group that fits in some 5 ms, and is given this much.
PLACEMENT_FLOOR_SECONDS = 1.0
#: Everything is released and asked for anew after a pause between these, in seconds: two half-lost groups would wait
#: for each other for ever (ray#65147), and two runs that ask anew must not do so in step.
RENEWAL_PAUSE_SECONDS = (0.5, 2.5)


@dataclass(slots=True, eq=False)
class Gathering:
    """What one rendezvous remembers."""

    since: float
    #: When the minimum was first there; None: it isn't.
    min_since: float | None = None
    #: What it is short of ("room" or "ready workers"), since when, and how long that has been the case before.
    short_of: str = ""
    short_since: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: {"room": 0.0, "ready workers": 0.0})
    renewed: bool = False
    #: When to ask for the minimum group (again); None: it has been asked for.
    ask_at: float | None = None
    #: Ray's own words, where it refused a group.
    refusal: str = ""
    last_growth_asked: float = float("-inf")
    tell_at: float = 0.0
    told: int = 0
    #: A planned change: the units that stay and those that were ready. It must not make the group smaller than that, so
    #: it waits for them; what else is on its way gets the last call, since nobody trains meanwhile.
    expected: int = 0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The rendezvous has come to nothing in its time: for want of room, or (FAILED) of workers that get ready."""

    outcome: Outcome
    reason: str


def begin(c: Coordinator) -> None:
    """Start a rendezvous, with a spare starting in every seat that has none."""
    c.gathering = Gathering(c.now, ask_at=c.gathering.ask_at)
    man_seats(c, given_up=True)
    c.enter(Phase.RENDEZVOUS)


def man_seats(c: Coordinator, *, given_up: bool) -> None:
    """Start a spare in every seat that has none; also where none has started for some time, if `given_up`.

    Lost bundles included, where a start is due: the worker waits there until Ray has placed the bundle again.
    """
    for bundle in c.roster.bundles():
        if bundle.node and c.roster.nodes[bundle.node].lost:
            continue
        for seat in bundle.seats:
            if given_up and seat.spare is None:
                seat.failed_starts = 0
            if seat.spare is None and not seat.given_up and (bundle.placed or seat.retry_at is not None):
                c.start_worker(seat, gently=False)


def decide(c: Coordinator) -> GiveUp | None:
    """Form, wait or give up."""
    g, bounds, usable = c.gathering, c.spec.bounds, c.roster.standings[Standing.USABLE]
    if usable >= bounds.max_units:
        form(c)
        return None
    if usable >= bounds.min_units:
        _last_call(c, usable)
        return None
    g.min_since = None
    if g.ask_at is not None:  # nothing has been asked for: that is not the cluster's lack of room
        _account(c, "")
        return None
    return _wait(c)


def _last_call(c: Coordinator, usable: int) -> None:
    g, last_call = c.gathering, c.spec.timeouts.last_call
    if g.min_since is None:
        _account(c, "")
        g.min_since = c.now
    until = c.now
    if c.roster.standings[Standing.COMING]:
        until = g.min_since + max(last_call, g.min_since - g.since)
        if usable < g.expected:
            until = g.since + c.spec.timeouts.start
    if not c.generation and c.roster.asked > c.roster.reserved + c.roster.minimum_pending:
        until = max(until, g.last_growth_asked + last_call)
    if c.now < until:
        c.wake(until)
    else:
        form(c)


def _account(c: Coordinator, short_of: str) -> float:
    """Note what the rendezvous is short of; returns for how long it has been, all in all."""
    g = c.gathering
    if short_of != g.short_of:
        if g.short_of:
            g.spent[g.short_of] += c.now - g.short_since
        g.short_of, g.short_since = short_of, c.now
    return g.spent[short_of] + c.now - g.short_since if short_of else 0.0


def _wait(c: Coordinator) -> GiveUp | None:
    g, limits, standings = c.gathering, c.spec.timeouts, c.roster.standings
    room = standings[Standing.USABLE] + standings[Standing.COMING]
    if room >= c.spec.bounds.min_units:
        spent, limit = _account(c, "ready workers"), limits.start
    else:
        spent, limit = _account(c, "room"), max(limits.placement, PLACEMENT_FLOOR_SECONDS)
    if spent >= limit:
        return _give_up(c, spent, room)
    if g.short_of == "room" and not g.renewed and c.roster.reserved:
        # Ray moves no bundle off a draining node: nothing is gained by waiting.
        drained = any(c.roster.nodes[node].bundles for node in c.roster.draining)
        if drained or spent >= limit / 2:
            _renew(c, "a node is being drained" if drained else "half of timeouts.placement is over")
            return None
        c.wake(c.now + limit / 2 - spent)
    c.wake(c.now + limit - spent)
    _tell_waiting(c, room, limit - spent)
    return None


def _give_up(c: Coordinator, spent: float, room: int) -> GiveUp:
    """The timeout of what the rendezvous is short of is over."""
    g, bounds = c.gathering, c.spec.bounds
    after = f" after {c.recovering.describe()}" if c.recovering is not None else ""
    if g.short_of == "room":
        text = (
            f"run {c.spec.run_id} failed{after}: the cluster had no room for {bounds.min_workers} workers for"
            f" {spent:.0f} s (timeouts.placement): {room} of {bounds.min_units} bundles of"
            f" {_amounts(c.spec.bundle_resources)} could be used"
        )
        unfit = sorted(node.unfit for node in c.roster.nodes.values() if node.unfit)
        text += f"; not used: {'; '.join(unfit)}" if unfit else ""
        if g.refusal:
            text += f"; Ray: {g.refusal}"
        return GiveUp(Outcome.NO_ROOM, text)
    slow = sorted({_where(bundle) for bundle in c.roster.bundles() if bundle.standing is Standing.COMING})
    g.spent["ready workers"], g.short_since = 0.0, c.now
    return GiveUp(Outcome.FAILED, f"not ready after {spent:.0f} s (timeouts.start): {'; '.join(slow[:8])}")


def _renew(c: Coordinator, why: str) -> None:
    """Release everything and ask anew, once."""
    g = c.gathering
    g.renewed = True
    _account(c, "")  # while nothing is asked for, the cluster lacks nothing
    low, high = RENEWAL_PAUSE_SECONDS
    share = (
        zlib.crc32(c.spec.run_id.encode()) % 1000 / 1000
    )  # the core has no chance of its own: each run has its share
    g.ask_at = c.now + low + (high - low) * share
    c.wake(g.ask_at)
    c.release_groups(list(c.roster.groups.values()))
    c.tell(f"{why}: releasing everything and asking anew", Level.WARNING, shortage=True)


def form(c: Coordinator) -> None:
    """Make ranks of the ready spares: one message each, and nothing else stands between them and train_fn."""
    bundles = [c.roster.usable[key] for key in sorted(c.roster.usable)]
    c.generation += 1
    c.members = {}
    c.joined = c.collected = 0
    assigned = assign(
        bundles,
        c.roster.nodes,
        first_node=c.first_node,
        generation=c.generation,
        restart_count=c.restarts,
        gpus_per_worker=c.spec.gpus_per_worker,
    )
    for worker, assignment in assigned:
        worker.generation, worker.rank, worker.local_rank = c.generation, assignment.rank, assignment.local_rank
        c.roster.set_state(worker, WorkerState.JOINING)
        c.members[assignment.rank] = worker.id
        c.command(Promote(worker.id, assignment))
    c.world_size, c.num_nodes, c.first_node = len(assigned), assigned[0][1].num_nodes, assigned[0][0].node
    c.promoted_at = c.now
    c.gathering.tell_at, c.gathering.told = c.now + FIRST_TELL_SECONDS, 0
    low, high = c.spec.bounds.min_workers, c.spec.bounds.max_workers
    short = "" if c.world_size == high else f", minimum is {low}"
    c.because(f"forming with {c.world_size} of {high}{short}")
    c.enter(Phase.FORMING)


def tell_forming(c: Coordinator) -> None:
    """Say now and then which ranks a generation waits for."""
    waiting = c.world_size - c.joined
    _tell_now_and_then(c, f"forming generation {c.generation}: {waiting} of {c.world_size} ranks have not joined yet")


def _tell_waiting(c: Coordinator, room: int, left: float) -> None:
    g, wanted = c.gathering, c.spec.bounds.min_units
    if not g.tell_at:
        g.tell_at = g.since + FIRST_TELL_SECONDS
    if g.short_of == "room":
        text = f"waiting for room: {room} of {wanted} bundles of {_amounts(c.spec.bundle_resources)} can be used"
    else:
        usable = c.roster.standings[Standing.USABLE]
        text = f"waiting for workers to start and import: {usable} of {wanted} bundles are ready"
    _tell_now_and_then(c, f"{text}; gives up in {left:.0f} s", shortage=g.short_of == "room")


def _tell_now_and_then(c: Coordinator, text: str, *, shortage: bool = False) -> None:
    g = c.gathering
    if c.now >= g.tell_at:
        g.told += 1
        g.tell_at = c.now + FIRST_TELL_SECONDS * 2**g.told
        c.tell(text, Level.WARNING, shortage=shortage)
    c.wake(g.tell_at)


def _amounts(resources: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"


def _where(bundle: Bundle) -> str:
    states = [seat.spare.state.value if seat.spare else "not started" for seat in bundle.seats]
    return f"a worker on node {bundle.node[:8]} is {', '.join(sorted(set(states) - {'ready'}))}"
