"""The Ray cluster of one order, the same for every peer that runs on Ray, with Ray's own settings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray.cluster_utils import Cluster

from benchmarks.peers import Order
from benchmarks.quiet import wait_until_quiet


@contextlib.contextmanager
def cluster_for(order: Order) -> Iterator[int | None]:
    """A running cluster, with this process connected to its first node. Yields the pid of the second node's raylet."""
    # No settings but the size: health checks, above all, are Ray's defaults (a node is dead after some 15 s).
    size = {"num_cpus": order.per_node}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        others = [cluster.add_node(**size) for _ in range(order.nodes - 1)]
        ray.init(address=cluster.address, log_to_driver=False)
        raylets = [node.all_processes["raylet"][0].process for node in others]
        for raylet in raylets:
            # A killed raylet is this process's zombie, and Ray's workers look whether their parent is still there.
            threading.Thread(target=raylet.wait, daemon=True).start()
        wait_until_quiet()
        yield raylets[0].pid if raylets else None
    finally:
        ray.shutdown()
        cluster.shutdown()
