"""What the pulses of 1,024 workers cost: a real coordinator actor of a run of that size, and real calls.

Some processes send as many pulses per second as the agents of 128 nodes would, each for its eight workers, at the
interval that the coordinator itself asks for; the kernel's account of the actor's processor time says what they cost.
What this leaves out is the upkeep of 128 connections. `bench.py` runs it, as one of its sessions.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import ray

from benchmarks.peers import Order
from benchmarks.peers.cluster import cluster_for
from benchmarks.session import tree
from raylaunch import Timeouts
from raylaunch.cluster.coordinator_actor import start_coordinator
from raylaunch.coordinator import commands as do
from raylaunch.coordinator import events as e
from raylaunch.spec import make_spec

WORKERS, PER_NODE = 1024, 8
CALLERS = 4
SECONDS = 12.0


@ray.remote(num_cpus=0)
class Caller:
    """Stands for its share of the nodes' agents."""

    def __init__(self, coordinator: Any, nodes: list[list[int]]) -> None:
        self._coordinator, self._nodes = coordinator, nodes

    def send(self, rate: float, seconds: float) -> int:
        """So many pulses per second, for so long, each awaited as agents do; how many there were."""
        started, sent = time.monotonic(), 0
        while time.monotonic() < started + seconds:
            ray.get(self._coordinator.pulse.remote(self._nodes[sent % len(self._nodes)]))
            sent += 1
            time.sleep(max(0.0, started + sent / rate - time.monotonic()))
        return sent


def main(folder: str) -> None:
    order = Order.load(folder)
    with cluster_for(order):
        coordinator = start_coordinator("pulse", Timeouts(), owns_job=True)
        workers = form(coordinator)
        nodes = [workers[n : n + PER_NODE] for n in range(0, WORKERS, PER_NODE)]
        interval = ray.get(coordinator.pulse.remote(nodes[0])).interval
        callers = [Caller.remote(coordinator, nodes[n::CALLERS]) for n in range(CALLERS)]  # type: ignore[attr-defined]
        ray.get([caller.send.remote(10.0, 1.0) for caller in callers])  # connections are made here
        (pid,) = [pid for pid in tree(os.getpid()) if command_of(pid).startswith("ray::CoordinatorActor")]
        used, started = processor_seconds(pid), time.monotonic()
        sent = sum(ray.get([caller.send.remote(len(nodes) / interval / CALLERS, SECONDS) for caller in callers]))
        used, lasted = processor_seconds(pid) - used, time.monotonic() - started
        share = used / sent * len(nodes) / interval
        found = {"share": share, "seconds_per_pulse": used / sent, "interval": interval, "rate": sent / lasted}
        order.tell("pulse", found)
        print(found)


def form(coordinator: Any) -> list[int]:
    """Tell the coordinator of a run of all these workers, each ready; their numbers."""
    seq = 0

    def tell(events: list[e.Event]) -> list[do.Command]:
        nonlocal seq
        decisions = ray.get(coordinator.handle.remote(seq + 1, events))
        seq += len(events)
        return [command for decision in decisions for command in decision.commands]

    now = time.monotonic()
    spec = make_spec(num_workers=WORKERS, spares=0)
    (group,) = [c for c in tell([e.RunRequested(now, spec)]) if isinstance(c, do.RequestBundles)]
    nodes = tuple(f"{index // PER_NODE:040x}" for index in range(WORKERS))
    starts = [c for c in tell([e.BundlesPlaced(now, group.group, nodes)]) if isinstance(c, do.StartWorker)]
    events: list[e.Event] = [
        e.WorkerStarted(now, c.worker, nodes[c.bundle], "10.0.0.1", 100 + c.worker, 1, {}) for c in starts
    ]
    tell(events)
    tell([e.WorkerReady(now, c.worker, 1234) for c in starts])
    return [c.worker for c in starts]


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        return file.read()


def processor_seconds(pid: int) -> float:
    """What a process has used of the processors, in seconds."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(sys.argv[1])
