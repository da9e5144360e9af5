"""What the user asked for, validated once: `RunSpec`, `Bounds`, `Timeouts`.

`make_spec` is the only way in: it refuses what can't work with a `ConfigError` that names the argument, its value and
what is allowed, before anything is started. What it returns is frozen, plain (the journal writes it as JSON), and is
all that the coordinator knows of a run. Only the standard library is imported here.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ParamSpec, TypeVar

from raylaunch.errors import ConfigError

#: Three years, in seconds: more than any wait makes sense, less than the operating system's timers can't hold.
LONGEST_TIMEOUT = 1e8
#: The most workers that a run may need to start: more than any cluster has, less than nobody could count.
LARGEST_MINIMUM = 100_000
PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")

P = ParamSpec("P")
R = TypeVar("R")


def spelling_checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, answering a misspelt argument with a ConfigError that names the nearest valid one."""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in signature.parameters:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
                raise ConfigError(f"{name}: no such argument; {hint}")
        return function(*args, **kwargs)

    return checked


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase of a run may take, in seconds. Only running itself has no limit.

    The figures are choices, not measurements, except where a source is given.
    """

    #: Waiting until the cluster has room for the minimum; 0 fails at once when it has none.
    placement: float = 600.0
    #: From a worker's bundle being there until the worker is ready: process start and imports. On promotion, also
    #: loading the function.
    start: float = 300.0
    #: Joining the process group, once promoted.
    process_group: float = 300.0
    #: How long to wait for more seats once the minimum is there (torchrun: 30).
    last_call: float = 1.0
    #: From asking workers to stop until they are killed (torchrun: 30; `ray job stop` leaves the driver 3).
    stop: float = 10.0
    #: A worker without contact to its coordinator for this long ends itself. Longer than a coordinator's restart (1.7).
    lease: float = 30.0
    #: A worker that sends no pulse for this long has failed.
    unresponsive: float = 300.0
    #: A generation younger than this is not ended in order to grow.
    min_generation_age: float = 10.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LONGEST_TIMEOUT:
                raise ConfigError(f"timeouts.{item.name}={value!r}: must be a finite number of seconds, at most 1e8")
            may_be_zero = item.name in ("placement", "last_call", "stop", "min_generation_age")
            if value < 0 or (value == 0 and not may_be_zero):
                raise ConfigError(f"timeouts.{item.name}={value!r}: must be {'at least' if may_be_zero else 'above'} 0")
            object.__setattr__(self, item.name, float(value))


Timeouts.__init__ = spelling_checked(Timeouts.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Bounds:
    """`min_workers <= world_size <= max_workers`, in multiples of `unit` (workers_per_node, or 1)."""

    min_workers: int
    max_workers: int
    unit: int = 1

    @property
    def min_units(self) -> int:
        """The minimum, in bundles."""
        return self.min_workers // self.unit

    @property
    def max_units(self) -> int:
        """The maximum, in bundles."""
        return self.max_workers // self.unit


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run, as asked for and validated. Plain data: it goes into the journal and to the coordinator."""

    run_id: str
    bounds: Bounds
    #: What one worker reserves, Ray's resource names to amounts.
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    placement_strategy: str = "PACK"
    label_selector: dict[str, str] | None = None
    #: The process group's backend; None when train_fn initialises it itself.
    backend: str | None = "gloo"
    #: How many failures the run may survive; -1: any number.
    max_restarts: int = 3
    grow: bool = True
    #: Warm spares per node; -1: "auto", one per seat while they fit into a quarter of the node's free memory.
    spares: int = -1
    timeouts: Timeouts = field(default_factory=Timeouts)
    virtual_local_rank: bool = False
    #: What the driver runs: every node must run the same. Name to version.
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that one worker reserves; 0 on CPUs."""
        return self.resources_per_worker.get("GPU", 0.0)

    @property
    def bundle_resources(self) -> dict[str, float]:
        """What one bundle reserves: one growth unit."""
        return {name: amount * self.bounds.unit for name, amount in self.resources_per_worker.items()}


def make_spec(
    *,
    num_workers: int | tuple[int, int] = 1,
    use_gpu: bool = False,
    workers_per_node: int | None = None,
    resources_per_worker: Mapping[str, float] | None = None,
    placement_strategy: str = "PACK",
    label_selector: Mapping[str, str] | None = None,
    backend: str | None = "auto",
    max_restarts: int = 3,
    grow: bool = True,
    spares: int | str = "auto",
    timeouts: Timeouts | None = None,
    run_id: str | None = None,
    name: str | None = None,
    virtual_local_rank: bool = False,
    versions: Mapping[str, str] | None = None,
) -> RunSpec:
    """The validated `RunSpec`. The arguments are those of `raylaunch.run`; a launcher has a `name`, not a `run_id`.

    Raises `ConfigError`.
    """
    for switch, value in (("use_gpu", use_gpu), ("grow", grow), ("virtual_local_rank", virtual_local_rank)):
        if not isinstance(value, bool):
            raise ConfigError(f"{switch}={value!r}: must be True or False")
    resources = _resources(resources_per_worker, use_gpu)
    chosen = _backend(backend, use_gpu)
    _check_gpus(resources.get("GPU", 0.0), chosen, virtual_local_rank)
    if placement_strategy not in PLACEMENT_STRATEGIES:
        raise ConfigError(
            f"placement_strategy={placement_strategy!r}: must be one of {', '.join(PLACEMENT_STRATEGIES)}"
        )
    if timeouts is not None and not isinstance(timeouts, Timeouts):
        raise ConfigError(f"timeouts={timeouts!r}: must be a raylaunch.Timeouts")
    if workers_per_node is not None and placement_strategy == "STRICT_PACK":
        raise ConfigError(
            f"placement_strategy={placement_strategy!r}: workers_per_node={workers_per_node!r} spreads the workers over"
            " different nodes"
        )
    bounds = _bounds(num_workers, workers_per_node)
    shared = resources.get("GPU", 0.0) * bounds.unit
    if resources.get("GPU", 0.0) < 1 and shared > 1 and not shared.is_integer():
        raise ConfigError(
            f"resources_per_worker['GPU']={resources['GPU']:g}: workers_per_node={workers_per_node} of them are"
            f" {shared:g} GPUs: must be a whole number, or at most one"
        )
    return RunSpec(
        run_id=_run_id(run_id, "run_id") if name is None else _run_id(name, "name"),
        bounds=bounds,
        resources_per_worker=resources,
        placement_strategy="STRICT_SPREAD" if workers_per_node is not None else placement_strategy,
        label_selector=_labels(label_selector),
        backend=chosen,
        max_restarts=budget(max_restarts),
        grow=grow,
        spares=_spares(spares),
        timeouts=timeouts or Timeouts(),
        virtual_local_rank=virtual_local_rank,
        versions=dict(versions or {}),
    )


def budget(max_restarts: Any) -> int:
    """The validated `max_restarts` of a run. Raises `ConfigError`."""
    if not _is_int(max_restarts) or max_restarts < -1:
        raise ConfigError(f"max_restarts={max_restarts!r}: must be a whole number, at least 0, or -1 for no limit")
    return int(max_restarts)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _bounds(num_workers: Any, workers_per_node: Any) -> Bounds:
    shown = f"num_workers={num_workers!r}"
    pair = num_workers if isinstance(num_workers, (tuple, list)) else (num_workers, num_workers)
    if len(pair) != 2 or not all(_is_int(number) for number in pair):
        raise ConfigError(f"{shown}: must be a whole number, or a pair of them (minimum, maximum)")
    low, high = int(pair[0]), int(pair[1])
    if low < 1:
        raise ConfigError(f"{shown}: must be at least 1")
    if low > LARGEST_MINIMUM:
        raise ConfigError(f"{shown}: the minimum must be at most {LARGEST_MINIMUM}")
    if low > high:
        raise ConfigError(f"{shown}: the minimum is above the maximum; did you mean ({high}, {low})?")
    unit = 1 if workers_per_node is None else workers_per_node
    if not _is_int(unit) or unit < 1:
        raise ConfigError(f"workers_per_node={workers_per_node!r}: must be a whole number, at least 1, or None")
    if low % unit or high % unit:
        raise ConfigError(f"{shown}: must be in multiples of workers_per_node={workers_per_node}")
    return Bounds(low, high, int(unit))


def _resources(given: Any, use_gpu: bool) -> dict[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"resources_per_worker={given!r}: must map resource names to amounts, as {{'CPU': 4}}")
    amounts = dict(given or {})
    for name, amount in amounts.items():
        shown = f"resources_per_worker[{name!r}]={amount!r}"
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{shown}: a resource's name must be a string, and not empty")
        if isinstance(amount, bool) or not isinstance(amount, numbers.Real) or not math.isfinite(amount) or amount < 0:
            raise ConfigError(f"{shown}: must be a number, at least 0")
    if "GPU" in amounts and amounts["GPU"] and not use_gpu:
        raise ConfigError(f"resources_per_worker={given!r} asks for GPUs: say use_gpu=True too")
    amounts.setdefault("CPU", 1)
    if use_gpu:
        amounts.setdefault("GPU", 1)
        if not amounts["GPU"]:
            raise ConfigError(f"resources_per_worker={given!r} asks for no GPU, but use_gpu=True")
    resources = {name: float(amount) for name, amount in amounts.items() if amount}
    if not resources:
        raise ConfigError(f"resources_per_worker={given!r}: a worker must reserve something")
    return resources


def _backend(backend: Any, use_gpu: bool) -> str | None:
    if backend is None:
        return None
    if backend == "auto":
        return "nccl" if use_gpu else "gloo"
    parts = [part.rpartition(":")[2] for part in backend.split(",")] if isinstance(backend, str) else [""]
    if not all(part in BACKENDS for part in parts):
        allowed = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ConfigError(
            f"backend={backend!r}: must be one of {allowed}, a list such as 'cpu:gloo,cuda:nccl', or None"
        )
    if "nccl" in parts and not use_gpu:
        raise ConfigError(f"backend={backend!r}: nccl needs use_gpu=True; on CPUs use 'gloo'")
    return str(backend)


def _check_gpus(gpus: float, backend: str | None, virtual_local_rank: bool) -> None:
    shown = f"resources_per_worker['GPU']={gpus:g}"
    if gpus > 1 and (not virtual_local_rank or not gpus.is_integer()):
        raise ConfigError(f"{shown}: one worker drives one GPU; several (a whole number) need virtual_local_rank=True")
    if 0 < gpus < 1 and backend not in (None, "gloo"):
        raise ConfigError(f"{shown}: workers that share a GPU need backend='gloo' (nccl refuses a GPU given twice)")


def _labels(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in given.items()):
        raise ConfigError(f"label_selector={given!r}: must map label names to values, all strings")
    return dict(given) or None


def _spares(spares: Any) -> int:
    if spares == "auto":
        return -1
    if not _is_int(spares) or spares < 0:
        raise ConfigError(f"spares={spares!r}: must be a whole number per node, at least 0, or 'auto'")
    return int(spares)


def _run_id(run_id: Any, argument: str) -> str:
    if run_id is None:
        return os.urandom(5).hex()
    if not isinstance(run_id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id):
        raise ConfigError(f"{argument}={run_id!r}: must be 1 to 64 letters, digits, '.', '_' or '-', the first no sign")
    return run_id
