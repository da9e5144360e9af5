"""Sessions of processes: who is in one. Linux's /proc and the standard library only."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import PARENT, SESSION, STATE, start_time, stat_fields


def members(sessions: Collection[int]) -> dict[int, list[Process]]:
    """The living processes of each session, in one look at all processes.

    A session's number is its leader's pid. The caller sees to it that it still means that session: by not reaping the
    leader, for one.
    """
    found: dict[int, list[Process]] = {session: [] for session in sessions}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = stat_fields(int(entry.name))
        if fields and int(fields[SESSION]) in found and fields[STATE] not in (b"Z", b"X"):
            started = start_time(int(entry.name))
            if started is not None:
                found[int(fields[SESSION])].append(Process(int(entry.name), started))
    return found


def is_in_session_of(process: Process, parent: int) -> bool:
    """Whether a process is in a session whose leader, living or not yet reaped, is a child of `parent`."""
    fields = stat_fields(process.pid)
    leader = stat_fields(int(fields[SESSION])) if fields else []
    return bool(leader) and int(leader[PARENT]) == parent
