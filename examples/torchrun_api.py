"""torch.distributed.launcher's API on Ray: of a program that launches with it, only the import changes."""

from __future__ import annotations

import ray
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylaunch.torchrun import LaunchConfig, elastic_launch  # instead of torch.distributed.launcher.api


def train(images: Tensor, labels: Tensor, steps: int) -> float:
    dist.init_process_group("gloo")  # as under torchrun: the function forms its process group itself
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels = images[rank::size], labels[rank::size]
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.destroy_process_group()
    return float((model.module(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    # A Ray of its own on this machine. On a cluster leave this out: raylaunch connects as Ray does by itself.
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=3)
    results = elastic_launch(config, train)(images, labels, 100)
    for rank, accuracy in results.items():
        print(f"rank {rank}: {accuracy:.1%} of its images recognised")
