"""What Ray's exceptions mean: the only place that reads them. Facts are of Ray 2.60.

`ActorUnavailableError` is not death: the process may live. `ActorDiedError` is Ray's word that it is over, but does
not prove that the process is gone. Neither says how a process ended, except where Ray itself killed it.
"""

from __future__ import annotations

import re

import ray.exceptions as rx

from raylaunch.errors import Ending, EndKind, ending_of

# The generic text of any death names "the OOM killer" among common causes: only these words mean it.
_OUT_OF_MEMORY = re.compile(r"NODE_OUT_OF_MEMORY|running low on memory|memory monitor")
_NODE_LOST = re.compile(r"because its node has died|node died|node is dead", re.IGNORECASE)


class SeatLostError(Exception):
    """What an agent's seat raises when nothing is left of its worker."""


class RefusedError(Exception):
    """Ray refuses to start a worker before it has asked anybody: no restart can mend it."""


_GONE = (
    SeatLostError,
    rx.RayActorError,
    rx.WorkerCrashedError,
    rx.TaskCancelledError,
    rx.ObjectLostError,
    rx.ActorPlacementGroupRemoved,
    rx.ActorUnschedulableError,
)
_NO_MODULE = re.compile(r"No module named '?([\w.]+)'?")


def ending_from(error: BaseException) -> Ending:
    """How a worker ended, as far as the exception of a call to it tells."""
    text = _first_lines(error)
    if isinstance(error, RefusedError):
        return Ending(EndKind.CANNOT_WORK, message=text, fatal=True)
    if isinstance(error, rx.ActorUnavailableError):
        return Ending(EndKind.UNREACHABLE)
    if isinstance(error, rx.RuntimeEnvSetupError):
        message = f"the runtime_env can't be set up there: {_last_line(str(error))}"
        return Ending(EndKind.CANNOT_WORK, message=message, traceback=str(error), fatal=True)
    if isinstance(error, rx.OutOfMemoryError) or (isinstance(error, rx.RayActorError) and _OUT_OF_MEMORY.search(text)):
        return Ending(EndKind.OUT_OF_MEMORY, message="Ray's memory monitor ended it")
    if isinstance(error, rx.ActorDiedError) and "creation task" in text:
        return _creation_failed(str(error))
    if isinstance(error, (rx.NodeDiedError, rx.RayActorError)) and _NODE_LOST.search(text):
        return Ending(EndKind.NODE_LOST)
    if is_loss(error):
        return Ending(EndKind.KILLED)
    if isinstance(error, rx.RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        ending = ending_of(cause)
        return Ending(ending.kind, ending.exit_code, None, ending.error_type, ending.message, str(error))
    return ending_of(error)


def is_loss(error: BaseException) -> bool:
    """Whether a call failed because its worker is gone, and not because of what it did."""
    return isinstance(error, _GONE)


def _creation_failed(text: str) -> Ending:
    """The worker could not be made there.

    A missing module stays missing; anything else (a full disk, no more threads) may be gone at the next try.
    """
    missing = _NO_MODULE.search(text)
    if missing is not None:
        name = missing.group(1)
        message = f"the module {name!r} can't be imported there: install it on every node, as on the driver's"
        return Ending(
            EndKind.CANNOT_WORK, error_type="ModuleNotFoundError", message=message, traceback=text, fatal=True
        )
    return Ending(EndKind.KILLED, message=f"it could not be made there: {_last_line(text)}", traceback=text)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown")


def _first_lines(error: BaseException) -> str:
    return str(error)[:2000]
