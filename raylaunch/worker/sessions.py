"""Sessions of processes: one for each rank of a command. Who is in one, and how whole ones are ended.

Used by the forker, in its loop: nothing here waits. Linux's /proc and the standard library only.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import PARENT, SESSION, STATE, Watch, start_time, stat_fields

#: How long a session may take to be gone after its SIGKILL, in seconds. What the kernel holds longer is given up.
KILLED_SECONDS = 10.0


@dataclass(eq=False)
class Session:
    """A rank's processes."""

    #: The rank's own process, a child of this one. Its pid is the session's number.
    leader: int
    generation: int
    #: Is told how the leader has ended: {"exit_code": ...} or {"signal": ...}.
    tell: Callable[[dict[str, int]], None]
    #: The leader's pidfd; -1 when it has ended.
    pidfd: int
    #: When what is left of it gets SIGKILL; None: nobody ends it.
    deadline: float | None = None
    killed: bool = False
    #: While it is being ended: its living processes, as they were found.
    watched: dict[Process, Watch] = field(default_factory=dict)


class Sessions:
    """The sessions that a process has started and not yet seen the end of."""

    def __init__(self, selector: selectors.BaseSelector, gone: Callable[[], None]) -> None:
        """Callbacks become the selector's `data`; `gone` is called after a whole session has gone."""
        self._selector = selector
        self._gone = gone
        self._sessions: set[Session] = set()
        self._to_look_at: set[Session] = set()

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, leader: int, generation: int, tell: Callable[[dict[str, int]], None]) -> Session:
        """A child of this process begins one."""
        session = Session(leader, generation, tell, os.pidfd_open(leader))
        self._sessions.add(session)
        self._selector.register(session.pidfd, selectors.EVENT_READ, lambda: self._ended(session))
        return session

    def end(self, session: Session, seconds: float) -> None:
        """Begin to end one, or end it sooner: SIGTERM to all of it, SIGKILL to what is left after so many seconds."""
        deadline = time.monotonic() + seconds
        if session.deadline is None or deadline < session.deadline:
            session.deadline = deadline
            self._to_look_at.add(session)

    def end_older(self, generation: int, seconds: float) -> bool:
        """End those of older generations; whether there are any."""
        older = [session for session in self._sessions if session.generation < generation]
        for session in older:
            self.end(session, seconds)
        return bool(older)

    def end_all(self, seconds: float) -> None:
        """End all of them."""
        for session in self._sessions:
            self.end(session, seconds)

    def go_on(self) -> float | None:
        """Do what is due; in how many seconds the next thing will be, at the latest (None: nothing is planned)."""
        if self._to_look_at:
            self._look()
            return 0.0
        now, next_one = time.monotonic(), math.inf
        for session in [session for session in self._sessions if session.deadline is not None]:
            assert session.deadline is not None
            given_up = session.deadline + KILLED_SECONDS
            if now >= given_up:
                self._is_gone(session)
                return 0.0
            if now >= session.deadline and not session.killed:
                session.killed = True
                for watch in session.watched.values():
                    watch.kill()
            next_one = min(next_one, given_up if session.killed else session.deadline)
        return None if next_one == math.inf else next_one - now

    def close(self) -> None:
        """In a fork: let go of everything, and touch nobody."""
        for session in self._sessions:
            for watch in session.watched.values():
                watch.close()
            if session.pidfd >= 0:
                os.close(session.pidfd)

    def _look(self) -> None:
        """See who is in the sessions that end. Everybody is asked once, and killed when the time is over."""
        sessions, self._to_look_at = self._to_look_at & self._sessions, set()
        found = members([session.leader for session in sessions])
        for session in sessions:
            living = found[session.leader]
            for process in living:
                if process not in session.watched:
                    self._watch(session, process)
            if not living:
                self._is_gone(session)

    def _watch(self, session: Session, process: Process) -> None:
        watch = Watch(process)
        if watch.fileno() < 0:  # gone meanwhile: whether others are left is seen by looking again
            self._to_look_at.add(session)
            return
        session.watched[process] = watch
        self._selector.register(watch.fileno(), selectors.EVENT_READ, lambda: self._member_gone(session, process))
        assert session.deadline is not None
        if time.monotonic() < session.deadline:
            watch.kill(signal.SIGTERM)
            watch.kill(signal.SIGCONT)  # a stopped process wouldn't hear it
        else:
            watch.kill()

    def _member_gone(self, session: Session, process: Process) -> None:
        watch = session.watched.pop(process)
        self._selector.unregister(watch.fileno())
        watch.close()
        if not session.watched:
            self._to_look_at.add(session)

    def _ended(self, session: Session) -> None:
        self._selector.unregister(session.pidfd)
        os.close(session.pidfd)
        session.pidfd = -1
        # Not reaped before its whole session is gone: until then nobody else can get its number.
        result = os.waitid(os.P_PID, session.leader, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is not None:  # otherwise the kernel holds it, and it was given up
            session.tell({"exit_code" if result.si_code == os.CLD_EXITED else "signal": result.si_status})

    def _is_gone(self, session: Session) -> None:
        """None of its processes is left, or the kernel doesn't let them go."""
        for process in list(session.watched):
            self._member_gone(session, process)
        if session.pidfd >= 0:
            self._ended(session)
        os.waitpid(session.leader, os.WNOHANG)
        self._sessions.discard(session)
        self._gone()


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
