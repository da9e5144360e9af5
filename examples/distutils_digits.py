"""Training with raylaunch.distutils: the same function on a Ray cluster, and alone in this process, for a debugger.

python examples/distutils_digits.py          # two workers
python examples/distutils_digits.py --alone  # rank 0 of 1, without Ray
"""

from __future__ import annotations

import sys

import ray
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import raylaunch
from raylaunch import distutils


def train(images: Tensor, labels: Tensor, steps: int) -> float:
    distutils.setup({"submit": False, "world_size": None, "cpu": True, "distributed_backend": "gloo"})
    rank, size = distutils.get_rank(), distutils.get_world_size()
    images, labels = images[rank::size], labels[rank::size]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    for weight in model.parameters():
        distutils.broadcast(weight, src=0)
    for step in range(1, steps + 1):
        loss = nn.functional.cross_entropy(model(images), labels)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(0.5 * distutils.all_reduce(weight.grad, average=True))
        if step % 50 == 0:
            loss = distutils.all_reduce(loss, average=True)
            if distutils.is_master():
                print(f"step {step} of {steps}, {size} ranks: loss {loss.item():.3f}", flush=True)
    accuracy: float = distutils.all_reduce((model(images).argmax(1) == labels).float().mean().item(), average=True)
    distutils.cleanup()
    return accuracy


if __name__ == "__main__":
    digits = load_digits()
    arguments = (torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target), 150)
    if "--alone" in sys.argv:
        accuracy = train(*arguments)
    else:
        # A Ray of its own on this machine. On a cluster leave this out: raylaunch connects as Ray does by itself.
        ray.init(address="local", num_cpus=2, include_dashboard=False)
        accuracy = raylaunch.run(train, args=arguments, num_workers=2)[0]
    print(f"{accuracy:.1%} of the images recognised")
