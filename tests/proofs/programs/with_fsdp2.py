"""A training program with FSDP2 (fully_shard), which saves its shards with torch.distributed.checkpoint."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from dcp_state import Training, resume, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import BATCH, SAVE_EVERY, STEPS, Samples, account, as_script, in_step


def train(folder: str) -> dict[str, Any]:
    if not dist.is_initialized():  # in a function it is; in a script that is the script's part
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    data = Samples(ranks=mesh.size())
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
    return account(mesh.size(), resumed_from, training.step, model, data)


if __name__ == "__main__":
    as_script(train)
