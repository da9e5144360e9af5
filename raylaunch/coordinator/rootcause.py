"""Why a generation ended: what failed within one window is one incident, and one of the failures is its root cause.

When a process dies, its peers fail too, some before the launcher hears of the death. So failures are ranked by kind
(an exit by signal, a user's exception and a lost node come before "connection closed by peer"), then by arrival.
Nothing waits for this: the next generation forms while the cause is being settled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raylaunch.errors import Ending, EndKind, Failure

#: After a failure that is a cause by itself, this much longer for a stronger one, in seconds: Ray's own word on an
#: out-of-memory kill comes 10 to 30 ms after the death.
WINDOW = 0.3
#: While all that is known may be a consequence: Ray is silent for 1.3 to 1.9 s after a node is lost (Ray 2.60).
LONGEST_WINDOW = 3.0

_STRENGTH = {
    EndKind.CANNOT_WORK: 0,
    EndKind.NODE_LOST: 1,
    EndKind.OUT_OF_MEMORY: 1,
    EndKind.SIGNALED: 2,
    EndKind.RAISED: 2,
    EndKind.EXITED: 2,
    EndKind.UNRESPONSIVE: 2,
    EndKind.UNREACHABLE: 3,
    EndKind.KILLED: 4,
    EndKind.LEFT: 4,
    EndKind.TIMED_OUT: 5,
    EndKind.RETURNED: 6,
}
_COLLATERAL = 5
#: At this strength or below, a failure is a cause by itself.
_CAUSE = 2


def strength(ending: Ending) -> int:
    """How likely an ending is a cause rather than a consequence: lower is likelier."""
    return _COLLATERAL if ending.collateral else _STRENGTH[ending.kind]


@dataclass(slots=True)
class Incident:
    """The failures that belong together: from the first one until the cause is settled."""

    opened_at: float
    generation: int  # the generation that it ended; 0: none was there yet
    charged: bool
    settle_at: float
    #: By worker, in the order of arrival.
    failures: dict[int, Failure] = field(default_factory=dict)
    #: The workers of the generations that ended, as the failures they are if their node is lost.
    members: dict[int, Failure] = field(default_factory=dict)
    lost_nodes: set[str] = field(default_factory=set)
    #: Ranks that had returned before the first failure.
    returned: tuple[int, ...] = ()
    #: Other ranks that had not joined the group by then.
    not_joined: tuple[int, ...] = ()
    settled: bool = False
    told: str = ""

    def add(self, worker: int, failure: Failure, now: float) -> None:
        """One more failure, or a better account of one that is known."""
        known = self.failures.get(worker)
        if known is not None:
            if strength(failure.ending) >= strength(known.ending):
                return
            failure = replace(known, ending=failure.ending, pid=failure.pid)
        self.failures[worker] = failure
        if strength(failure.ending) <= _STRENGTH[EndKind.UNREACHABLE]:
            self.settle_at = min(self.settle_at, now + WINDOW)

    def lose_node(self, node: str, now: float) -> None:
        """Ray says that the node is dead: every rank that was there failed with it, whatever was heard of it."""
        lost = {worker: failure for worker, failure in self.members.items() if failure.node == node}
        self.failures.update({worker: f for worker, f in lost.items() if worker not in self.failures})
        self.lost_nodes.add(node)
        self.settle_at = min(self.settle_at, now + WINDOW)

    def cause(self) -> tuple[int, Failure]:
        """The root cause as far as it is known: (worker, failure)."""
        order = {worker: number for number, worker in enumerate(self.failures)}
        accounts = {worker: self._account(worker, failure) for worker, failure in self.failures.items()}
        worker = min(accounts, key=lambda w: (strength(accounts[w].ending), order[w]))
        return worker, accounts[worker]

    def describe(self) -> str:
        """The root cause in a sentence."""
        _, failure = self.cause()
        text = failure.describe()
        if failure.ending.kind is EndKind.NODE_LOST:
            ranks = sorted(f.rank for f in self.failures.values() if f.node == failure.node and f.rank is not None)
            if ranks:
                text += f" with {_ranks(ranks)}"
        elif strength(failure.ending) < _COLLATERAL:
            pass
        elif self.not_joined:
            text += f"; {_ranks(self.not_joined)} had not joined by then"
        elif self.returned:
            text += f"; {_ranks(self.returned)} had already returned and left the group"
        return text

    def _account(self, worker: int, failure: Failure) -> Failure:
        """The failure, told as a lost node where its whole node went."""
        if not failure.node or failure.ending.fatal or is_cause(failure.ending):
            return failure
        on_node = {number for number, member in self.members.items() if member.node == failure.node}
        gone = {number for number in on_node if number in self.failures and self._unreachable(self.failures[number])}
        if failure.node in self.lost_nodes or (worker in gone and gone == on_node):
            return replace(failure, ending=Ending(EndKind.NODE_LOST))
        return failure

    @staticmethod
    def _unreachable(failure: Failure) -> bool:
        return failure.ending.kind in (EndKind.UNREACHABLE, EndKind.NODE_LOST)


@dataclass(slots=True, eq=False)
class Recovered:
    """A generation that formed after an incident; its recovery is told in the end, when the cause is settled."""

    incident: Incident
    generation: int
    seconds: float
    world_size: int


def open_incident(now: float, generation: int, *, charged: bool) -> Incident:
    """A new incident; its window is the longest until a failure is known that is a cause by itself."""
    return Incident(opened_at=now, generation=generation, charged=charged, settle_at=now + LONGEST_WINDOW)


def is_cause(ending: Ending) -> bool:
    """Whether an ending explains itself."""
    return strength(ending) <= _CAUSE


def may_be_lost_node(ending: Ending) -> bool:
    """Whether a node may be gone when this is the first that is heard."""
    return ending.collateral or ending.kind in (EndKind.UNREACHABLE, EndKind.NODE_LOST, EndKind.UNRESPONSIVE)


def _ranks(ranks: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
