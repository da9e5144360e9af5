"""pdb for a process that has no terminal, and the terminal's end of it.

    python -m raylaunch.elastic.remote_pdb /tmp/raylaunch-debug-...  # on the process's machine

The debugger listens on a socket in a folder that only its user can enter.
"""

from __future__ import annotations

import contextlib
import os
import pdb  # noqa: T100 - this is the debugger
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from types import FrameType
from typing import IO, Any


def on_the_terminal(frame: FrameType) -> None:
    """Stop in this frame, with this process's own terminal."""
    pdb.Pdb().set_trace(frame)


def for_a_visitor(
    frame: FrameType, *, name: str, timeout: float, tell: Callable[[str], None], end: Callable[[], None]
) -> None:
    """Stop in this frame as soon as somebody attaches; go on when nobody does.

    Args:
        frame: where to stop.
        name: who stops, for the message.
        timeout: how long to wait for somebody, in seconds.
        tell: is told how to attach.
        end: is called when the program goes on.
    """
    folder = tempfile.mkdtemp(prefix="raylaunch-debug-")
    path = os.path.join(folder, "pdb")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(timeout)
            text = (
                f"{name} has stopped at {frame.f_code.co_filename}:{frame.f_lineno}; attach on {socket.gethostname()}"
                f" within {timeout:g} s: {sys.executable} -m raylaunch.elastic.remote_pdb {path}"
            )
            print(f"raylaunch: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the process's own log
            tell(text)
            connection, _ = listener.accept()
    except TimeoutError:
        print(f"raylaunch: nobody has attached; {name} goes on", file=sys.stderr, flush=True)  # noqa: T201
        end()
        return
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(folder)
    connection.settimeout(None)
    _VisitedPdb(connection, end).set_trace(frame)


class _VisitedPdb(pdb.Pdb):
    """pdb on a connection, which tells when it lets the program go."""

    def __init__(self, connection: socket.socket, end: Callable[[], None]) -> None:
        # Two, since one that is read and written forgets what it has read ahead.
        typed, shown = connection.makefile("r"), connection.makefile("w", buffering=1)
        super().__init__(stdin=typed, stdout=shown, nosigint=True)
        self.use_rawinput = False
        self.prompt = "(Pdb) "
        self._connection = connection
        self._streams: tuple[IO[str], ...] = (typed, shown)
        self._end = end

    def interaction(self, *where: Any) -> None:
        try:
            super().interaction(*where)
        except OSError:  # the terminal has gone
            self.set_quit()

    def set_continue(self) -> None:
        super().set_continue()
        if not self.breaks:
            self._let_go()

    def set_quit(self) -> None:
        """`q`: the program goes on, rather than end all ranks."""
        self.clear_all_breaks()
        self.set_continue()

    def _let_go(self) -> None:
        self._end()
        for stream in self._streams:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                stream.close()
        self._connection.close()


def attach(path: str) -> int:
    """Connect this terminal with a debugger, until that lets the program go."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except OSError as error:
            print(f"no debugger waits at {path}: {error}", file=sys.stderr)  # noqa: T201 - a command
            return 1

        def typed() -> None:
            with contextlib.suppress(OSError):
                for line in sys.stdin:
                    connection.sendall(line.encode())
                connection.shutdown(socket.SHUT_WR)

        threading.Thread(target=typed, daemon=True).start()
        while data := connection.recv(4096):
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(attach(sys.argv[1]) if len(sys.argv) == 2 else "usage: python -m raylaunch.elastic.remote_pdb PATH")
