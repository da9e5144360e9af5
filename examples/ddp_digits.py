"""Elastic training in one file: one to two workers, DDP, and a checkpoint after every epoch."""

from __future__ import annotations

import os
import tempfile

import ray
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import raylaunch


def train(checkpoint: str, epochs: int) -> float:
    context = raylaunch.get_context()
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(data, seed=0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = 0
    if os.path.exists(checkpoint):  # after a failure, train starts anew in new processes: go on from here
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, batch_size=32, sampler=sampler):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if context.rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, f"{checkpoint}.{context.generation}")
            if context.is_current():  # otherwise another generation has taken over, and its checkpoints count
                os.replace(f"{checkpoint}.{context.generation}", checkpoint)
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    # A Ray of its own on this machine. On a cluster leave this out, and put the checkpoint where all nodes see it.
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        result = raylaunch.run(train, args=(os.path.join(folder, "digits.pt"), 5), num_workers=(1, 2))
    print(f"{result.world_size} workers, {result.restarts} restarts, {result[0]:.1%} of the images recognised")
