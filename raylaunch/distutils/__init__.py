"""Helpers around torch.distributed: the same calls in a raylaunch worker, under torchrun, and in one process alone.

    from raylaunch import distutils

    loss = distutils.all_reduce(loss, average=True)
    if distutils.is_master():
        print(loss)

Without a process group this is rank 0 of 1, and the collectives are no-ops. `setup` forms a group where the launcher
has not formed one. The map: `group` who takes part, `tensors` and `objects` the collectives, `devices` this rank's
device, `forming` setup and cleanup, with `config`, `place` and `environment`. What differs from fairchem's module of
the same name stands in docs/distutils.md. Importing this package imports torch; nothing else in raylaunch imports it.
"""

from raylaunch.distutils.devices import CURRENT_DEVICE_STR, assign_device_for_local_rank, get_device_for_local_rank
from raylaunch.distutils.environment import os_environ_get_or_throw, setup_env_local
from raylaunch.distutils.forming import cleanup, setup
from raylaunch.distutils.group import get_rank, get_world_size, initialized, is_master, synchronize
from raylaunch.distutils.objects import T, all_gather_objects, broadcast_object_list, gather_objects
from raylaunch.distutils.place import DISTRIBUTED_PORT
from raylaunch.distutils.tensors import all_gather, all_reduce, broadcast

__all__ = [
    "CURRENT_DEVICE_STR",
    "DISTRIBUTED_PORT",
    "T",
    "all_gather",
    "all_gather_objects",
    "all_reduce",
    "assign_device_for_local_rank",
    "broadcast",
    "broadcast_object_list",
    "cleanup",
    "gather_objects",
    "get_device_for_local_rank",
    "get_rank",
    "get_world_size",
    "initialized",
    "is_master",
    "os_environ_get_or_throw",
    "setup",
    "setup_env_local",
    "synchronize",
]
