"""Bare Ray actors: what a loop written by hand gives, as short as it can be and with nothing but the happy path.

Actors start and import at the same time; whoever fails, all are killed and started again. It has no idea of nodes,
causes, budgets, stopped processes or stale ones: it is the floor below which nothing on Ray without spares can get.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import ray

from benchmarks.peers import Order
from benchmarks.peers.cluster import cluster_for


@ray.remote(num_cpus=1)
class Worker:
    def __init__(self) -> None:
        import torch.distributed  # noqa: F401 - now, while the others do

    def endpoint(self) -> tuple[str, int]:
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, rank: int, world_size: int, host: str, port: int, order: Order) -> None:
        from benchmarks.work import TASKS

        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port))
        TASKS[order.task](order.folder)


def main(folder: str) -> None:
    order = Order.load(folder)
    with cluster_for(order):
        order.tell("armed", {"victim": None, "pids": None})
        order.tell("called", time.monotonic())
        for _ in range(order.restarts + 1):
            if attempt(order):
                return
        sys.exit(1)


def attempt(order: Order) -> bool:
    """One group, until it has returned or one of it has failed."""
    workers = [Worker.remote() for _ in range(order.workers[1])]  # type: ignore[attr-defined] # Ray's decorator
    try:
        host, port = ray.get(workers[0].endpoint.remote())
        left = [worker.run.remote(rank, len(workers), host, port, order) for rank, worker in enumerate(workers)]
        while left:
            done, left = ray.wait(left)
            ray.get(done)
    except ray.exceptions.RayError:
        return False
    finally:
        for worker in workers:
            ray.kill(worker)
    return True


if __name__ == "__main__":
    main(sys.argv[1])
