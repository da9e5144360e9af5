"""`setup` and `cleanup`: this process enters its process group, and leaves it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from raylaunch.distutils.config import Config, read
from raylaunch.distutils.devices import CURRENT_DEVICE_STR, assign_device_for_local_rank
from raylaunch.distutils.environment import os_environ_get_or_throw
from raylaunch.distutils.group import get_world_size, initialized
from raylaunch.distutils.place import from_environment, from_slurm
from raylaunch.errors import ConfigError


def setup(config: Any) -> None:
    """Take this rank's device and enter the process group; return when both is done.

    Where the group is there already, as in a worker of `raylaunch.run`, it is the one: it must have the world size and
    the backend that `config` asks for, and its collectives keep their timeout.

    Args:
        config: a mapping, or an object, with the fields of `raylaunch.distutils.config.Config`: submit, world_size,
            cpu, distributed_backend, and where wanted init_method, shared_file_dir, array_job_num, timeout (in minutes,
            30). It is only read.

    Raises:
        ConfigError: a field is missing, unknown, or can't be what it is, or the group there is another one.
        RuntimeError: nothing says where the other ranks are, there is no GPU, or `submit` outside of Slurm.
        torch.distributed.DistError: the other ranks did not come.
    """
    chosen = read(config)
    if initialized():
        _check_same(chosen)
        assign_device_for_local_rank(chosen.cpu, 0 if chosen.cpu else int(os_environ_get_or_throw("LOCAL_RANK")))
        return
    place = from_slurm(chosen) if chosen.submit else from_environment(chosen)
    assign_device_for_local_rank(chosen.cpu, place.local_rank)
    dist.init_process_group(
        chosen.distributed_backend,
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=chosen.timeout),
    )


def cleanup() -> None:
    """Leave the process group, and forget the assigned device. Without a group there is nothing to leave."""
    if initialized():
        dist.destroy_process_group()
    os.environ.pop(CURRENT_DEVICE_STR, None)


def _check_same(config: Config) -> None:
    if config.world_size not in (None, get_world_size()):
        raise ConfigError(
            f"config field world_size={config.world_size}: this process is in a group of {get_world_size()} already; "
            f"None takes it as it is"
        )
    if config.distributed_backend != dist.get_backend():
        raise ConfigError(
            f"config field distributed_backend={config.distributed_backend!r}: this process is in a group with backend "
            f"{dist.get_backend()!r} already"
        )
