"""Ends all that was started in a LocalCluster, wherever it has gone, with the cluster or with the process that made it.

A program of its own, `python reaper.py MARK PID`, that a SIGKILL of that process doesn't reach. Ray 2.60 lets the
kernel end a cluster's own processes then, but its agents live on for a minute, and whatever a worker started in a
session of its own for ever. It imports nothing of raylaunch, to be up at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

#: In the environment of every process of a cluster, and of all that they start: whose they are.
MARK = "RAYLAUNCH_LOCAL_CLUSTER"
#: How long a process may take to end after SIGKILL, in seconds.
KILL_SECONDS = 10.0


def processes(mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Every process with this mark, and the environment that it was started with."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as file:
            environment = dict(entry.partition("=")[::2] for entry in file.read().split("\0"))
            if environment.get(MARK) == mark:
                yield pid, environment


def reap(mark: str) -> bool:
    """End them all; whether they have ended."""
    until = time.monotonic() + KILL_SECONDS
    while left := [pid for pid, _ in processes(mark)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def main() -> None:
    """Wait until stdin is closed or the process has ended, and reap; leaves with 1 if something does not end."""
    mark, pid = sys.argv[1], int(sys.argv[2])
    poller = select.poll()
    poller.register(0)
    with contextlib.suppress(ProcessLookupError):
        poller.register(os.pidfd_open(pid), select.POLLIN)
        poller.poll()
    sys.exit(0 if reap(mark) else 1)


if __name__ == "__main__":
    main()
