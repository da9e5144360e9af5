"""How a proof starts its program: as a function by `raylaunch.run`, or as a script by `raylaunch run`."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_lines import CommandLine
from harness import Run, eventually

PROGRAMS = Path(__file__).parent / "programs"
#: How long a proof waits for anything, in seconds: the first time, DeepSpeed compiles for a minute.
PATIENCE_SECONDS = 240.0
#: The victim of a run that nobody disturbs.
NOBODY = -1


def train(program: str, folder: str) -> dict[str, Any]:
    """A program's own `train`. Imported by the worker: the test's process needs no framework."""
    return importlib.import_module(program).train(folder)


def world_size_of_accelerate() -> int:
    """How many processes Accelerate believes in."""
    from accelerate import Accelerator

    return Accelerator().num_processes


class AsFunction:
    """`raylaunch.run(train, num_workers=...)`, in the background."""

    def __init__(
        self, cluster: Any, program: str, folder: Path, ranks: int, env: dict[str, str], **arguments: Any
    ) -> None:
        self._cluster = cluster
        arguments = {
            "args": (program, str(folder)),
            "env": env,
            "num_workers": ranks,
            "max_restarts": 1,
            "spares": 0,  # each costs a core, and this is no race
            "log_dir": str(folder / "runs"),
            **arguments,
        }
        self.run = Run(cluster, train, arguments)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        self.run.wait_until(condition, what, seconds=PATIENCE_SECONDS)

    def kill(self, rank: int, pid: int) -> None:
        assert self._cluster.member(self.run, rank).process.pid == pid
        self._cluster.kill_worker(self.run, rank)

    def told(self) -> list[dict[str, Any]]:
        """What the ranks returned."""
        return list(self.run.result(PATIENCE_SECONDS))

    def end(self) -> None:
        eventually(self.run.done, f"run {self.run.id} is over")


class AsScript:
    """`raylaunch run --nproc-per-node N program.py`, a process of its own."""

    def __init__(
        self, cluster: Any, program: str, folder: Path, ranks: int, env: dict[str, str], **options: str
    ) -> None:
        given = {"nproc-per-node": ranks, "max-restarts": 1, "spares": 0, "log-dir": folder / "runs", **options}
        line = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        script = [str(PROGRAMS / f"{program}.py"), str(folder)]
        self._files = [folder / f"told-{rank}.json" for rank in range(ranks)]
        for file in self._files:
            file.unlink(missing_ok=True)  # an earlier run's
        self.line = CommandLine(cluster, folder, [*line, *script], **env)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        def there() -> bool:
            over = self.line.process.poll() is not None
            assert condition() or not over, f"it was over before there was {what}:\n{self.line.stderr}"
            return condition()

        eventually(there, what, PATIENCE_SECONDS)

    def kill(self, rank: int, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def told(self) -> list[dict[str, Any]]:
        """What the ranks wrote down."""
        exit_code = self.line.process.wait(PATIENCE_SECONDS)
        assert exit_code == 0, self.line.stderr
        return [json.loads(file.read_text()) for file in self._files]

    def end(self) -> None:
        self.line.end()
