"""Saving and resuming with torch.distributed.checkpoint (DCP), as torch's own recipe has it.

Each rank writes and reads its own part, so that M ranks can load what N ranks have saved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful


class Training(Stateful):
    """What belongs to a checkpoint."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)  # the same names, sharded or not
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def resume(folder: str, training: Training) -> None:
    newest = [max((int(path.name[5:]) for path in Path(folder).glob("step-*")), default=0)]
    dist.broadcast_object_list(newest, src=0)  # rank 0 says which
    if newest[0]:
        dcp.load({"training": training}, checkpoint_id=f"{folder}/step-{newest[0]}")


def save(folder: str, training: Training) -> None:
    dcp.save({"training": training}, checkpoint_id=f"{folder}/unfinished")  # returns when all ranks have written
    if dist.get_rank() == 0:
        os.replace(f"{folder}/unfinished", f"{folder}/step-{training.step}")
    dist.barrier()
