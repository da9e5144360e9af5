"""Eager mode: a launch that is a call in this very process, as rank 0 of 1, without Ray. A debugger sees everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raylaunch.context import Context, enter_context, get_context
from raylaunch.coordinator.commands import Assignment
from raylaunch.elastic.devices import Devices, NodeDevices, resolve
from raylaunch.errors import ConfigError
from raylaunch.worker import process_group
from raylaunch.worker.env import rank_env

if TYPE_CHECKING:
    from raylaunch.elastic.launcher import ElasticLauncher

HOST = "127.0.0.1"
RUN_ID = "eager"


def own_device(devices: Devices) -> NodeDevices:
    """The first of the devices, on this machine. Raises `ConfigError`."""
    gpus = 0
    if devices.kind != "cpu":
        import torch

        gpus = torch.cuda.device_count()
    found = resolve(devices, [{"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}])
    if found.kind == "cuda" and not gpus:
        raise ConfigError(f"devices={devices.text!r}: there is no GPU on this machine")
    chosen = None if found.indices is None else found.indices[:1]
    return NodeDevices(found.kind, 1, 1, chosen)


def run_eagerly(
    launcher: ElasticLauncher, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call it here; what it returns, and what it raises, as it is.

    torchrun's environment, the device and a process group of one are there meanwhile. A process group that was there
    before stays.
    """
    from raylaunch.elastic.current import entered

    store, port = process_group.open_store(HOST)
    device = str(launcher.assigned_device)
    context = Context(run_id=RUN_ID, device=device, master_addr=HOST, master_port=port)
    copy = launcher._copy  # noqa: SLF001 - the launcher's own helper
    try:
        with _environment(context, launcher), _context(context), entered(launcher, copy, None):
            alone = not process_group.is_joined()
            _take(device)
            if alone and launcher.dist_backend is not None:
                import torch.distributed as dist

                dist.init_process_group(launcher.dist_backend, init_method="env://")
            try:
                return function(*args, **kwargs)
            finally:
                if alone:
                    process_group.leave()
    finally:
        copy.clear()
        del store


@contextmanager
def _environment(context: Context, launcher: ElasticLauncher) -> Iterator[None]:
    """A rank's variables; but the process sees the GPUs that it saw before, since it may use them already."""
    assignment = Assignment(
        generation=0,
        rank=0,
        local_rank=0,
        node_rank=0,
        world_size=1,
        local_world_size=1,
        num_nodes=1,
        master_addr=context.master_addr,
        master_port=context.master_port,
        restart_count=0,
        devices=(),
        own_devices=(),
        predecessors=(),
    )
    variables = rank_env(
        assignment,
        run_id=context.run_id,
        max_restarts=launcher.max_restarts,
        error_file="",
        virtual_local_rank=False,
        use_gpu=False,
        role=launcher.role_name,
    )
    del variables["CUDA_VISIBLE_DEVICES"], variables["TORCHELASTIC_ERROR_FILE"]
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _context(context: Context) -> Iterator[None]:
    before = get_context()
    enter_context(context)
    try:
        yield
    finally:
        enter_context(before)


def _take(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.set_device(device)
