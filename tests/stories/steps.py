"""Training functions that stories share: they step together until a file says that it is enough."""

from __future__ import annotations

import time
from pathlib import Path

import raylaunch


def any_rank(mine: bool) -> bool:
    """Whether it holds on any rank; one all-reduce."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor([float(mine)])
    dist.all_reduce(flag)
    return bool(flag.item())


def step_until(enough: Path, steps: Path | None = None) -> tuple[int, int, int]:
    """Steps until the file `enough` is there; returns (rank, world size, generation).

    With `steps`, each rank appends a line for each step to its own file there: generation, rank, step, time.
    """
    context = raylaunch.get_context()
    step = 0
    log = (steps / f"{context.generation}-{context.rank}").open("a", buffering=1) if steps else None
    while not any_rank(enough.exists()):
        step += 1
        if log:
            log.write(f"{context.generation} {context.rank} {step} {time.monotonic()}\n")
        time.sleep(0.005)
    return context.rank, context.world_size, context.generation
