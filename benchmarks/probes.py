"""Clocks in raylaunch's own code, for `recovery_path.py`: nothing of raylaunch is changed for it.

Workers import this module because it is in `preload`; that sets their clocks. As a program it is the run that is
looked at: `python -m benchmarks.probes FOLDER`.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peers import Order, write

#: In a worker: what happened when, by `time.monotonic()`. In the driver: every (what, number of the event, when).
TIMES: dict[str, float] = {}
DRIVER: list[tuple[str, int, float]] = []


def ranks(folder: str) -> None:
    """train_fn: one all-reduce, the clocks' times, and then `work.idle`."""
    TIMES["train_fn called"] = time.monotonic()
    import torch
    import torch.distributed as dist

    from benchmarks.work import idle

    dist.all_reduce(torch.ones(1))
    TIMES["first all-reduce done"] = time.monotonic()
    write(os.path.join(folder, f"path-{os.getpid()}.json"), TIMES)
    idle(folder)


def clock(owner: Any, name: str, before: str = "", after: str = "") -> None:
    """Make a function note when it is called, and when it is done."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if before:
            TIMES[before] = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            if after:
                TIMES[after] = time.monotonic()

    setattr(owner, name, timed)


def set_clocks_in_worker() -> None:
    from raylaunch.cluster import worker_actor
    from raylaunch.worker import env, process_group

    clock(env, "rank_env", before="message arrived")
    clock(worker_actor, "unpack", after="function unpacked")
    clock(process_group, "join", after="process group formed")


def set_clocks_in_driver() -> None:
    from raylaunch.cluster.hands import Hands
    from raylaunch.journal import Journal

    def note(owner: Any, name: str, number: Callable[..., int]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(self: Any, *args: Any) -> Any:
            DRIVER.append((name, number(*args), time.monotonic()))
            return function(self, *args)

        setattr(owner, name, timed)

    note(Journal, "event", lambda seq, _event: int(seq))
    note(Journal, "decision", lambda seq, _decision: int(seq))
    note(Hands, "promote", lambda command: int(command.worker))


def main(folder: str) -> None:
    import raylaunch
    from benchmarks.peers.cluster import cluster_for
    from benchmarks.peers.with_raylaunch import RUN_ID, tell_when_armed

    order = Order.load(folder)
    set_clocks_in_driver()
    with cluster_for(order) as victim:
        threading.Thread(target=tell_when_armed, args=(order, True, victim), daemon=True).start()
        raylaunch.run(
            ranks,
            args=(folder,),
            num_workers=order.workers[1],
            max_restarts=order.restarts,
            preload=("torch", "benchmarks.probes"),
            run_id=RUN_ID,
            log_dir=folder,
        )
        order.tell("driver", DRIVER)


if __name__ == "__main__":
    # As the module that workers import, and not as __main__: its functions then go by name, and meet its clocks there.
    from benchmarks import probes  # noqa: PLW0406

    probes.main(sys.argv[1])
elif "ray" in sys.modules:
    set_clocks_in_worker()
