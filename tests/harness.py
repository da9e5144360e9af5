"""What tests on a real cluster are made of: runs in the background, waiting for events, a look at what is left."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from raylaunch.command import Command, Logs
from raylaunch.spec import make_spec
from raylaunch.testing import BackgroundRun
from raylaunch.testing.background_run import PATIENCE_SECONDS as LONGEST


def eventually(condition: Callable[[], Any], what: str, seconds: float = LONGEST) -> Any:
    """Wait until `condition` gives something true, and return it."""
    until = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Run(BackgroundRun):
    """A run in the background, with a look into its journal."""

    def wait_for_event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until the journal holds so many events of one kind; returns the last."""
        return eventually(lambda: len(found := self.events(name)) >= count and found[-1], f"{name} in {self.journal}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's events of one kind."""
        return [line for line in journal_lines(self.journal) if line.get("event") == name]


class CommandRun(Run):
    """The same of a command."""

    def __init__(self, cluster: Any, command: Command, arguments: dict[str, Any]) -> None:
        super().__init__(cluster, lambda: command, arguments)

    def _carry_out(self, train_fn: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        from raylaunch.cluster.session import Setup, launch_command

        env, logs = arguments.pop("env", None), arguments.pop("logs", Logs())
        setup = Setup(arguments.pop("preload", ("torch",)), env, (), None, arguments.pop("log_dir"))
        return launch_command(make_spec(**arguments), setup, train_fn(), logs)


def journal_lines(path: Path) -> list[dict[str, Any]]:
    """A journal's whole lines."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def leftovers(log_dir: Path) -> list[str]:
    """What runs have left behind: processes (by the pids in their journals, and by environment), actors, groups."""
    import ray
    from ray.util.placement_group import placement_group_table

    left = []
    for journal in log_dir.glob("*/journal.jsonl"):
        for line in journal_lines(journal):
            if line.get("event") == "WorkerStarted" and _same_process(line["pid"], line["pid_started"]):
                left.append(f"worker process {line['pid']}")
        wanted = re.compile(rf"^RAYLAUNCH_RUN_ID={re.escape(journal.parent.name)}(-\d+)?$")  # a launcher's runs too
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
                if any(map(wanted.match, environment)):
                    left.append(f"process {process.pid} with the run's environment: {process.cmdline()}")
    left += [str(actor) for actor in ray.util.list_named_actors(all_namespaces=True) if "raylaunch" in str(actor)]
    for info in placement_group_table().values():
        if info["name"].startswith("raylaunch:") and info["state"] != "REMOVED":
            left.append(f"placement group {info['name']} {info['state']}")
    return left


def nothing_is_left(log_dir: Path, seconds: float = 10.0, *, pids: Sequence[int] = (), port: int | None = None) -> None:
    """Of the runs whose journals lie there, of these processes, and on this port, nothing is left before long."""

    def left() -> list[str]:
        # A process that looks ended still has its sockets while its last thread is on its way out.
        others = [f"process {pid}" for pid in pids if runs(pid)] + ([f"port {port}"] if port and listens(port) else [])
        return leftovers(log_dir) + others

    until = time.monotonic() + seconds
    while (found := left()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not found, f"left after {seconds:g} s: {found}"


def listens(port: int) -> bool:
    """Whether anybody listens there."""
    connections = psutil.net_connections("tcp")
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)


def actor_pids(node: Any, name: str) -> list[int]:
    """The processes of the actors of this class on a node, by its raylet's children."""
    found = []
    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def _same_process(pid: int, started: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in ("Z", "X") and int(fields[19]) == started


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
