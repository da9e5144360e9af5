"""A training program with DistributedDataParallel, which saves with torch.distributed.checkpoint."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from dcp_state import Training, resume, save
from torch.nn.parallel import DistributedDataParallel
from training import BATCH, SAVE_EVERY, STEPS, Samples, account, as_script, in_step


def train(folder: str) -> dict[str, Any]:
    if not dist.is_initialized():  # in a function it is; in a script that is the script's part
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    data = Samples(ranks=dist.get_world_size())
    sampler = torch.utils.data.DistributedSampler(data)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler)

    resume(folder, training)
    resumed_from = training.step
    for inputs, targets in itertools.islice(loader, training.step, STEPS):
        in_step(training.step + 1, folder)
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.step += 1
        if training.step % SAVE_EVERY == 0:
            save(folder, training)
    return account(dist.get_world_size(), resumed_from, training.step, model.module, data)


if __name__ == "__main__":
    as_script(train)
