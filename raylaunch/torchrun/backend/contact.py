"""An agent's side of the process between it and the rendezvous: starts it, reports, hears."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from raylaunch.coordinator.agent_messages import Answer, Connected, Lost

if TYPE_CHECKING:
    from raylaunch.coordinator.agent_messages import Report


#: How long the process may take to end once it has closed its end, in seconds.
EXIT_SECONDS = 5.0


class ContactLostError(Exception):
    """There is no contact to the rendezvous, and there will be none."""


class Contact:
    """A process of `raylaunch.cluster.rendezvous_contact`. Used by one thread, the agent's."""

    def __init__(self, address: str, job: str) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        # It finds what this process finds. Not as a file or with -m: Ray would put that file's folder on sys.path.
        module = "raylaunch.cluster.rendezvous_contact"
        program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno()), str(os.getpid()), address, job],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # Ctrl-C in a terminal doesn't reach it
            )

    def connected(self, timeout: float) -> str:
        """Wait until it has reached Ray; returns the address by which Ray knows this node."""
        message = self._receive(timeout)
        if message is None:
            self.end(0.0)
            raise ContactLostError(f"Ray was not reached within {timeout:g} s")
        assert isinstance(message, Connected), f"the first message is {message}"
        return message.host

    def send(self, report: Report) -> None:
        """Report."""
        try:
            self._connection.send(report)
        except OSError:
            raise self._lost() from None

    def answer(self, timeout: float | None = 0.0) -> Answer | None:
        """The next answer; None: there is none within so many seconds. Without a timeout it waits for one."""
        message = self._receive(timeout)
        assert not isinstance(message, Connected)
        return message

    def end(self, timeout: float) -> bool:
        """Close it; whether it ends in time. Otherwise it is killed."""
        until = time.monotonic() + timeout
        self._connection.close()
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        return True

    def _receive(self, timeout: float | None) -> Answer | Connected | None:
        try:
            if not self._connection.poll(timeout):
                return None
            message: Answer | Connected | Lost = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, Lost):
            raise ContactLostError(message.reason)
        return message

    def _lost(self) -> ContactLostError:
        """The process has closed its end."""
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll():
                message = self._connection.recv()
                if isinstance(message, Lost):
                    return ContactLostError(message.reason)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        code = self._process.returncode
        return ContactLostError(
            f"the process that keeps it has ended (exit code {code}), as it does when the Ray cluster is gone"
        )
