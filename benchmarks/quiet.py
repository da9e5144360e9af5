"""Waiting until the machine has nothing else to do, before something is timed on it."""

from __future__ import annotations

import os
import time

#: The machine is quiet when its processors were busy for no more than this share of the time, twice in a row ...
BUSY_SHARE = 0.25
#: ... in windows of so many seconds.
WINDOW_SECONDS = 0.25
#: Other people's load may never end: this long, and then it is measured all the same. In seconds.
PATIENCE_SECONDS = 10.0


def wait_until_quiet() -> bool:
    """Wait until the machine is quiet; False when it never was."""
    until = time.monotonic() + PATIENCE_SECONDS
    calm, before = 0, _busy_seconds()
    while calm < 2:
        if time.monotonic() > until:
            return False
        time.sleep(WINDOW_SECONDS)
        now = _busy_seconds()
        calm = calm + 1 if now - before < BUSY_SHARE * WINDOW_SECONDS * (os.cpu_count() or 1) else 0
        before = now
    return True


def _busy_seconds() -> float:
    """Seconds of all processors together since boot that were neither idle nor waiting for a disk."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    idle, waiting = ticks[3], ticks[4]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")
