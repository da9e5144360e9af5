"""The entry point of `torchrun --rdzv-backend=ray`, in the group `torchrun.handlers`.

torch 2.13 loads it on every import of its elastic package, also for those who use another backend, and may do so while
that package is being imported: nothing is imported here until the backend is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def create_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch's registry wants of an entry point: the function that makes a handler."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    from raylaunch.torchrun.backend.handler import RayRendezvousHandler

    return RayRendezvousHandler(parameters)
