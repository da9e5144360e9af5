"""A training function that survives: a small network on the handwritten digits, with DDP. The demo runs it.

What makes it survive is marked below: it loads the last checkpoint when it starts (1), chooses its data by step, rank
and world size alone (2), and commits a checkpoint atomically, after asking whether it still may (3). Why each of them
is needed stands in docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import raylaunch

#: Of all ranks together, so that a step means the same with four ranks and with two; each takes its share.
GLOBAL_BATCH = 96
#: A checkpoint every so many steps.
SAVE_EVERY = 20

Data = tuple[Tensor, Tensor]


def load() -> tuple[Data, Data]:
    """The 1,797 images that come with scikit-learn, 8 by 8 pixels each: 1,437 to train on, 360 to test with."""
    from sklearn.datasets import load_digits  # here: the workers get the tensors and need no scikit-learn

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


def train(
    train_data: Data, test_data: Data, folder: str, *, steps: int | None, pause: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Train for so many steps, or with None until there is a file `folder`/stop; returns accuracy and weights.

    `folder` must be the same place for all ranks. It gets the checkpoint, and a log of all steps.
    `pause` makes each step last longer by so many seconds, as if the network were larger.
    """
    context = raylaunch.get_context()
    torch.manual_seed(seed)  # the same first weights in every run
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # A backward pass for nothing: after the first one DDP lays out its gradient buckets anew (torch 2.13), and so the
    # order in which the ranks' gradients are added. Only needed where results are to be equal to the last bit.
    model(train_data[0][:1]).sum().backward()

    step = _resume(folder, model, optimizer)  # (1)
    log = StepLog(folder) if context.rank == 0 else None
    if log:
        log.write(event="start", step=step)
    while step != steps:
        images, labels = _batch(train_data, step, seed)  # (2)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(pause)
        step += 1
        if log:
            log.write(event="step", step=step, loss=round(loss.item(), 4))
        if step % SAVE_EVERY == 0:
            if log and _save(folder, model, optimizer, step):  # (3)
                log.write(event="saved", step=step)
            if steps is None and _told_to_stop(folder):
                break

    with torch.no_grad():
        images, labels = test_data
        accuracy = (model.module(images).argmax(1) == labels).float().mean().item()
    return {"step": step, "accuracy": accuracy, "weights": model.module.state_dict()}


def _batch(data: Data, step: int, seed: int) -> Data:
    """This rank's share of a step's batch: nothing but the seed, the step, the rank and the world size counts."""
    context = raylaunch.get_context()
    images, labels = data
    epoch, position = divmod(step, len(images) // GLOBAL_BATCH)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))
    batch = order[position * GLOBAL_BATCH : (position + 1) * GLOBAL_BATCH]
    mine = batch[context.rank :: context.world_size]
    return images[mine], labels[mine]


def _resume(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint; returns the step it was taken after, 0 without one.

    One rank reads, and the others get what it read: ranks that each read for themselves could see different ones.
    """
    found: list[Any] = [None]
    if raylaunch.get_context().rank == 0:
        with contextlib.suppress(FileNotFoundError):
            found = [torch.load(_path(folder), weights_only=True)]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return 0
    model.load_state_dict(found[0]["model"])
    optimizer.load_state_dict(found[0]["optimizer"])
    step: int = found[0]["step"]
    return step


def _save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Commit a checkpoint; whether it was committed. Called by rank 0 only."""
    unfinished = f"{_path(folder)}.{os.getpid()}"
    with open(unfinished, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file)
        file.flush()
        os.fsync(file.fileno())
    if not raylaunch.get_context().is_current():
        os.remove(unfinished)  # another generation has taken over: its checkpoints count
        return False
    os.replace(unfinished, _path(folder))  # a reader finds the old file or the new one, never a half
    return True


def _path(folder: str) -> str:
    return os.path.join(folder, "checkpoint.pt")


def _told_to_stop(folder: str) -> bool:
    """Whether there is a stop file. Rank 0 looks and tells the others, so that all leave after the same step."""
    told = torch.tensor(os.path.exists(os.path.join(folder, "stop")))
    dist.broadcast(told, src=0)
    return bool(told)


class StepLog:
    """What rank 0 did, step by step, over all generations: one JSON line each."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, "steps.jsonl")

    def write(self, **what: Any) -> None:
        """Add a line."""
        context = raylaunch.get_context()
        line = {**what, "generation": context.generation, "world_size": context.world_size, "at": time.time()}
        with open(self._path, "a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
