"""raylaunch as a command: `raylaunch run`, on a cluster that runs. Options: `elastic`, only that `true` ends."""

from __future__ import annotations

import subprocess
import sys
import time

import ray

from benchmarks.peers import Order
from benchmarks.peers.cluster import cluster_for


def main(folder: str) -> int:
    order = Order.load(folder)
    with cluster_for(order) as victim:
        address = ray.get_runtime_context().gcs_address
        line = [sys.executable, "-m", "raylaunch", "run", f"--address={address}", f"--log-dir={folder}"]
        if "elastic" in order.options:
            line += ["--nnodes=1:2", "--nproc-per-node=1", "--no-python", "true"]
        else:
            line += [f"--nproc-per-node={order.workers[1]}", f"--max-restarts={order.restarts}"]
            line += ["-m", "benchmarks.work", folder, order.task]
        order.tell("armed", {"victim": victim, "pids": None})
        order.tell("called", time.monotonic())
        code = subprocess.call(line)
        order.tell("ended", time.monotonic())
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
