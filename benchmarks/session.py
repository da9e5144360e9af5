"""One run of one peer: started, watched through the files that its ranks write, hurt, timed, ended, cleaned up.

It knows of no launcher. Whatever happens, `close` kills every process of the run: all of them carry a mark in their
environment, which children inherit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from benchmarks.peers import Order

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Not one of raylaunch's own variables, which it keeps from what it starts.
MARK = "BENCHMARK_SESSION"
#: How often the files are looked at, in seconds. The times are in the files, so this costs no accuracy.
LOOK_SECONDS = 0.05

T = TypeVar("T")


class Failed(Exception):  # noqa: N818 - a result, not an error of the benchmark
    """The peer did not do it; the text says what."""


class NoEnd(Failed):
    """The run was to end well, and didn't."""


@dataclass(frozen=True)
class Note:
    """What a rank wrote after its first all-reduce. See `benchmarks.work.note`."""

    rank: int
    world_size: int
    pid: int
    entered: float
    at: float


class Session:
    """One run of one peer. Use it in a `with`.

    Args:
        module: the peer's, `benchmarks.peers.with_...`.
        order: what it is to do.
        environ: variables of the environment that belong to the peer's settings.
    """

    def __init__(self, module: str, order: Order, environ: dict[str, str]) -> None:
        self.folder = order.folder
        self._mark = uuid.uuid4().hex
        os.makedirs(self.folder)
        order.save()
        # Ray's files, the one that names the machine's newest cluster included. Short: sockets' paths are bounded.
        self._ray_files = tempfile.mkdtemp(prefix="rlb-")
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, MARK: self._mark, "RAY_TMPDIR": self._ray_files}
        # Read when ray is imported: no late call, after the cluster's end, may look for another cluster to connect to.
        own["RAY_ENABLE_AUTO_CONNECT"] = "0"
        with open(os.path.join(self.folder, "output.txt"), "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, self.folder],
                env={**inherited, **own, **environ},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    # -- what it says ------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Any:
        """What is in `name`.json by now; None when there is no such file."""
        try:
            with open(os.path.join(self.folder, f"{name}.json"), encoding="ascii") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def wait_for(self, what: str, look: Callable[[], T | None], seconds: float) -> T:
        """Wait until `look` finds something. Raises `Failed` after so many seconds, or when the run has ended."""
        until = time.monotonic() + seconds
        while True:
            ended = self._process.poll()
            found = look()
            if found is not None:
                return found
            if ended is not None:
                raise Failed(f"{what}: it ended with code {ended} instead")
            if time.monotonic() > until:
                raise Failed(f"{what}: not within {seconds:g} s")
            time.sleep(LOOK_SECONDS)

    def group(self, size: int, after: float = 0.0, folder: str = "") -> list[Note] | None:
        """The ranks of a whole group of this size, all of whose first all-reduces were after that time."""
        newest: dict[int, Note] = {}
        for name in os.listdir(os.path.join(self.folder, folder)):
            if name.startswith("note-") and name.endswith(".json"):
                note = Note(**self.read(os.path.join(folder, name.removesuffix(".json"))))
                if note.world_size == size and note.at > max(after, newest[note.rank].at if note.rank in newest else 0):
                    newest[note.rank] = note
        return [newest[rank] for rank in sorted(newest)] if len(newest) == size else None

    def wait_for_group(self, what: str, size: int, seconds: float, after: float = 0.0) -> list[Note]:
        """Wait for such a group."""
        return self.wait_for(what, lambda: self.group(size, after), seconds)

    def wait_until_armed(self, group: list[Note], seconds: float) -> dict[str, Any]:
        """Wait until the peer says that it is ready for the loss of one of these ranks."""
        pids = sorted(note.pid for note in group)

        def look() -> dict[str, Any] | None:
            armed: dict[str, Any] | None = self.read("armed")
            return armed if armed and armed["pids"] in (None, pids) else None

        return self.wait_for("everything ready for a loss", look, seconds)

    # -- what is done to it ------------------------------------------------------------------------------------------

    def say(self, name: str) -> None:
        """Make the file that ranks look for, as `go` or `stop`."""
        open(os.path.join(self.folder, name), "w", encoding="ascii").close()

    def end(self, seconds: float) -> None:
        """Let the ranks return; the launcher must then leave with 0. Raises `NoEnd`."""
        self.say("stop")
        self.finish(seconds)

    def finish(self, seconds: float) -> None:
        """Wait until the launcher leaves with 0. Raises `NoEnd`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NoEnd(f"the end: not within {seconds:g} s") from None
        if code:
            raise NoEnd(f"the end: code {code}")

    def processes(self) -> dict[int, str]:
        """The run's processes: pid to command line."""
        wanted, found = f"{MARK}={self._mark}".encode(), {}
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):  # not a process, or one that has just ended
                if name.isdigit() and wanted in _contents(f"/proc/{name}/environ").split(b"\0"):
                    found[int(name)] = _contents(f"/proc/{name}/cmdline").replace(b"\0", b" ").decode(errors="replace")
        return found

    def close(self) -> None:
        """End every process of the run, and remove what Ray has written."""
        while found := self.processes():  # those that were just being started too
            kill(found)
            time.sleep(0.02)
        self._process.wait()
        shutil.rmtree(self._ray_files, ignore_errors=True)

    def __enter__(self) -> Session:  # noqa: PYI034 - Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kill(pids: Any) -> float:
    """SIGKILL to these processes; the time just before the first."""
    now = time.monotonic()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return now


def tree(pid: int) -> list[int]:
    """A process and every one below it, the parents first."""
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            for child in _contents(f"/proc/{pid}/task/{task}/children").split():
                found += tree(int(child))
    return found


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
