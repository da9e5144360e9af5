"""What happened: the only thing that goes into the coordinator. Each event is a past fact, and carries its time.

`at` is in seconds on the shell's monotonic clock; the coordinator has no clock of its own. Identities are numbers that
the coordinator itself gave out in a command (`worker`, `group`, `roll`), so that an event about something it never
asked for is a bug, and an event about something that has ended since is merely late.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylaunch.errors import Ending
from raylaunch.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""

    at: float


@dataclass(frozen=True, slots=True)
class HoldRequested(Event):
    """The user entered a launcher: its workers are to be held for runs to come. Always the first event."""

    spec: RunSpec


@dataclass(frozen=True, slots=True)
class RunRequested(Event):
    """The user called `run`: the first event, and the only one of its kind; or any time a launcher is held.

    A launcher's runs have its spec, but for `run_id` and `max_restarts`.
    """

    spec: RunSpec


@dataclass(frozen=True, slots=True)
class BundlesPlaced(Event):
    """Ray has reserved a whole placement group. `nodes[i]` is the node id of its bundle i."""

    group: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BundlesLost(Event):
    """A placement group is gone as a whole: Ray refused it, or somebody removed it."""

    group: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """A worker's process runs, and has said where. From here on its bundle is known to be there."""

    worker: int
    node: str
    host: str
    pid: int
    #: Start time of the process in clock ticks after boot: with the pid it names one process for ever.
    pid_started: int
    versions: dict[str, str]
    #: Indices of the node's GPUs that the worker's bundle holds; one bundle's seats share the list.
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReady(Event):
    """A worker is a warm spare: imports done, store open on `port`. Memory in bytes: the node's, and its own."""

    worker: int
    port: int
    memory_available: int = 0
    memory_used: int = 0


@dataclass(frozen=True, slots=True)
class WorkerAnswered(Event):
    """A spare answered the roll call number `roll`."""

    worker: int
    roll: int


@dataclass(frozen=True, slots=True)
class WorkerJoined(Event):
    """A promoted worker has loaded the function and joined the process group of its generation."""

    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class WorkerReturned(Event):
    """train_fn returned (or left with sys.exit(0)); the value is still with the worker."""

    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class ResultCollected(Event):
    """A returned worker's value is in the driver."""

    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class WorkerFailed(Event):
    """A worker told how it failed. Its process still lives. Generation 0: it held no rank yet."""

    worker: int
    generation: int
    ending: Ending


@dataclass(frozen=True, slots=True)
class WorkerLost(Event):
    """A worker's process is gone, or nobody can reach it (`ending.kind` is UNREACHABLE: it may still live).

    Ray and the node's agent both tell, in any order, and the agent again when the kernel has told it how.
    """

    worker: int
    ending: Ending
    #: Whether our own kill found the process alive. None: Ray says so, which can't tell.
    killed: bool | None = None
    #: False: Ray says so, while the node's agent still sees the process.
    certain: bool = True


@dataclass(frozen=True, slots=True)
class NodeLost(Event):
    """Ray has declared a node dead."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeDraining(Event):
    """Ray has been told that a node will go (preemption, scale-down). It still works."""

    node: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OthersWaiting(Event):
    """Whether a placement group of somebody else is waiting for resources, changed."""

    waiting: bool


@dataclass(frozen=True, slots=True)
class PulseMissed(Event):
    """No pulse of a worker has come for `silent` seconds."""

    worker: int
    silent: float


@dataclass(frozen=True, slots=True)
class StopRequested(Event):
    """Somebody wants the run to end; for the second time: at once."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseRequested(Event):
    """The user left the launcher: nothing is to be held any more. A run that is going on is stopped."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """Time has passed: the answer to a `WakeAt`."""


EVENTS: dict[str, type[Event]] = {
    cls.__name__: cls
    for cls in (
        HoldRequested,
        RunRequested,
        BundlesPlaced,
        BundlesLost,
        WorkerStarted,
        WorkerReady,
        WorkerAnswered,
        WorkerJoined,
        WorkerReturned,
        ResultCollected,
        WorkerFailed,
        WorkerLost,
        NodeLost,
        NodeDraining,
        OthersWaiting,
        PulseMissed,
        StopRequested,
        ReleaseRequested,
        Tick,
    )
}
