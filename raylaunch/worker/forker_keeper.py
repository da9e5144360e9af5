"""Sees to it that a node of a run of commands has a forker (`forker.py`). Used by the node's agent."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import Watch, end_process, wait_for_end
from raylaunch.worker.sessions import is_in_session_of

logger = logging.getLogger("raylaunch")

#: The name of the forker's socket in the run's directory.
SOCKET = "forker.sock"
#: A forker that died is started again after this pause, in seconds.
RESTART_SECONDS = 0.5
#: How long it may take to be gone after its last rank, in seconds.
END_SECONDS = 3.0
#: What it runs first. The package's folder is on the path for the forker's own imports only: what the ranks find there
#: is what a fresh interpreter would.
_BEGIN = "import sys; sys.path.insert(0, {path!r}); from raylaunch.worker import forker; forker.main()"


@dataclass(frozen=True)
class Settings:
    """What a forker is told when it starts. Goes over as JSON."""

    directory: str
    raylet: Process
    #: The run's `timeouts.stop`.
    stop_seconds: float
    #: The run's `timeouts.lease`: how long a forker may be stopped (SIGSTOP).
    lease: float
    preload: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Settings:
        """The settings, from JSON."""
        parts = json.loads(text)
        return cls(**{**parts, "raylet": Process(**parts["raylet"]), "preload": tuple(parts["preload"])})


def start_forker(settings: Settings, environ: Mapping[str, str]) -> tuple[Process, IO[bytes]]:
    """Start one, as nobody's child; it stays for as long as what is returned is open, and longer if it has ranks."""
    begin = _BEGIN.format(path=str(Path(__file__).parents[2]))
    starter = subprocess.Popen(
        [sys.executable, "-u", "-c", begin, json.dumps(asdict(settings))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env=dict(environ),
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter.stdout as said:
        words = said.readline().split()
    if starter.wait() or not words:
        starter.stdin.close()
        raise RuntimeError(f"the forker could not be started: exit code {starter.returncode}")
    pid, started = words
    return Process(int(pid), int(started)), starter.stdin


class ForkerKeeper:
    """Keeps a forker running until `end`, from a thread of its own."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._ending = False
        self._pipe: IO[bytes] | None = None
        self._forker: Process | None = None
        self._lock = threading.Lock()  # between a start and the end
        self._thread = threading.Thread(target=self._keep, name="raylaunch-forker", daemon=True)
        self._thread.start()

    def lives(self) -> bool:
        """Whether there is one now. One that is in its exit isn't: its forks die before it has ended."""
        if self._forker is None:
            return False
        with Watch(self._forker) as watch:
            return not watch.doomed()

    def ends(self, process: Process) -> bool:
        """Whether this is in a rank's session: then the forker ends it, when it has had its time after SIGTERM."""
        return self._forker is not None and self.lives() and is_in_session_of(process, self._forker.pid)

    def end(self, at_once: bool) -> None:
        """Have it end when its last rank has, which takes `stop_seconds` and a little; then see that it is gone."""
        with self._lock:
            self._ending = True
            if self._pipe is not None:
                self._pipe.close()
        if self._forker is not None:
            with Watch(self._forker) as watch:
                watch.kill(signal.SIGTERM)  # it listens to that for as long as it has no ranks: while it imports
        if not at_once:
            self._thread.join(self._settings.stop_seconds + END_SECONDS)
        if self._forker is not None:
            end_process(self._forker, END_SECONDS)

    def _keep(self) -> None:
        while True:
            with self._lock:
                if self._ending:
                    return
                try:
                    self._forker, self._pipe = start_forker(self._settings, self._environ)
                except (OSError, RuntimeError) as error:  # no more processes, a full disk: that may be over in a moment
                    logger.warning("%s; it is tried again", error)
                    self._pipe = None
            if self._forker is not None and self._pipe is not None:
                wait_for_end(self._forker, self._settings.lease)  # stopped, it would hear of no rank's end
                self._pipe.close()
            time.sleep(0 if self._ending else RESTART_SECONDS)
