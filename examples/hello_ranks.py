"""The smallest run: the ranks of one process group add up their numbers, and the driver gets what each returns."""

from __future__ import annotations

import ray
import torch
import torch.distributed as dist

import raylaunch


def hello() -> str:
    context = raylaunch.get_context()
    total = torch.tensor(context.rank)
    dist.all_reduce(total)  # the process group is there already
    return f"rank {context.rank} of {context.world_size} on {context.device}: all ranks add up to {total.item()}"


if __name__ == "__main__":
    # A Ray of its own on this machine. On a cluster leave this out: raylaunch connects as Ray does by itself.
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    for line in raylaunch.run(hello, num_workers=2):
        print(line)
