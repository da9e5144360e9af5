"""What `setup` is told: a mapping, or any object, with these fields and no others. Checked before anything is done."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from raylaunch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Config:
    """The fields. Those with a default may be left out, or be None.

    Attributes:
        submit: whether Slurm has started this process; otherwise a launcher has, or nobody.
        world_size: how many ranks; None: as many as the launcher or Slurm says.
        cpu: whether the ranks compute on the CPU, rather than each on the GPU of its local rank.
        distributed_backend: "gloo", "nccl", or what else torch knows.
        init_method: "tcp": over the network; "file": through a file that all ranks see.
        shared_file_dir: the folder of that file; needed with "file".
        array_job_num: is part of its name, so that the jobs of an array don't meet.
        timeout: of the group's collectives, in minutes.
    """

    submit: bool
    world_size: int | None
    cpu: bool
    distributed_backend: str
    init_method: str = "tcp"
    shared_file_dir: str | os.PathLike[str] | None = None
    array_job_num: int | str = 0
    timeout: float = 30.0


_NAMES = tuple(field.name for field in fields(Config))
_REQUIRED = tuple(field.name for field in fields(Config) if field.default is MISSING)

#: What each field must be, and how that is said.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "submit": (lambda value: isinstance(value, bool), "True or False"),
    "world_size": (
        lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
        "a number of ranks, at least 1, or None",
    ),
    "cpu": (lambda value: isinstance(value, bool), "True or False"),
    "distributed_backend": (lambda value: isinstance(value, str) and value != "", "a backend's name, as 'gloo'"),
    "init_method": (lambda value: value in ("tcp", "file"), "'tcp' or 'file'"),
    "shared_file_dir": (lambda value: value is None or isinstance(value, (str, os.PathLike)), "a folder's path"),
    "array_job_num": (lambda value: isinstance(value, (int, str)), "a number"),
    "timeout": (
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf,
        "a number of minutes above 0",
    ),
}


def read(config: Any) -> Config:
    """The fields of a mapping, or of an object.

    Raises:
        ConfigError: a field is missing, unknown, or can't be what it is.
    """
    given = _given(config)
    for name in given:
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(_NAMES)}"
            raise ConfigError(f"config field {name!r}: there is no such field; {hint}")
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise ConfigError(f"config: the field{'s' if len(missing) > 1 else ''} {', '.join(missing)} must be there")
    chosen = Config(**{name: value for name, value in given.items() if value is not None or name in _REQUIRED})
    for name, (holds, what) in _CHECKS.items():
        if not holds(getattr(chosen, name)):
            raise ConfigError(f"config field {name}={getattr(chosen, name)!r}: must be {what}")
    if chosen.init_method == "file" and chosen.shared_file_dir is None:
        raise ConfigError("config field init_method='file': needs shared_file_dir, a folder that all ranks see")
    if chosen.cpu and chosen.distributed_backend == "nccl":
        raise ConfigError("config fields cpu=True and distributed_backend='nccl': NCCL needs GPUs; use 'gloo'")
    return chosen


def _given(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    own = {name for name in getattr(config, "__dict__", {}) if not name.startswith("_")}
    inherited = {name for name in _NAMES if hasattr(config, name)}
    return {name: getattr(config, name) for name in own | inherited}
