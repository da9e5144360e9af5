"""Changing a running group without a failure: asking for growth, taking it in, leaving draining nodes, warming spares.

A planned change first warms a spare in every seat that will stay (unless the user wants none) and then ends the
generation, so that it costs as little as a recovery. It is never charged to the budget. What it does cost are the
steps since the last checkpoint: hence `grow=False` and `timeouts.min_generation_age`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylaunch.coordinator import endings, rendezvous
from raylaunch.coordinator.commands import Level
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.roster import Bundle, Node, Standing, WorkerState
from raylaunch.errors import short_id

if TYPE_CHECKING:
    from raylaunch.coordinator.machine import Coordinator

#: Spares start this long after a generation has formed, in seconds: the first steps have the machine to themselves.
SPARES_AFTER_SECONDS = 1.0
#: Nodes that join together are taken in together: how long the first waits for the others to be ready, in seconds.
TOGETHER_SECONDS = 2.0
#: How many units of growth are asked for at a time: enough to fill a new node, few enough not to burden Ray.
GROWTH_AT_ONCE = 16
#: "auto": spares may take this share of a node's free memory.
SPARES_MEMORY_SHARE = 0.25


@dataclass(slots=True, eq=False)
class Plan:
    """A planned change of the running group."""

    reason: str
    #: Spares of seats that stay which were not ready when the plan was made.
    awaited: set[int]
    #: Go ahead at this time even if not everything is warm.
    latest: float


# -- growth ----------------------------------------------------------------------------------------------------------


def ask_for_growth(c: Coordinator) -> None:
    """Ask for the minimum again if its group is gone, and for units above it while it stands; else withdraw those.

    Pending units would take every freed resource from another job's group, or from our own minimum: so not while
    somebody else's group waits (both seen with Ray 2.60).
    """
    _give_back_doubled(c)
    roster, bounds, gathering = c.roster, c.spec.bounds, c.gathering
    if gathering.ask_at is not None and c.now >= gathering.ask_at:
        gathering.ask_at = None
        c.request_group(bounds.min_units, minimum=True, avoid=_shunned(c))
    if gathering.ask_at is not None:
        c.wake(gathering.ask_at)
    wanted = c.phase in (Phase.RENDEZVOUS, Phase.HELD) or c.spec.grow
    missing = bounds.max_units - roster.asked
    pending = roster.asked - roster.reserved - roster.minimum_pending
    if roster.minimum_pending or gathering.ask_at is not None or c.others_waiting or not wanted:
        if pending > 0:
            c.release_groups([g for g in roster.groups.values() if not g.minimum and not g.bundles[0].placed])
        return
    if missing <= 0:
        return
    one_per_node = c.spec.placement_strategy == "STRICT_SPREAD"
    room = (1 if one_per_node else GROWTH_AT_ONCE) - pending
    if room <= 0:
        return
    nodes = roster.nodes.values()
    occupied = [node.id for node in nodes if one_per_node and node.bundles and not node.lost]
    avoid = tuple(sorted({*_shunned(c), *occupied}))
    only = tuple(sorted(n.id for n in nodes if n.bundles)) if c.spec.placement_strategy == "STRICT_PACK" else ()
    for _ in range(min(missing, room)):
        c.request_group(1, minimum=False, avoid=avoid, only=only)
    c.gathering.last_growth_asked = c.now


def _give_back_doubled(c: Coordinator) -> None:
    """One unit a node: Ray may bring a lost bundle of the minimum back where a unit of growth is, which then goes."""
    if c.spec.placement_strategy != "STRICT_SPREAD":
        return
    growth = [group for group in c.roster.groups.values() if not group.minimum and group.bundles[0].placed]
    c.release_groups(
        [
            group
            for group in growth
            if len(c.roster.nodes[group.bundles[0].node].bundles) > 1 and not group.bundles[0].manned
        ]
    )


def _shunned(c: Coordinator) -> tuple[str, ...]:
    """Nodes that are there but must not be used: draining, or with the wrong versions."""
    return tuple(sorted(n.id for n in c.roster.nodes.values() if not n.lost and (n.unfit or n.draining)))


# -- planned changes -------------------------------------------------------------------------------------------------


def decide(c: Coordinator) -> None:
    """Start, continue or carry out a planned change of the running group."""
    if c.plan is None:
        reason = _reason_to_leave(c) or _reason_to_grow(c)
        if not reason:
            return
        c.because(reason)
        if c.spec.spares:
            _fill(c, gently=False)
        c.plan = Plan(reason, _warming(c), latest=c.now + c.spec.timeouts.start)
    if not _reason_to_leave(c) and not _fresh(c):
        c.plan = None  # what it was for has gone
        return
    if c.now >= c.plan.latest or (_together(c, c.plan) and _warm(c, c.plan)):
        _carry_out(c, c.plan)
    else:
        c.wake(c.plan.latest)


def _fresh(c: Coordinator) -> int:
    """Bundles that a re-formation could take in: ready, or nearly."""
    return c.roster.unmanned[Standing.USABLE] + c.roster.unmanned[Standing.COMING]


def _reason_to_grow(c: Coordinator) -> str:
    if not c.spec.grow or not c.roster.unmanned[Standing.USABLE]:
        return ""
    old_enough = c.formed_at + c.spec.timeouts.min_generation_age
    if c.now < old_enough:
        c.wake(old_enough)
        return ""
    return "new seats are free"


def _reason_to_leave(c: Coordinator) -> str:
    """Ranks sit on a draining node, and the minimum would hold without it."""
    nodes = [c.roster.nodes[node] for node in sorted(c.roster.draining)]
    draining = [node for node in nodes if any(bundle.manned for bundle in node.bundles.values())]
    if not draining:
        return ""
    leaving = sum(bundle.manned for node in draining for bundle in node.bundles.values())
    staying = c.world_size // c.spec.bounds.unit - leaving
    if staying + c.roster.unmanned[Standing.USABLE] < c.spec.bounds.min_units:
        return ""
    return f"node {', '.join(short_id(node.id) for node in draining)} is being drained"


def _stays(c: Coordinator, bundle: Bundle) -> bool:
    node = c.roster.nodes[bundle.node]
    return not (node.draining or node.lost or node.unfit)


def _together(c: Coordinator, plan: Plan) -> bool:
    """Whether nothing more is about to be ready, or the first has waited long enough for it."""
    if not c.roster.unmanned[Standing.COMING]:
        return True
    until = plan.latest - c.spec.timeouts.start + TOGETHER_SECONDS
    if c.now < until:
        c.wake(until)
    return c.now >= until


def _warming(c: Coordinator) -> set[int]:
    """Spares that are about to be ready in seats that hold a rank."""
    starting = (WorkerState.STARTING, WorkerState.WARMING)
    return {w.id for w in c.roster.workers.values() if w.state in starting and w.seat.member is not None}


def _warm(c: Coordinator, plan: Plan) -> bool:
    """Whether none of the spares that the plan waits for is still about to be ready."""
    while plan.awaited:
        worker = c.roster.workers.get(next(iter(plan.awaited)))
        if worker is not None and worker.state in (WorkerState.STARTING, WorkerState.WARMING):
            return False
        plan.awaited.pop()
    return True


def _carry_out(c: Coordinator, plan: Plan) -> None:
    before = c.world_size
    staying = sum(bundle.manned and _stays(c, bundle) for bundle in c.roster.bundles())
    expected = staying + c.roster.unmanned[Standing.USABLE]
    endings.end_generation(c)
    c.tell(f"generation {c.generation} ({before} workers) ended in order to re-form: {plan.reason}", Level.WARNING)
    rendezvous.begin(c)
    c.gathering.expected = expected


# -- spares ----------------------------------------------------------------------------------------------------------


def replenish_spares(c: Coordinator) -> None:
    """Once the group runs, start the spares that the next failure will need; once a generation."""
    if c.spares_due is None:
        return
    if c.now < c.spares_due:
        c.wake(c.spares_due)
        return
    c.spares_due = None
    _fill(c, gently=True)


def _fill(c: Coordinator, *, gently: bool) -> None:
    """Start a spare in each seat that holds a rank and has none, as many as each node may hold."""
    for node in c.roster.nodes.values():
        seats = [seat for bundle in node.bundles.values() for seat in bundle.seats]
        allowed = min(_allowed(c, node), len(seats)) - sum(seat.spare is not None for seat in seats)
        for seat in seats:
            if allowed > 0 and seat.spare is None and seat.member is not None and _stays(c, seat.bundle):
                c.start_worker(seat, gently=gently)
                allowed -= 1


def _allowed(c: Coordinator, node: Node) -> int:
    """How many spares a node may hold: what the user said, or what fits."""
    if c.spec.spares >= 0:
        return c.spec.spares
    if not node.memory_per_worker:
        return len(node.bundles) * c.spec.bounds.unit
    return int(node.memory_available * SPARES_MEMORY_SHARE / node.memory_per_worker)
