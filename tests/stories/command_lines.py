"""`raylaunch run` as a user starts it: a command line in a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import LONGEST, eventually

#: What every script begins with: each rank says something by writing a file, whole or not at all.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path

TORCH = "torch" in sys.modules
OUT = Path(os.environ["OUT"])
RANK = os.environ.get("RANK", "")

def say(name, what=None):
    part = OUT / f".{name}-{os.getpid()}"
    part.write_text(json.dumps(what))
    part.rename(OUT / name)

def wait_for(name):
    while not (OUT / name).exists():
        time.sleep(0.01)
"""


#: A script that says all that it sees.
SEES = """
say(f"sees-{RANK}", {"argv": sys.argv, "cwd": os.getcwd(), "name": __name__, "env": dict(os.environ), "torch": TORCH})
print("hello from", RANK)
"""


class CommandLine:
    """One command line on a cluster, which it finds by RAY_ADDRESS."""

    def __init__(
        self,
        cluster: Any,
        folder: Path,
        line: Sequence[str],
        *,
        module: Sequence[str] = ("raylaunch", "run"),
        start_new_session: bool = False,
        **env: str,
    ) -> None:
        self.out = folder / "out"
        self.out.mkdir(exist_ok=True)
        number = len(list(folder.glob("stdout-*")))
        self._stdout, self._stderr = folder / f"stdout-{number}.txt", folder / f"stderr-{number}.txt"
        surroundings = {**os.environ, "OUT": str(self.out)}
        surroundings.pop("RAY_ADDRESS", None)
        if cluster is not None:
            surroundings["RAY_ADDRESS"] = cluster.address
        surroundings.update(env)
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, *line],
                cwd=folder,
                stdout=stdout,
                stderr=stderr,
                env=surroundings,
                start_new_session=start_new_session,
            )

    def exit_code(self) -> int:
        """Wait for its end."""
        return self.process.wait(LONGEST)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has complained of."""
        return self._stderr.read_text(errors="replace")

    def wait_for(self, name: str) -> str:
        """Wait until a rank has said this; returns what."""
        path = self.out / name

        def there() -> bool:
            assert path.exists() or self.process.poll() is None, f"it has ended:\n{self.stdout}\n{self.stderr}"
            return path.exists()

        eventually(there, name)
        return path.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send the launcher, and nobody else, a signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()


def said(command: CommandLine, name: str) -> Any:
    """What a rank has said."""
    path = command.out / name
    assert path.exists(), f"{sorted(command.out.iterdir())}\n{command.stdout}\n{command.stderr}"
    return json.loads(path.read_text())
