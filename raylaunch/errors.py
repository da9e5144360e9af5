"""What can go wrong, as types: the exception tree, and how a worker ended.

    RaylaunchError
    ├── ConfigError          yours: an argument that can't work (also a ValueError)
    │   └── RunInUseError    a run with this id is going on in the cluster
    ├── RunFailedError       a run that ended without success; `.root_cause` says why
    │   └── PlacementTimeout the cluster never had room (also a TimeoutError)
    ├── LauncherClosedError  a launcher was used outside of its with block (also a RuntimeError)
    └── InternalError        ours: the state machine was handed something impossible

`Ending` and `Failure` are values, not exceptions: they cross processes, go into the journal, and are what the
coordinator reasons about. Only the standard library is imported here, because the coordinator imports this file.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import pickle
import re
import signal as _signal
import traceback as _traceback
from dataclasses import dataclass
from typing import Any

#: Longest message and traceback that an `Ending` carries, in characters. Endings pass through the coordinator and
#: the journal; the exception itself goes to the driver on its own way and is not cut.
MESSAGE_LIMIT = 2_000
TRACEBACK_LIMIT = 20_000
#: ... and of a message's first line, where it is part of a sentence.
LINE_LIMIT = 160


class EndKind(str, enum.Enum):
    """The ways in which a worker can end."""

    RETURNED = "returned"  # train_fn returned, or called sys.exit(0)
    RAISED = "raised"  # train_fn raised
    EXITED = "exited"  # the process left with an exit code: sys.exit(3), os._exit(7)
    SIGNALED = "signaled"  # the process was ended by a signal, and we know which
    OUT_OF_MEMORY = "out_of_memory"  # Ray's memory monitor killed it
    KILLED = "killed"  # the process is gone, and nobody could say how
    LEFT = "left"  # train_fn destroyed the process group and went on
    UNREACHABLE = "unreachable"  # Ray lost contact; the process may still live
    NODE_LOST = "node_lost"  # its whole node went
    UNRESPONSIVE = "unresponsive"  # alive for Ray, but silent for longer than `timeouts.unresponsive`
    TIMED_OUT = "timed_out"  # a phase took longer than its timeout
    CANNOT_WORK = "cannot_work"  # no restart can mend it: wrong versions, a function that doesn't load


@dataclass(frozen=True, slots=True)
class Ending:
    """How one worker ended: small, picklable, and the same in the journal, on the console and in the error.

    `collateral` marks what usually only follows another worker's end ("connection closed by peer"); `fatal` what no
    restart can mend, or what the user named in `no_retry`.
    """

    kind: EndKind
    exit_code: int | None = None
    signal: int | None = None
    error_type: str = ""
    message: str = ""
    traceback: str = ""
    collateral: bool = False
    fatal: bool = False
    #: Of the process that ended, where that isn't the worker's own: a command's. 0: it is the worker's.
    pid: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", _cut(_plain(self.message), MESSAGE_LIMIT))
        object.__setattr__(self, "traceback", _cut(_plain(self.traceback), TRACEBACK_LIMIT))

    def describe(self) -> str:
        """One clause for people: `killed by SIGKILL`, `raised ValueError: no such column`."""
        if self.kind is EndKind.SIGNALED:
            text = f"killed by {signal_name(self.signal)}"
        elif self.kind is EndKind.EXITED:
            text = f"exited with code {self.exit_code}"
        elif self.kind is EndKind.RAISED:
            # gloo's and NCCL's messages begin with their source file in brackets
            first_line = re.sub(r"^\[[^\]]*\]\s*", "", self.message.strip().split("\n", 1)[0])
            if self.collateral:  # ... and go on with general advice
                first_line = first_line.split(". ", 1)[0]
            what = f"{self.error_type}: {first_line[:LINE_LIMIT]}" if first_line else self.error_type
            return f"lost a peer ({what})" if self.collateral else f"raised {what}"
        elif self.kind is EndKind.CANNOT_WORK:
            return self.message
        elif self.kind is EndKind.KILLED and self.message.strip():
            text = "died"
        else:
            text = _PLAIN[self.kind]
        return f"{text} ({self.message.strip().splitlines()[0]})" if self.message.strip() else text


_PLAIN = {
    EndKind.RETURNED: "returned",
    EndKind.OUT_OF_MEMORY: "killed: the node ran out of memory",
    EndKind.KILLED: "died (it is not known how)",
    EndKind.LEFT: "destroyed its process group and went on in train_fn",
    EndKind.UNREACHABLE: "unreachable: Ray lost contact with it",
    EndKind.NODE_LOST: "lost with its node",
    EndKind.UNRESPONSIVE: "unresponsive",
    EndKind.TIMED_OUT: "timed out",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One worker's failure, with where it happened. `rank` is None for a worker that held none (yet)."""

    ending: Ending
    rank: int | None = None
    local_rank: int | None = None
    node: str = ""  # Ray node id, hexadecimal
    host: str = ""  # the node's address
    pid: int = 0
    generation: int = 0
    phase: str = ""  # what the run was doing: "forming", "running", ...
    at: float = 0.0  # when it was noticed, in seconds of the driver's monotonic clock

    def describe(self) -> str:
        """One sentence for people: `rank 2 (node 3f2a, pid 71) killed by SIGKILL while running`."""
        if self.ending.kind is EndKind.NODE_LOST:
            return f"node {short_id(self.node)} lost{' (' + self.ending.message + ')' if self.ending.message else ''}"
        who = "a worker without a rank" if self.rank is None else f"rank {self.rank}"
        if self.ending.kind is EndKind.CANNOT_WORK:
            who += ":"
        place = [f"node {short_id(self.node)}"] if self.node else []
        place += [f"pid {self.pid}"] if self.pid else []
        where = f" ({', '.join(place)})" if place else ""
        return f"{who}{where} {self.ending.describe()}{' while ' + self.phase if self.phase else ''}"


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by Python code


