"""What the ranks do: the same code for every peer. It notes its times itself, so that no launcher is asked for them.

A note is a file that a rank writes after the first all-reduce of its group. Times are `time.monotonic()`, which is one
clock for all processes of a machine (CLOCK_MONOTONIC).

    torchrun ... -m benchmarks.work FOLDER TASK
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.peers import write

#: Between two all-reduces of `idle`, in seconds: so few that waiting ranks leave the cores to the launcher.
IDLE_SECONDS = 0.02
#: `digits`: steps before the clock runs, and the windows that are timed.
WARM_STEPS, WINDOWS, WINDOW_STEPS = 30, 3, 200
#: Of all ranks together.
GLOBAL_BATCH = 96


def idle(folder: str) -> None:
    """One all-reduce, a note, and an all-reduce every now and then until there is a file `folder`/stop."""
    entered = time.monotonic()
    _form()
    dist.all_reduce(torch.ones(1))
    note(folder, entered)
    while not _agreed(folder, "stop"):
        time.sleep(IDLE_SECONDS)


def once(folder: str) -> None:
    """One all-reduce, and a note."""
    entered = time.monotonic()
    _form()
    dist.all_reduce(torch.ones(1))
    note(folder, entered)


def digits(folder: str) -> None:
    """Train on the handwritten digits with DDP; when there is a file `folder`/go, time some windows of steps."""
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    entered = time.monotonic()
    _form()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train(steps: int) -> None:
        for step in range(steps):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))
            mine = order[:GLOBAL_BATCH][rank::world_size]
            loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(WARM_STEPS)
    note(folder, entered)
    while not _agreed(folder, "go"):
        time.sleep(IDLE_SECONDS)
    speeds = []
    for _ in range(WINDOWS):
        dist.barrier()
        started = time.monotonic()
        train(WINDOW_STEPS)
        dist.barrier()
        speeds.append(WINDOW_STEPS / (time.monotonic() - started))
    if rank == 0:
        write(os.path.join(folder, "speeds.json"), speeds)
    while not _agreed(folder, "stop"):
        time.sleep(IDLE_SECONDS)


TASKS = {task.__name__: task for task in (idle, once, digits)}


def note(folder: str, entered: float) -> None:
    """Write down that this rank has been through an all-reduce now, and when it had been given the floor."""
    now = time.monotonic()
    found = {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "pid": os.getpid(),
        "entered": entered,
        "at": now,
    }
    write(os.path.join(folder, f"note-{os.getpid()}.json"), found)


def _form() -> None:
    """Join the process group, where the launcher hasn't done that."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def _agreed(folder: str, name: str) -> bool:
    """Whether there is such a file. Rank 0 looks and tells the others, so that all see it after the same step."""
    there = torch.tensor(dist.get_rank() == 0 and os.path.exists(os.path.join(folder, name)), dtype=torch.int32)
    dist.all_reduce(there)
    return bool(there)


if __name__ == "__main__":
    TASKS[sys.argv[2]](sys.argv[1])
