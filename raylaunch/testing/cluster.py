"""A real Ray cluster of several nodes on this machine, and the means to hurt it. For your own tests and ours.

    with LocalCluster(nodes=2, cpus=2) as cluster:
        ...
        cluster.kill_node(cluster.nodes[1])

All nodes share one address; GPUs may be fake (`gpus=2` on a machine without any, with `backend="gloo"`). Other Ray
clusters on the machine are not touched, but Ray 2.60 notes the newest one in a file of the machine, which a bare
`ray.init()` elsewhere would follow: say an address, or `address="local"`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raylaunch.cluster.coordinator_actor import NAMESPACE, Member, Status, actor_name
from raylaunch.worker.process_group import FAKE_GPUS

#: Ray's health checks, made quicker than its defaults (5 s, 3 s, 10 s, 5 times), so that a dead node is declared dead
#: in some 2 s instead of 15. Real clusters have the defaults: see `fast_health_checks`.
FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}


class LocalCluster:
    """A Ray cluster of processes on this machine; the driver is connected to its first node.

    Args:
        nodes: how many.
        cpus: CPUs of each, a number that Ray believes.
        gpus: GPUs of each; fake where the machine has none.
        fast_health_checks: whether Ray declares a dead node dead in some 2 s.

    Attributes:
        nodes: the nodes that live, the first being the driver's; each has a `node_id`.
        address: for `ray.init(address=...)` in another process.
    """

    def __init__(self, nodes: int = 1, cpus: int = 2, gpus: int = 0, *, fast_health_checks: bool = True) -> None:
        self._size: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
        if gpus > len(glob.glob("/dev/nvidia[0-9]*")):
            self._size["env_vars"] = {FAKE_GPUS: "1"}
        settings = {"_system_config": FAST_HEALTH_CHECKS} if fast_health_checks else {}
        head = {**self._size, "include_dashboard": False, **settings}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.nodes: list[Any] = [self._cluster.head_node]
        try:
            for _ in range(nodes - 1):
                self.add_node()
            # Everything explicit: a bare ray.init() would take whatever cluster the machine's address file names.
            ray.init(address=self.address, log_to_driver=False)
        except BaseException:
            self.shutdown()
            raise

    def add_node(self, **different: Any) -> Any:
        """One more node; `different` replaces sizes (`num_cpus=1`) or adds Ray's other node options."""
        node = self._cluster.add_node(**{**self._size, **different})
        self.nodes.append(node)
        return node

    def kill_node(self, node: Any) -> None:
        """End a node as a power cut would: its raylet and every worker on it, by SIGKILL, all at once."""
        self.kill_nodes([node])

    def kill_nodes(self, nodes: Sequence[Any]) -> None:
        """End several nodes at the same time."""
        doomed = list(nodes)
        pids = [pid for raylet in map(_raylet_pid, doomed) for pid in (raylet, *_descendants(raylet))]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in doomed:
            self.forget_node(node)

    def forget_node(self, node: Any) -> None:
        """Clear away what is left of a node that has died."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)  # reaps the raylet, ends its helpers

    def drain_node(self, node: Any, *, seconds: float = 60.0) -> None:
        """Tell Ray that a node will be preempted in so many seconds. It goes on working."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined] # the hidden `ray drain-node` uses it too
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "test", deadline)
        if not accepted:
            raise RuntimeError(f"Ray would not drain node {node.node_id}: {why}")

    def status(self, run_id: str) -> Status:
        """What a run is doing. Raises ValueError when there is no such run."""
        status: Status = ray.get(ray.get_actor(actor_name(run_id), namespace=NAMESPACE).status.remote(), timeout=30)
        return status

    def member(self, run_id: str, rank: int) -> Member:
        """Where a rank of a run is: node, address, process."""
        return self.status(run_id).members[rank]

    def kill_worker(self, run_id: str, rank: int) -> None:
        """End a rank's process with SIGKILL."""
        os.kill(self.member(run_id, rank).process.pid, signal.SIGKILL)

    def pause_worker(self, run_id: str, rank: int) -> int:
        """Stop a rank's process (SIGSTOP); returns its pid, to be continued with SIGCONT."""
        pid = self.member(run_id, rank).process.pid
        os.kill(pid, signal.SIGSTOP)
        return pid

    def shutdown(self) -> None:
        """End the cluster, and the driver's connection to it."""
        ray.shutdown()
        self._cluster.shutdown()

    def __enter__(self) -> LocalCluster:  # noqa: PYI034 - Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _raylet_pid(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def _descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            for child in map(int, file.read().split()):
                found += [child, *_descendants(child)]
    return found
