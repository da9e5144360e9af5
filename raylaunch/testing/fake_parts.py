"""The parts of a fake cluster: virtual time, nodes, placement groups, worker processes, generations."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from raylaunch.coordinator.events import Event
from raylaunch.errors import Ending, EndKind

#: What a worker reports whose peer has gone.
CONNECTION_CLOSED = Ending(
    EndKind.RAISED, error_type="RuntimeError", message="Connection closed by peer", collateral=True
)
#: What a worker reports that has waited for its peers in vain.
GROUP_TIMEOUT = Ending(
    EndKind.RAISED, error_type="DistBackendError", message="timed out waiting for peers", collateral=True
)

#: Endings that can't be taken for a consequence of another's.
KNOWABLE = frozenset({EndKind.SIGNALED, EndKind.EXITED, EndKind.OUT_OF_MEMORY, EndKind.RAISED})


class FakeNode:
    """One node. `alive` is the truth; Ray knows of a death only when it has said so."""

    __slots__ = ("alive", "corpses", "doomed", "draining", "free", "frozen", "host", "known_dead", "name")

    def __init__(self, name: str, host: str, free: list[int]) -> None:
        self.name = name
        self.host = host
        self.free = free
        self.alive = True
        self.known_dead = False
        self.draining = False
        self.frozen = False
        #: Workers that were queued on it after its death and before Ray knew.
        self.doomed: list[FakeWorker] = []
        #: Workers that went with it.
        self.corpses: list[FakeWorker] = []

    @property
    def usable(self) -> bool:
        """Whether Ray can place something new here."""
        return self.alive and not self.draining and not self.frozen


class FakeGroup:
    """One placement group; `nodes[i]` is None while bundle i waits for a place."""

    __slots__ = ("avoid", "id", "nodes", "only", "placed", "queued", "slots")

    def __init__(self, number: int, bundles: int, avoid: tuple[str, ...], only: tuple[str, ...]) -> None:
        self.id = number
        self.avoid = avoid
        self.only = only
        self.nodes: list[str | None] = [None] * bundles
        self.slots: list[list[int]] = [[] for _ in range(bundles)]
        self.placed = False
        self.queued: list[FakeWorker] = []

    def allows(self, node: str) -> bool:
        """Whether the group may sit on a node."""
        return node not in self.avoid and (not self.only or node in self.only)


class FakeGeneration:
    """One formed (or forming) group of processes."""

    __slots__ = ("arrived", "broken", "cause", "deaths", "members", "number", "world_size")

    def __init__(self, number: int, world_size: int) -> None:
        self.number = number
        self.world_size = world_size
        self.members: list[FakeWorker] = []
        self.arrived = 0
        self.broken = False
        #: What really ended it, where that can be known.
        self.cause: Ending | None = None
        #: How many members have died by other hands than the coordinator's.
        self.deaths = 0


class FakeWorker:
    """One worker process; `alive` is the truth.

    States: queued, starting, warming, spare, promoted, joining, running, returned, failed, killed.
    """

    __slots__ = (
        "alive",
        "bundle",
        "cut",
        "frozen",
        "generation",
        "group",
        "held",
        "id",
        "killed",
        "node",
        "pending",
        "slow",
        "state",
        "stubborn",
    )

    def __init__(self, number: int, group: int, bundle: int, slow: float) -> None:
        self.id = number
        self.group = group
        self.bundle = bundle
        self.slow = slow
        self.node = ""
        self.state = "queued"
        self.alive = False
        self.frozen = False
        self.cut = False
        self.killed = False
        self.stubborn = False
        self.generation: FakeGeneration | None = None
        #: What it said while nobody could hear it, and what it would have done while it was frozen.
        self.held: list[tuple[type[Event], tuple[Any, ...]]] = []
        self.pending: list[tuple[Callable[..., None], tuple[Any, ...]]] = []


class FakeClock:
    """Virtual time, and everything that is under way in it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        #: (time, order, event class or None, function, arguments): messages to the coordinator, and what else happens.
        self.queue: list[tuple[float, int, type[Event] | None, Callable[..., None] | None, tuple[Any, ...]]] = []
        #: Until when messages are late, and until when some arrive twice.
        self.slow_until = 0.0
        self.repeat_until = 0.0
        self._order = 0

    def any(self, low: float, high: float) -> float:
        """A duration between the two."""
        return low + (high - low) * self.rng.random()

    def after(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        """Let something happen, later."""
        self._order += 1
        heapq.heappush(self.queue, (self.now + delay, self._order, None, function, args))

    def post(self, delay: float, event: type[Event], *args: Any) -> None:
        """Send the coordinator a message that arrives after `delay`; later, or twice, when the network is bad."""
        if self.now < self.slow_until:
            delay += self.rng.random() * 0.8
        self._order += 1
        heapq.heappush(self.queue, (self.now + delay, self._order, event, None, args))
        if self.now < self.repeat_until and self.rng.random() < 0.3:
            self._order += 1
            again = self.now + delay + self.rng.choice((0.0, 0.01, 1.0, 8.0))
            heapq.heappush(self.queue, (again, self._order, event, None, args))

    def pop(self) -> tuple[float, int, type[Event] | None, Callable[..., None] | None, tuple[Any, ...]]:
        """What comes next."""
        return heapq.heappop(self.queue)
