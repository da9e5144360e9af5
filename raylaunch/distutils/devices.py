"""Which device this rank computes on. It stands in an environment variable, so that child processes know it too."""

from __future__ import annotations

import logging
import os

import torch

from raylaunch.context import get_context

logger = logging.getLogger("raylaunch")

#: The environment variable that holds the assigned device. Its name is spelt as people's scripts have it.
CURRENT_DEVICE_STR = "CURRRENT_DEVICE"


def assign_device_for_local_rank(cpu: bool, local_rank: int) -> None:
    """Make this rank compute on the CPU, or on the GPU `cuda:<local_rank>`, which becomes torch's current one.

    Raises:
        RuntimeError: there is no such GPU.
    """
    if cpu:
        os.environ[CURRENT_DEVICE_STR] = "cpu"
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= local_rank < count:
        raise RuntimeError(
            f"cpu=False and local_rank={local_rank}, but this process sees {count} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r})"
        )
    torch.cuda.set_device(local_rank)
    os.environ[CURRENT_DEVICE_STR] = f"cuda:{local_rank}"


def get_device_for_local_rank() -> str:
    """This rank's device, as `cuda:1` or `cpu`.

    The assigned one; else the one that raylaunch has given this worker; else, with a warning, torch's current GPU, or
    the CPU where there is none.

    Raises:
        ValueError: the variable CURRENT_DEVICE_STR holds something else than a device.
    """
    assigned = os.environ.get(CURRENT_DEVICE_STR)
    if assigned is not None:
        if assigned.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"{CURRENT_DEVICE_STR}={assigned!r} in the environment: must be cpu, cuda or cuda:N")
        return assigned
    context = get_context()
    if context.run_id:
        return context.device
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    logger.warning("no device has been assigned (neither setup nor assign_device_for_local_rank): taking %s", device)
    return device
