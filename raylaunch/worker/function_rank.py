"""A rank that is a function, in a process of its own (`isolation="process"`): a fork of the node's forker.

`FunctionCall` says what to call and how to join; the fork calls `run_call`; how that went is left in a file for the
node's agent (`Outcome`). No Ray in here: what cloudpickle pickled is loaded by Ray's copy of it, without Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import sys
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylaunch.context import RETURNED, ask_agent
from raylaunch.coordinator.commands import Assignment
from raylaunch.errors import Ending, EndKind, ending_of
from raylaunch.worker import process_group
from raylaunch.worker.payload import NoRetry, PayloadError, load, run_function

_CLOUDPICKLE = "ray.cloudpickle.cloudpickle"


@dataclass(frozen=True)
class FunctionCall:
    """What a rank needs besides the pickled function. Goes over as JSON."""

    worker: int
    assignment: Assignment
    code_path: tuple[str, ...]
    backend: str | None
    use_gpu: bool
    virtual_local_rank: bool
    process_group_seconds: float
    #: The file for its `Outcome`.
    outcome: str

    def to_json(self) -> str:
        """It as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> FunctionCall:
        """It, from JSON."""
        parts = json.loads(text)
        rank = parts["assignment"]
        devices, own = tuple(rank["devices"]), tuple(rank["own_devices"])
        assignment = Assignment(**{**rank, "devices": devices, "own_devices": own, "predecessors": ()})
        return cls(**{**parts, "assignment": assignment, "code_path": tuple(parts["code_path"])})


@dataclass(frozen=True)
class Outcome:
    """How a function ended, as its own process saw it."""

    #: None: the process ended before the function did.
    ending: Ending | None = None
    #: The pickled exception, and the pickled value.
    exception: bytes | None = None
    value: bytes | None = None

    def write(self, path: str) -> None:
        """Leave it there."""
        ending = None if self.ending is None else {**asdict(self.ending), "kind": self.ending.kind.value}
        Path(f"{path}.new").write_bytes(pickle.dumps((ending, self.exception, self.value)))
        os.replace(f"{path}.new", path)

    @classmethod
    def read(cls, path: str) -> Outcome:
        """What was left there."""
        try:
            ending, exception, value = pickle.loads(Path(path).read_bytes())  # noqa: S301 - plain types, by `write`
        except FileNotFoundError:
            return cls()
        return cls(Ending(**{**ending, "kind": EndKind(ending["kind"])}), exception, value)

    def ending_of(self, process: Ending) -> Ending:
        """How the worker ended, when its process ended like this."""
        if self.ending is None:
            if process.kind is not EndKind.RETURNED:
                return process
            message = "its process left before train_fn had returned"
            return Ending(EndKind.EXITED, exit_code=0, message=message, pid=process.pid)
        if self.ending.kind is EndKind.RETURNED:  # ... and its exit handlers may have failed
            return process
        return Ending(**{**asdict(self.ending), "pid": process.pid})


class Value:
    """A pickled value on its way: it becomes the value where it arrives, and is not loaded before."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._pickled,)


def run_call(payload: str, text: str) -> None:
    """Be the rank: join, call the function, leave word of how it ended, and end the process accordingly."""
    call = FunctionCall.parse(text)
    sys.path += [path for path in call.code_path if path not in sys.path and os.path.isdir(path)]
    rank = os.getpid()
    outcome = _outcome(call, payload)
    assert outcome.ending is not None
    ending = outcome.ending
    is_rank = os.getpid() == rank  # or a fork that train_fn made and that left it too: that is nobody's outcome
    if is_rank:
        outcome.write(call.outcome)
    if ending.kind is not EndKind.RETURNED:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # train_fn has closed it, or put something there
            sys.stderr.write(ending.traceback or f"{ending.message}\n")
        sys.exit(1 if ending.exit_code is None else ending.exit_code)
    if is_rank:
        # Peers that still need it fail when it leaves: not before it is known that it has returned, which is the cause.
        ask_agent(os.path.dirname(call.outcome), f"{RETURNED} {call.worker}", None)
        process_group.leave()


def _outcome(call: FunctionCall, payload: str) -> Outcome:
    pickler = cloudpickle()
    try:
        function, no_retry = _joined(call, payload)
    except PayloadError as error:
        return Outcome(Ending(EndKind.CANNOT_WORK, message=str(error), traceback=_trace(error), fatal=True))
    except BaseException as error:
        return Outcome(ending_of(error, collateral=process_group.is_collateral(error)))
    ending, value, exception = run_function(function, no_retry=no_retry, dumps=pickler.dumps)
    if ending.kind is not EndKind.RETURNED:
        return Outcome(ending, exception)
    try:
        return Outcome(ending, value=pickler.dumps(value))
    except Exception as error:  # picklers raise anything
        message = f"its return value can't be sent to the driver: {error!r}"
        return Outcome(Ending(EndKind.CANNOT_WORK, message=message, traceback=_trace(error), fatal=True))


def _joined(call: FunctionCall, payload: str) -> tuple[Any, NoRetry]:
    function, no_retry = load(Path(payload).read_bytes(), lambda data: _Unpickler(io.BytesIO(data)).load())
    process_group.join(
        call.assignment,
        backend=call.backend,
        use_gpu=call.use_gpu,
        virtual_local_rank=call.virtual_local_rank,
        timeout=call.process_group_seconds,
    )
    return function, no_retry


class _Unpickler(pickle.Unpickler):
    """It finds cloudpickle without importing the package around it, as pickle itself would (Python 3.10 to 3.13)."""

    def find_class(self, module: str, name: str) -> Any:
        return getattr(cloudpickle(), name) if module == _CLOUDPICKLE else super().find_class(module, name)


def cloudpickle() -> types.ModuleType:
    """Ray's copy of cloudpickle, under its own name, which stands in what it pickles, and without the rest of Ray.

    Importing Ray (2.60) takes 0.3 s of a core. It is one file that needs only the standard library, and is what a later
    `import ray` finds and uses.
    """
    if _CLOUDPICKLE not in sys.modules:
        ray = importlib.util.find_spec("ray")
        assert ray is not None, "raylaunch needs it"
        assert ray.submodule_search_locations is not None
        path = os.path.join(ray.submodule_search_locations[0], "cloudpickle", "cloudpickle.py")
        spec = importlib.util.spec_from_file_location(_CLOUDPICKLE, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[_CLOUDPICKLE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_CLOUDPICKLE]


def _trace(error: BaseException) -> str:
    return ending_of(error).traceback
