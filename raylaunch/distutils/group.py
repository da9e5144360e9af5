"""Who takes part: this process's place in torch's process group. Without a group it is rank 0 of 1."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist

#: The ranks that take part in a collective; None: all. Not dist.group.WORLD, which as a default would be evaluated when
#: this module is imported: before the group is formed, or in one that is gone later.
Group: TypeAlias = "dist.ProcessGroup | None"


def initialized() -> bool:
    """Whether this process is in a process group."""
    return bool(dist.is_available() and dist.is_initialized())


def get_rank() -> int:
    """This process's global rank; 0 without a process group, also where a launcher has set RANK already."""
    return int(dist.get_rank()) if initialized() else 0


def get_world_size() -> int:
    """How many ranks the process group has; 1 without one, also where a launcher has set WORLD_SIZE already."""
    return int(dist.get_world_size()) if initialized() else 1


def is_master() -> bool:
    """Whether this is global rank 0."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until all ranks have come here."""
    if get_world_size() > 1:
        dist.barrier()


def size_of(group: Group) -> int:
    """How many ranks take part in a collective.

    Raises:
        ValueError: this rank doesn't belong to `group`. torch would only warn, and leave results that are none.
    """
    if not initialized():
        if group is not None:
            raise ValueError(f"group={group!r}: this process is in no process group (any more)")
        return 1
    size = int(dist.get_world_size(group))
    if size < 1:
        raise ValueError(f"rank {get_rank()} does not belong to this group: only its members may take part")
    return size
