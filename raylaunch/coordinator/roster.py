"""Who sits where: groups, bundles, seats, workers and nodes, with counters that make every question O(1).

    group 1──n bundle 1──unit seat 1──1 spare   (a worker without a rank)
                                  1──1 member  (the worker that is a rank of the live generation)

The roster only keeps facts; what follows from them is decided in `decide.py`. A bundle's *standing* is recomputed
whenever something in the bundle changes, and counted, so that ten thousand seats cost no more per event than ten.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from raylaunch.coordinator.commands import Process
from raylaunch.coordinator.events import WorkerReady


class WorkerState(str, enum.Enum):
    """The life of a worker."""

    STARTING = "starting"  # asked for; no process is known yet
    WARMING = "warming"  # its process runs and imports
    READY = "ready"  # a warm spare
    SILENT = "silent"  # a spare that did not answer the roll call
    JOINING = "joining"  # promoted: loads the function and joins the process group
    RUNNING = "running"  # in train_fn
    RETURNED = "returned"  # train_fn returned; its value is still with it
    COLLECTED = "collected"  # its value is in the driver
    DYING = "dying"  # killed by us, not known to be gone
    GONE = "gone"


#: While nobody waits for it, a seat whose spare fails to start this often stays without one until the next rendezvous.
MAX_FAILED_STARTS = 5
#: A worker in one of these holds a rank of the live generation.
MEMBER_STATES = frozenset({WorkerState.JOINING, WorkerState.RUNNING, WorkerState.RETURNED, WorkerState.COLLECTED})


class Standing(str, enum.Enum):
    """What a bundle is good for."""

    PENDING = "pending"  # not reserved: never placed, or lost with its node
    BLOCKED = "blocked"  # reserved, but its node drains or is under suspicion, or a spare in it is silent
    COMING = "coming"  # reserved; its workers start
    USABLE = "usable"  # every seat has a ready spare


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, from the command that asked for it until it is known to be gone."""

    id: int
    seat: Seat
    asked_at: float
    gently: bool
    state: WorkerState = WorkerState.STARTING
    node: str = ""
    host: str = ""
    process: Process | None = None
    port: int = 0
    generation: int = 0
    rank: int | None = None
    local_rank: int | None = None
    roll: int = 0  # the roll call it has still to answer; 0: none
    silent_since: float = 0.0
    early: WorkerReady | None = None  # it came before the worker's start was heard of


@dataclass(slots=True, eq=False)
class Seat:
    """One place where a rank can sit."""

    bundle: Bundle
    slot: int
    spare: Worker | None = None
    member: Worker | None = None
    #: Earlier processes of this seat that are not known to be gone.
    predecessors: list[Worker] = field(default_factory=list)
    #: Starts that failed in a row.
    failed_starts: int = 0
    #: A start is due at this time (a failed one is repeated after a pause); None: no start is due.
    retry_at: float | None = None

    @property
    def given_up(self) -> bool:
        """Whether its spares have failed to start so often that no other is started."""
        return self.failed_starts >= MAX_FAILED_STARTS


@dataclass(slots=True, eq=False)
class Bundle:
    """One growth unit in a placement group."""

    group: Group
    index: int
    placed: bool = False
    node: str = ""
    devices: tuple[str, ...] = ()
    seats: list[Seat] = field(default_factory=list)
    standing: Standing = Standing.PENDING

    @property
    def manned(self) -> bool:
        """Whether any seat holds a rank of the live generation."""
        for seat in self.seats:  # noqa: SIM110 - a plain loop: this runs with every event
            if seat.member is not None:
                return True
        return False


@dataclass(slots=True, eq=False)
class Group:
    """One placement group."""

    id: int
    minimum: bool
    asked_at: float
    bundles: list[Bundle] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Node:
    """One Ray node that the run has met."""

    id: str
    order: int  # the order in which the run met them
    draining: bool = False
    lost: bool = False
    suspect: bool = False
    unfit: str = ""  # why no worker can work there: wrong versions, for example
    bundles: dict[tuple[int, int], Bundle] = field(default_factory=dict)
    memory_available: int = 0
    memory_per_worker: int = 0


