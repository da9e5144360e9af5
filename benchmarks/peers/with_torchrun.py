"""torchrun, on one node as `torchrun --standalone`, on two as two agents of an elastic rendezvous. No Ray.

Its defaults, `--monitor-interval` (0.1 s) included. On two nodes its waits for lost agents are made shorter by its own
`--rdzv-conf`: else they alone would take longer than the benchmark has patience for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from benchmarks.peers import Order
from benchmarks.quiet import wait_until_quiet

SHORT_WAITS = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"


def main(folder: str) -> int:
    order = Order.load(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={order.restarts}"]
    torchrun.append(f"--nproc-per-node={order.per_node}")
    work = ["-m", "benchmarks.work", folder, order.task]
    wait_until_quiet()
    if order.nodes == 1:
        order.tell("armed", {"victim": None, "pids": None})
        order.tell("called", time.monotonic())
        if "elastic" in order.options:
            return only_ends(order)
        os.execv(sys.executable, [*torchrun, "--standalone", *work])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun += [f"--nnodes=1:{order.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench"]
    torchrun += [f"--rdzv-conf={SHORT_WAITS}", "--local-addr=127.0.0.1", *work]
    order.tell("called", time.monotonic())
    first, second = (subprocess.Popen(torchrun) for _ in range(2))  # the first hosts the rendezvous's store
    order.tell("armed", {"victim": second.pid, "pids": None})
    second.wait()
    return first.wait()


def only_ends(order: Order) -> int:
    """One of up to two nodes, whose program has nothing to do."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    code = subprocess.call([*line, "--rdzv-endpoint=127.0.0.1:0", "--no-python", "true"])
    order.tell("ended", time.monotonic())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
