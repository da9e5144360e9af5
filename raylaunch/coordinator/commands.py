"""What to do: the only thing that comes out of the coordinator. The shell carries each one out, and never decides.

Every command is small and plain. Whatever comes of it reaches the coordinator as an event.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from raylaunch.errors import Failure


@dataclass(frozen=True, slots=True)
class Command:
    """The base of all commands."""


@dataclass(frozen=True, slots=True)
class RequestBundles(Command):
    """Ask Ray for a placement group of `bundles` bundles. Answers: `BundlesPlaced` or `BundlesLost`.

    `minimum`: this is the group that holds the minimum, all or nothing; otherwise it is one unit of growth, to be kept
    off `avoid_nodes` (with workers_per_node, nodes that the run occupies) and, if any are named, on `only_nodes`.
    """

    group: int
    bundles: int
    minimum: bool
    avoid_nodes: tuple[str, ...] = ()
    only_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseBundles(Command):
    """Give placement groups back, placed or pending. Every worker in them has been killed by an earlier command."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Process:
    """One operating-system process for ever: a pid alone may be used again."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class StartWorker(Command):
    """Start a worker in a bundle, as a spare. Answers: `WorkerStarted`, `WorkerReady`; or it fails or is lost.

    `gently`: training is going on, import at low priority.
    """

    worker: int
    group: int
    bundle: int
    gently: bool = False


@dataclass(frozen=True, slots=True)
class CallRoll(Command):
    """Ask spares whether they are there. Answers: `WorkerAnswered`."""

    roll: int
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything that makes a spare a rank."""

    generation: int
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    num_nodes: int
    master_addr: str
    master_port: int
    restart_count: int
    #: GPU indices of this node's workers in the order of their local ranks; one entry per GPU.
    devices: tuple[str, ...] = ()
    #: Positions in `devices` that belong to this rank.
    own_devices: tuple[int, ...] = ()
    #: Processes that sat in this seat before and are not known to be gone: to be gone before this one allocates.
    predecessors: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True)
class Promote(Command):
    """Make a spare a rank of the new generation. Answers: `WorkerJoined`, then `WorkerReturned`; or a failure."""

    worker: int
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class CollectResult(Command):
    """Fetch a returned worker's value to the driver. Answer: `ResultCollected`; or a failure."""

    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class StopWorkers(Command):
    """Ask running workers to end: SIGTERM. Whatever they do then arrives as usual."""

    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KillWorkers(Command):
    """End workers at once, without waiting. Answer: `WorkerLost`, when each is known to be gone.

    `ask`: one of them may know why the others fail; each gets a moment to say so.
    """

    workers: tuple[int, ...]
    ask: bool = False


@dataclass(frozen=True, slots=True)
class WakeAt(Command):
    """Send a `Tick` at this time. A later `WakeAt` replaces an earlier one."""

    at: float


class Level(str, enum.Enum):
    """How much a user should care."""

    INFO = "info"  # the usual course
    WARNING = "warning"  # a failure, a recovery, a long wait


@dataclass(frozen=True, slots=True)
class Tell(Command):
    """A sentence for the user. `shortage`: the shell adds what the cluster has and what it lacks."""

    text: str
    level: Level = Level.INFO
    shortage: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """One re-formation that a failure made necessary."""

    generation: int  # the first generation after it
    cause: str
    #: From the first event of the failure until every rank of the new generation had joined.
    seconds: float
    world_size: int


class Outcome(str, enum.Enum):
    """How a run ends."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    NO_ROOM = "no_room"  # the cluster never had (again) what the minimum needs
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Finish(Command):
    """The run is over; by now its ranks have been killed by earlier commands.

    So has everything else, and every group been released, unless a launcher holds them for its next run.
    """

    outcome: Outcome
    reason: str
    root_cause: Failure | None = None
    #: Every failure that came with the root cause.
    failures: tuple[Failure, ...] = ()
    #: The worker whose failure is the root cause, so that the shell can find the exception itself; 0: none.
    culprit: int = 0
    #: Workers of the last generation by rank.
    workers: tuple[int, ...] = ()
    world_size: int = 0
    generation: int = 0
    restarts: int = 0
    recoveries: tuple[Recovery, ...] = ()