class Roster:
    """All of it. Methods change facts and keep the counters right."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.groups: dict[int, Group] = {}
        self.workers: dict[int, Worker] = {}  # all that are not GONE
        self.nodes: dict[str, Node] = {}
        self.usable: dict[tuple[int, int], Bundle] = {}
        self.standings: Counter[Standing] = Counter()
        #: Bundles without members, by standing: what growth could take in.
        self.unmanned: Counter[Standing] = Counter()
        self.silent: dict[int, Worker] = {}
        self.draining: set[str] = set()
        #: Bundles of the minimum group that are not reserved.
        self.minimum_pending = 0
        self._retries: list[tuple[float, int, Seat]] = []
        self._tickets = 0  # keeps the order of equal times
        self.last_worker = 0
        self.last_group = 0
        self._counted: dict[tuple[int, int], tuple[Standing, bool]] = {}

    # -- groups and bundles ------------------------------------------------------------------------------------------

    def add_group(self, bundles: int, *, minimum: bool, at: float) -> Group:
        """A new group, nothing of it placed."""
        self.last_group += 1
        group = Group(self.last_group, minimum, at)
        for index in range(bundles):
            bundle = Bundle(group, index)
            bundle.seats = [Seat(bundle, slot) for slot in range(self.unit)]
            group.bundles.append(bundle)
            self.refresh(bundle)
        self.groups[group.id] = group
        return group

    def remove_group(self, group: Group) -> None:
        """Forget a group. Its workers must have been killed."""
        for bundle in group.bundles:
            self._move(bundle, "")
            for seat in bundle.seats:
                seat.retry_at = None
            key = (group.id, bundle.index)
            standing, manned = self._counted.pop(key)
            self._count(bundle, standing, manned, -1)
            self.usable.pop(key, None)
        del self.groups[group.id]

    def place(self, bundle: Bundle, node: str) -> None:
        """The bundle is reserved on `node`."""
        self._move(bundle, node)
        bundle.placed = True
        self.refresh(bundle)

    def lose(self, bundle: Bundle) -> None:
        """The bundle went with its node; Ray keeps trying to place it again."""
        self._move(bundle, "")
        bundle.placed = False
        self.refresh(bundle)

    def _move(self, bundle: Bundle, node: str) -> None:
        key = (bundle.group.id, bundle.index)
        if bundle.node and bundle.node in self.nodes:
            self.nodes[bundle.node].bundles.pop(key, None)
        bundle.node = node
        if node:
            self.node(node).bundles[key] = bundle

    def refresh(self, bundle: Bundle) -> None:
        """Recompute a bundle's standing after something in it has changed."""
        key = (bundle.group.id, bundle.index)
        old = self._counted.get(key)
        standing = self._standing(bundle)
        manned = bundle.manned
        bundle.standing = standing
        if old == (standing, manned):
            return
        if old is not None:
            self._count(bundle, *old, -1)
        self._count(bundle, standing, manned, 1)
        self._counted[key] = (standing, manned)
        if standing is Standing.USABLE:
            self.usable[key] = bundle
        else:
            self.usable.pop(key, None)

    def _count(self, bundle: Bundle, standing: Standing, manned: bool, change: int) -> None:
        self.standings[standing] += change
        if standing is Standing.PENDING and bundle.group.minimum:
            self.minimum_pending += change
        if not manned:
            self.unmanned[standing] += change

    def _standing(self, bundle: Bundle) -> Standing:
        if not bundle.placed:
            return Standing.PENDING
        node = self.nodes.get(bundle.node)
        if node is not None and (node.draining or node.lost or node.unfit):
            return Standing.BLOCKED
        ready, silent = True, False
        for seat in bundle.seats:  # a plain loop: this runs with every event
            state = seat.spare.state if seat.spare else None
            ready = ready and state is WorkerState.READY
            silent = silent or state is WorkerState.SILENT
        if ready:
            return Standing.USABLE
        if silent or (node is not None and node.suspect):
            return Standing.BLOCKED
        return Standing.COMING

    def bundles(self) -> Iterator[Bundle]:
        """Every bundle of every group."""
        for group in self.groups.values():
            yield from group.bundles

    @property
    def reserved(self) -> int:
        """How many bundles Ray holds for the run."""
        return self.asked - self.standings[Standing.PENDING]

    @property
    def asked(self) -> int:
        """How many bundles the run has asked for, reserved or pending."""
        return sum(self.standings.values())

    # -- nodes -------------------------------------------------------------------------------------------------------

    def node(self, node: str) -> Node:
        """The node's record, made at the first meeting."""
        if node not in self.nodes:
            self.nodes[node] = Node(node, order=len(self.nodes))
        return self.nodes[node]

    def suspect(self, node: str, suspect: bool) -> None:
        """Put a node under suspicion of being gone, or lift it."""
        record = self.nodes.get(node)
        if record is not None and record.suspect != suspect:
            record.suspect = suspect
            self.refresh_node(record)

    def refresh_node(self, node: Node) -> None:
        """Recompute the standing of everything on a node."""
        for bundle in list(node.bundles.values()):
            self.refresh(bundle)

    # -- workers -----------------------------------------------------------------------------------------------------

    def add_worker(self, seat: Seat, *, at: float, gently: bool) -> Worker:
        """A new spare for a seat that has none."""
        assert seat.spare is None, f"seat {seat.slot} of bundle {seat.bundle.index} has a spare already"
        self.last_worker += 1
        worker = Worker(self.last_worker, seat, at, gently)
        self.workers[worker.id] = worker
        seat.spare = worker
        seat.retry_at = None
        self.refresh(seat.bundle)
        return worker

    def set_state(self, worker: Worker, state: WorkerState) -> None:
        """Move a worker along its life, and its seat with it."""
        seat = worker.seat
        worker.state = state
        self.silent.pop(worker.id, None)
        if state is WorkerState.SILENT:
            self.silent[worker.id] = worker
        elif state in MEMBER_STATES:
            if seat.spare is worker:
                seat.spare = None
            seat.member = worker
        elif state in (WorkerState.DYING, WorkerState.GONE):
            if seat.spare is worker:
                seat.spare = None
            if seat.member is worker:
                seat.member = None
            if state is WorkerState.DYING and worker.process is not None:
                seat.predecessors.append(worker)
            if state is WorkerState.GONE:
                self.workers.pop(worker.id, None)
                if worker in seat.predecessors:
                    seat.predecessors.remove(worker)
        if seat.bundle.group.id in self.groups:
            self.refresh(seat.bundle)

    def forget_predecessors(self, seat: Seat) -> None:
        """The seat's new process has made sure that the earlier ones are gone."""
        for worker in seat.predecessors:
            self.workers.pop(worker.id, None)
        seat.predecessors.clear()

    def retry(self, seat: Seat, at: float) -> None:
        """Start a worker in this seat at a later time."""
        seat.retry_at = at
        self._tickets += 1
        heapq.heappush(self._retries, (at, self._tickets, seat))

    def due_retries(self, now: float) -> list[Seat]:
        """Seats whose start is due, taken off the list."""
        due = []
        while self._retries and self._retries[0][0] <= now:
            at, _, seat = heapq.heappop(self._retries)
            if seat.retry_at == at:  # otherwise a later call has replaced or withdrawn it
                seat.retry_at = None
                if seat.spare is None and seat.bundle.group.id in self.groups:
                    due.append(seat)
        return due

    def next_retry(self) -> float | None:
        """When the next start is due."""
        while self._retries and self._retries[0][2].retry_at != self._retries[0][0]:
            heapq.heappop(self._retries)
        return self._retries[0][0] if self._retries else None
