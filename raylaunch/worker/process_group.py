"""The process group of a generation: its store (open before it is announced), joining, leaving, and whose fault it was.

Called by the worker, in the order `open_store` (as a spare), `join` (promoted), `leave`. torch is imported inside.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from raylaunch.coordinator.commands import Assignment
from raylaunch.errors import RaylaunchError
from raylaunch.worker.env import FAKE_GPUS, visible_devices

if TYPE_CHECKING:
    from torch.distributed import TCPStore

#: How gloo (torch 2.13) says that the other side is gone. It raises plain RuntimeErrors that name its source file.
_GLOO_COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "connectFullMesh failed",
    "Timed out waiting",
)
#: Errors of torch's own types that no peer's end explains: two ranks on one GPU, an error of this rank's CUDA, an
#: address that this process can't have.
_OWN_FAULT = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclUnhandledCudaError", "failed to listen")
#: How many exceptions of a chain `is_collateral` looks at.
_CHAIN_LIMIT = 32


class JoinError(RaylaunchError):
    """This rank could not join the process group: a peer never came, or the endpoint can't be reached."""


def open_store(host: str) -> tuple[TCPStore, int]:
    """A store that listens on `host` and nowhere else, and its port. Keep it: the server lives as long as the object.

    An `env://` initialisation in this process as rank 0, with MASTER_PORT=port, uses the same server (torch keeps
    servers with multi_tenant=True by port), so nobody can take the port between its announcement and its use.
    """
    import torch.distributed as dist

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            world_size=None,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),  # from here on the server owns it and closes it (seen on torch 2.13)
        )
    return store, port


def device_of(assignment: Assignment, *, use_gpu: bool, virtual_local_rank: bool) -> str:
    """The rank's device as torch names it: `cuda:1`, or `cpu`."""
    index, _ = visible_devices(assignment, virtual_local_rank=virtual_local_rank)
    return f"cuda:{index}" if use_gpu else "cpu"


def join(
    assignment: Assignment, *, backend: str | None, use_gpu: bool, virtual_local_rank: bool, timeout: float
) -> None:
    """Take the device, then join the process group that the environment (`env.rank_env`) describes.

    With gloo every rank is connected to every other afterwards. NCCL connects at the first collective: joining only
    means that the store was reached. `backend=None`: train_fn will initialise the group itself.

    Bounded by `timeout` seconds, the initialisation of CUDA included. The bound is kept from outside, by a thread,
    for three reasons (torch 2.13). init_process_group's own `timeout` becomes the timeout of the user's collectives.
    It holds for each phase anew: 2.3 times it for an endpoint that refuses, once for the other ranks to come, 5 times
    for a full mesh that fails. And it doesn't hold at all when rank 0 is stopped: TCPStore then waits for ever. After a
    JoinError the thread is still there; a worker that can't join is replaced, and its process ends.
    """
    device = device_of(assignment, use_gpu=use_gpu, virtual_local_rank=virtual_local_rank)
    errors: list[BaseException] = []

    def initialise() -> None:
        try:
            _take_device(device)  # per thread in CUDA; NCCL would otherwise put something on everybody's cuda:0
            if backend is not None:
                import torch.distributed as dist

                dist.init_process_group(backend, init_method="env://")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=initialise, name="raylaunch-join", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _join_error(assignment, f"nothing more happened within {timeout:g} s")
    if errors and is_collateral(errors[0]):
        first_line = str(errors[0]).partition("\n")[0]
        raise _join_error(assignment, first_line) from errors[0]
    if errors:
        raise errors[0]
    _take_device(device)


def is_joined() -> bool:
    """Whether this process is in a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def leave(seconds: float = 10.0) -> None:
    """Leave the process group, if there is one, so that peers that wait for this rank fail at once.

    Bounded, since NCCL's destroy waits for its peers. Never raises.
    """
    if not is_joined():
        return

    def destroy() -> None:
        with contextlib.suppress(Exception):  # the group is broken already: that is left too
            sys.modules["torch.distributed"].destroy_process_group()

    thread = threading.Thread(target=destroy, name="raylaunch-leave", daemon=True)
    thread.start()
    thread.join(seconds)


def is_collateral(error: BaseException) -> bool:
    """Whether an exception usually only follows another worker's end.

    That is so for what torch raises when a peer or the store is gone, and for what user code raised while it handled
    such an error. An error that user code got from a socket of its own is its own, whatever its text.
    """
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left and len(seen) < _CHAIN_LIMIT:
        one = left.pop()
        if one is None or any(one is other for other in seen):
            continue
        if _follows_a_peer(one):
            return True
        seen.append(one)
        left += [one.__context__, one.__cause__]
    return False


def is_collateral_text(text: str) -> bool:
    """The same of an exception of which only the printed type and message are left."""
    if text.startswith("torch.distributed."):
        return not any(words in text for words in _OWN_FAULT)
    return text.startswith("RuntimeError:") and "/gloo/" in text and any(words in text for words in _GLOO_COLLATERAL)


def _follows_a_peer(error: BaseException) -> bool:
    if isinstance(error, JoinError):
        return True
    # Only torch raises these types, so they can't be there when it hasn't been imported.
    dist = sys.modules.get("torch.distributed")
    dist_error = getattr(dist, "DistError", ())
    if type(error) is not RuntimeError and not isinstance(error, dist_error):
        return False
    try:
        text = str(error)
    except Exception:  # an argument whose __str__ raises: not torch's
        return False
    if isinstance(error, dist_error):
        return not any(words in text for words in _OWN_FAULT)
    return "/gloo/" in text and any(words in text for words in _GLOO_COLLATERAL)


def _take_device(device: str) -> None:
    if device == "cpu" or os.environ.get(FAKE_GPUS):
        return
    import torch

    if not torch.cuda.is_available():
        raise RaylaunchError(
            f"use_gpu=True, but torch sees no GPU here: is torch {torch.__version__} built for this node's driver? "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        )
    torch.cuda.set_device(device)


def _join_error(assignment: Assignment, reason: str) -> JoinError:
    return JoinError(
        f"rank {assignment.rank} of {assignment.world_size} could not join the process group at "
        f"{assignment.master_addr}:{assignment.master_port} (GLOO_SOCKET_IFNAME="
        f"{os.environ.get('GLOO_SOCKET_IFNAME', '')!r}): {reason}. Either another rank did not come, or a firewall or "
        f"a wrong interface keeps the nodes apart"
    )
