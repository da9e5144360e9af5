"""raylaunch: `raylaunch.run`, or runs of a held `raylaunch.Launcher`. Options: `spares`, `isolation`; `held`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

import ray

import raylaunch
from benchmarks.peers import Order
from benchmarks.peers.cluster import cluster_for
from benchmarks.quiet import wait_until_quiet
from benchmarks.work import TASKS
from raylaunch.cluster.coordinator_actor import NAMESPACE, actor_name

RUN_ID = "bench"
#: How often it is asked for its spares, in seconds: rarely, since that costs it something.
LOOK_SECONDS = 0.3


def main(folder: str) -> Any:
    order = Order.load(folder)
    if "held" in order.options:
        return held(order)
    spares: Any = order.options["spares"]
    isolation: str = order.options.get("isolation", "actor")
    with cluster_for(order) as victim:
        if isolation == "process":  # it has nothing to get ready
            order.tell("armed", {"victim": victim, "pids": None})
        else:
            watch = threading.Thread(target=tell_when_armed, args=(order, spares != 0, victim), daemon=True)
            watch.start()
        order.tell("called", time.monotonic())
        return raylaunch.run(
            TASKS[order.task],
            args=(folder,),
            num_workers=order.workers if order.workers[0] < order.workers[1] else order.workers[1],
            max_restarts=order.restarts,
            spares=spares,
            isolation=isolation,
            run_id=RUN_ID,
            log_dir=folder,
        )


def held(order: Order) -> None:
    """Several runs of one launcher, each into a folder of its own; all but the first find warm processes."""
    with cluster_for(order), raylaunch.Launcher(num_workers=order.workers[1]) as launcher:
        for number in range(order.options["held"]):
            folder = os.path.join(order.folder, f"run-{number}")
            os.makedirs(folder)
            wait_until_warm(launcher.name, order.workers[1] if number else 0)
            order.tell(f"called-{number}", time.monotonic())
            launcher.run(TASKS[order.task], args=(folder,))


def wait_until_warm(run_id: str, processes: int) -> None:
    """Wait until so many warm processes are there for the next run."""
    while status_of(run_id).ready_spares < processes:
        time.sleep(LOOK_SECONDS)
    wait_until_quiet()


def tell_when_armed(order: Order, spares: bool, victim: int | None) -> None:
    """Say whose loss it is ready for: with as many warm spares as there are ranks, where it has any."""
    told: list[int] = []
    while True:
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(Exception):  # there is no coordinator yet, or no more
            status = status_of(RUN_ID)
            pids = sorted(member.process.pid for member in status.members.values())
            ready = status.phase == "running" and (not spares or status.ready_spares >= len(pids))
            if ready and pids != told:
                order.tell("armed", {"victim": victim, "pids": pids})
                told = pids


def status_of(run_id: str) -> Any:
    return ray.get(ray.get_actor(actor_name(run_id), namespace=NAMESPACE).status.remote(), timeout=10)


if __name__ == "__main__":
    main(sys.argv[1])
