"""Drivers in processes of their own: scripts as users write them, which a test watches, interrupts and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import LONGEST, eventually, journal_lines

#: What every script begins with. `gates` are files by which the script and its workers talk with the test.
PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
import raylaunch

gates, log_dir, run_id = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def wait_for(name):
    while not (gates / name).exists():
        time.sleep(0.01)

def say(name, text=""):
    (gates / f"{name}.part").write_text(str(text))
    (gates / f"{name}.part").rename(gates / name)  # whole, or not there
"""


class Driver:
    """A script that runs as a driver on a cluster, which it finds as scripts do: by RAY_ADDRESS."""

    def __init__(
        self,
        cluster: Any,
        folder: Path,
        script: str,
        *,
        name: str = "driver",
        arguments: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.cluster = cluster
        self.run_id = f"{name}-{os.getpid()}-{folder.name.replace('_', '-')}"[:60]
        self.gates = folder / name
        self.log_dir = folder / "runs"
        self.journal = self.log_dir / self.run_id / "journal.jsonl"
        self.gates.mkdir()
        path = self.gates / "script.py"
        path.write_text(PRELUDE + script)
        self._said = self.gates / "output.txt"
        with self._said.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(path), str(self.gates), str(self.log_dir), self.run_id, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": cluster.address, **environment},
            )

    def said(self) -> str:
        """What the driver has printed."""
        return self._said.read_text(errors="replace")

    def wait_for(self, name: str) -> str:
        """Wait until the script or a worker has written this file; returns its text."""
        path = self.gates / name

        def there() -> bool:
            assert path.exists() or self._process.poll() is None, f"the driver has ended:\n{self.said()}"
            return path.exists()

        eventually(there, f"{name} of {self.run_id}")
        return path.read_text()

    def wait_for_event(self, name: str) -> None:
        """Wait until the run's journal holds an event of this kind."""
        eventually(lambda: any(line.get("event") == name for line in journal_lines(self.journal)), name)

    def signal(self, number: signal.Signals) -> None:
        """Send the driver, and nobody else, a signal."""
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Let the script come to its end, and wait for it; returns its exit code."""
        self._process.stdin.close()
        return self._process.wait(LONGEST)

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()
