"""Sessions of processes: who is in one, and how a whole one is ended. Linux's /proc and the standard library only."""

from __future__ import annotations

import contextlib
import select
import signal
import time
from pathlib import Path

from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import SESSION, STATE, Watch, start_time, stat_fields

#: How long a session may take to be gone after its SIGKILL, in seconds: a process that the kernel holds stays longer.
KILLED_SECONDS = 10.0
#: How long to wait before looking who else is in the session now, in seconds.
LOOK_SECONDS = 0.5


def members(session: int) -> list[Process]:
    """The living processes of a session. Its number is its leader's pid, which nobody else gets while it lasts."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = stat_fields(int(entry.name))
        if fields and int(fields[SESSION]) == session and fields[STATE] not in (b"Z", b"X"):
            started = start_time(int(entry.name))
            if started is not None:
                found.append(Process(int(entry.name), started))
    return found


def end_session(session: int, seconds: float) -> bool:
    """SIGTERM to all of a session, SIGKILL to what is left of it after so many seconds; whether all of it is gone.

    The caller sees to it that the number still means this session: by not reaping the leader, for one.
    """
    asked: set[Process] = set()
    patience = time.monotonic() + seconds
    while found := members(session):
        now = time.monotonic()
        if now >= patience + KILLED_SECONDS:
            return False
        with contextlib.ExitStack() as held:
            poller = select.poll()
            for process in found:
                watch = held.enter_context(Watch(process))
                if now >= patience:
                    watch.kill()
                elif process not in asked:
                    watch.kill(signal.SIGTERM)
                    asked.add(process)
                if watch.fileno() >= 0:
                    poller.register(watch.fileno(), select.POLLIN)
            left = patience - now if now < patience else LOOK_SECONDS
            poller.poll(min(left, LOOK_SECONDS) * 1000)
    return True


def signal_session(session: int, number: int) -> None:
    """A signal to all of a session that is there now."""
    for process in members(session):
        with contextlib.suppress(OSError), Watch(process) as watch:
            watch.kill(signal.Signals(number))
