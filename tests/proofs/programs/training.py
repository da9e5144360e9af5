"""What the programs share: the data, the steps, the place where one rank waits to be killed, and what each rank tells.

Nothing here helps a program to find its group, to save or to resume: that is its library's part.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

#: How long a run is, in optimizer steps; how often it saves; in the middle of which step one rank is killed.
STEPS, SAVE_EVERY, DEADLY_STEP = 8, 2, 5
#: Samples that each rank takes for each step.
BATCH = 4
#: How long the rank that is to be killed waits for it, in seconds: a bound.
PATIENCE_SECONDS = 120.0


class Samples(torch.utils.data.Dataset):
    """One epoch for `ranks` ranks. It notes which samples this process has taken."""

    def __init__(self, ranks: int) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(STEPS * BATCH * ranks, 4, generator=numbers)
        self.targets = self.inputs.sum(dim=1, keepdim=True)
        self.taken: set[int] = set()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.taken.add(int(index))
        return self.inputs[index], self.targets[index]


def in_step(step: int, folder: str) -> None:
    """Called by each rank when it begins a step, counted from 1. In the deadly one the victim waits to be killed."""
    if step != DEADLY_STEP or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    rank = os.environ["RANK"]
    write(Path(folder, f"in-step-{rank}"), str(os.getpid()))
    if rank == os.environ["PROOF_VICTIM"]:  # the others go on, into a collective that can't end
        time.sleep(PATIENCE_SECONDS)
        raise AssertionError(f"rank {rank} has not been killed within {PATIENCE_SECONDS:g} s")


def account(world_size: int, resumed_from: int, steps: int, model: torch.nn.Module, data: Samples) -> dict[str, Any]:
    """What a rank tells in the end. The first three are what the *library* says; the weights are this rank's own."""
    state = model.state_dict().items()
    whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in state}  # sharded: gathered
    return {
        "world_size": world_size,
        "resumed_from": resumed_from,
        "steps": steps,
        "weights": {name: tensor.tolist() for name, tensor in whole.items()},
        "samples": sorted(data.taken),
    }


def as_script(train: Callable[[str], dict[str, Any]]) -> None:
    """`train.py FOLDER`: what each rank returns is written down, for want of anybody who takes it."""
    folder = sys.argv[1]
    told = train(folder)
    write(Path(folder, f"told-{os.environ['RANK']}.json"), json.dumps(told))


def write(path: Path, text: str) -> None:
    """Whole, or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.rename(path)