class RaylaunchError(Exception):
    """The base of everything that raylaunch raises on purpose."""


class ConfigError(RaylaunchError, ValueError):
    """An argument that can't work. The message names the argument, its value and what is allowed."""


class RunInUseError(ConfigError):
    """A run with this id is going on in the cluster."""


class LauncherClosedError(RaylaunchError, RuntimeError):
    """A launcher was asked for a run before its with block was entered, or after it was left."""


class InternalError(RaylaunchError):
    """The coordinator was handed an event that can't happen in its state. Its state is unchanged. Please report it."""


class RunFailedError(RaylaunchError):
    """A run ended without success.

    When the root cause is an `Exception` that train_fn raised, the error is also an instance of that exception's
    type, so that `except torch.OutOfMemoryError` works, and the original is its `__cause__`. It always pickles.

    Attributes:
        message: what happened, where, why, and what to do.
        root_cause: the failure that started it, or None (nobody failed: no room in the cluster, for example).
        failures: every failure of the last generation, by rank.
        run_id: the run.
        journal: path of the run's journal, or "".
    """

    message: str
    root_cause: Failure | None
    failures: dict[int, Failure]
    run_id: str
    journal: str

    # Own __new__, __init__, __str__ and __reduce__, never cooperative ones: the dynamic subclass below has a second
    # base whose constructor may want required arguments (UnicodeDecodeError, CalledProcessError).
    def __new__(cls, *_args: Any, **_kwargs: Any) -> RunFailedError:  # noqa: PYI034, D102 - one type for all of them
        # The nearest type that is written in C: OSError, for one, insists on its own __new__.
        built_in: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
        made: RunFailedError = built_in.__new__(cls)
        return made

    def __init__(
        self,
        message: str,
        root_cause: Failure | None = None,
        failures: dict[int, Failure] | None = None,
        run_id: str = "",
        journal: str = "",
    ) -> None:
        Exception.__init__(self, message)
        self.message = message
        self.root_cause = root_cause
        self.failures = dict(failures or {})
        self.run_id = run_id
        self.journal = journal

    def __str__(self) -> str:
        lines = [self.message]
        if self.root_cause is not None and self.root_cause.ending.traceback:
            rank = self.root_cause.rank
            who = "a worker without a rank" if rank is None else f"rank {rank}"
            lines += ["", f"Remote traceback of {who}:", self.root_cause.ending.traceback.rstrip()]
            # Once more, where it is read: Ray's job server (2.60) keeps ten lines of a failed job's log as its message.
            lines += ["", f"root cause: {self.root_cause.describe()}"]
        if self.journal:
            lines += ["", f"journal: {self.journal}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.message, self.root_cause, self.failures, self.run_id, self.journal)
        return _rebuild, (_plain_type(type(self)), arguments, _pickled(self.__cause__))


class PlacementTimeout(RunFailedError, TimeoutError):  # noqa: N818 - the field's word
    """The cluster did not have the wanted resources in `timeouts.placement` seconds. Names wanted and available."""


def run_failed(error: RunFailedError, cause: BaseException | None) -> RunFailedError:
    """`error` with `cause` as its `__cause__`, made an instance of the cause's type too where that is possible.

    Only `Exception` subclasses, and not those that Python or a runner treats as control flow: a SystemExit would end
    the program silently, a StopIteration would end somebody's loop.
    """
    if cause is None:
        return error
    control_flow: tuple[type[BaseException], ...] = (StopIteration, StopAsyncIteration)
    group = getattr(builtins, "ExceptionGroup", None)  # Python 3.11
    if group is not None:
        control_flow += (group,)
    if type(error) is RunFailedError and isinstance(cause, Exception) and not isinstance(cause, control_flow):
        with contextlib.suppress(Exception):  # a type that refuses to be a base: the plain error says everything too
            both = type(type(cause).__name__, (RunFailedError, type(cause)), {"__module__": RunFailedError.__module__})
            error = both(error.message, error.root_cause, error.failures, error.run_id, error.journal)
    error.__cause__ = cause
    return error


def _plain_type(cls: type[RunFailedError]) -> type[RunFailedError]:
    """The importable class behind a dynamic one."""
    return next(base for base in cls.__mro__ if base in (PlacementTimeout, RunFailedError))


def _pickled(cause: BaseException | None) -> bytes | None:
    if cause is None:
        return None
    try:
        data = pickle.dumps(cause)
        pickle.loads(data)  # noqa: S301 - our own bytes: some exceptions pickle and then don't load
    except Exception:
        return None
    return data


def _rebuild(cls: type[RunFailedError], arguments: tuple[Any, ...], cause: bytes | None) -> RunFailedError:
    try:
        original = pickle.loads(cause) if cause is not None else None  # noqa: S301 - made by _pickled
    except Exception:  # the cause's class isn't importable here
        original = None
    return run_failed(cls(*arguments), original)


def ending_of(error: BaseException, *, collateral: bool = False, fatal: bool = False, skip_frames: int = 0) -> Ending:
    """The `Ending` of a worker whose train_fn left with `error`. `sys.exit(0)` and `sys.exit()` count as returning."""
    trace = error.__traceback__
    for _ in range(skip_frames):
        trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
    try:
        text = "".join(_traceback.format_exception(type(error), error, trace))
    except Exception as broken:  # a __str__ or __repr__ of the user's that raises
        text = f"(the traceback can't be shown: {type(broken).__name__})"
    try:
        message = str(error)
    except Exception as broken:
        message = f"(its message can't be shown: {type(broken).__name__})"
    if isinstance(error, SystemExit):
        code = error.code
        if code is None or code == 0:
            return Ending(EndKind.RETURNED)
        number = code if isinstance(code, int) else 1  # Python's own rule: sys.exit("text") prints it and leaves with 1
        note = "" if isinstance(code, int) else message
        return Ending(EndKind.EXITED, exit_code=number, message=note, traceback=text, collateral=collateral)
    name = type(error).__qualname__
    module = type(error).__module__
    error_type = name if module in ("builtins", "__main__") else f"{module}.{name}"
    return Ending(
        EndKind.RAISED, error_type=error_type, message=message, traceback=text, collateral=collateral, fatal=fatal
    )


def signal_name(number: int | None) -> str:
    """`SIGKILL` for 9; `signal 99` for one without a name."""
    try:
        return _signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def short_id(node: str) -> str:
    """The first characters of a node id: enough to tell nodes apart on a console."""
    return node[:8]


def _plain(text: str) -> str:
    """`text` without what can't be written to a log, such as lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cut(text: str, limit: int) -> str:
    """`text` with its middle taken out where it is too long: the first and the last lines say the most."""
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


__all__ = [
    "ConfigError",
    "EndKind",
    "Ending",
    "Failure",
    "InternalError",
    "LauncherClosedError",
    "PlacementTimeout",
    "RaylaunchError",
    "RunFailedError",
    "RunInUseError",
]
