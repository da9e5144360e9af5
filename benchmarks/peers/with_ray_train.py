"""Ray Train v2: `TorchTrainer.fit()`, without checkpoints and reports, so that it stores nothing.

Its defaults, but for RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S (`benchmarks.scenarios`).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from benchmarks.peers import Order
from benchmarks.peers.cluster import cluster_for


def train(config: dict[str, Any]) -> None:
    from benchmarks.work import TASKS

    TASKS[config["task"]](config["folder"])


def main(folder: str) -> None:
    order = Order.load(folder)
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": folder, "task": order.task},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=order.workers if order.workers[0] < order.workers[1] else order.workers[1]
        ),
        run_config=RunConfig(
            name="bench", storage_path=folder, failure_config=FailureConfig(max_failures=order.restarts)
        ),
    )
    with cluster_for(order) as victim:
        order.tell("armed", {"victim": victim, "pids": None})
        order.tell("called", time.monotonic())
        trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1])
