"""One rank's part of a batch: `split_batch`. Pure."""

from __future__ import annotations

import numbers
from typing import Any

from raylaunch.context import get_context
from raylaunch.errors import ConfigError


def split_batch(batch: Any, *, rank: int | None = None, world_size: int | None = None) -> Any:
    """This rank's part of a batch that all ranks share out among them, as evenly as it goes.

    The parts follow one another in the order of the ranks; the first `len(batch) % world_size` ranks get one more. With
    fewer elements than ranks, the last ranks get an empty part.

    Args:
        batch: a batch, of anything that has a length and can be sliced (a list, a tensor, an array), or its size.
        rank: whose part; default: this process's.
        world_size: among how many; default: this process's group.

    Returns:
        The slice; for a size, the part's size.

    Raises:
        ConfigError: no such rank, or a negative size.
    """
    context = get_context()
    rank = context.rank if rank is None else rank
    world_size = context.world_size if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank!r}: must be a rank of world_size={world_size!r}")
    is_size = isinstance(batch, numbers.Integral)
    length = int(batch) if is_size else len(batch)
    if length < 0:
        raise ConfigError(f"batch={batch!r}: a size is at least 0")
    each, more = divmod(length, world_size)
    first = rank * each + min(rank, more)
    size = each + (rank < more)
    return size if is_size else batch[first : first + size]
