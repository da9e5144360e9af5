"""What tests on a real cluster are made of: runs in the background, waiting for events, a look at what is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

#: Nothing in a story takes longer than this, in seconds; a bound, not an expectation.
LONGEST = 60.0


def eventually(condition: Callable[[], Any], what: str, seconds: float = LONGEST) -> Any:
    """Wait until `condition` gives something true, and return it."""
    until = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Run:
    """A run going on in a thread of the test, so that the test can hurt it."""

    def __init__(self, cluster: Any, log_dir: Path, train_fn: Callable[..., Any], **arguments: Any) -> None:
        import raylaunch

        self.cluster = cluster
        self.id = arguments.setdefault("run_id", f"t{os.getpid()}-{time.monotonic_ns() % 10**9}")
        self.journal = log_dir / self.id / "journal.jsonl"
        self._outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                self._outcome["result"] = raylaunch.run(train_fn, log_dir=str(log_dir), **arguments)
            except BaseException as error:
                self._outcome["error"] = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def running(self, generation: int = 1, *, spares: int = 0) -> Any:
        """Wait until a generation (or a later one) runs, with so many ready spares; returns the run's status."""

        def there() -> Any:
            if self._outcome:
                raise AssertionError(f"the run is over: {self._outcome}")
            with contextlib.suppress(Exception):
                status = self.cluster.status(self.id)
                if status.phase == "running" and status.generation >= generation and status.ready_spares >= spares:
                    return status
            return None

        return eventually(there, f"generation {generation} of run {self.id} runs")

    def result(self, seconds: float = LONGEST) -> Any:
        """The run's result; raises what it raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"run {self.id} is not over after {seconds} s"
        if "error" in self._outcome:
            raise self._outcome["error"]
        return self._outcome["result"]

    def error(self, seconds: float = LONGEST) -> Any:
        """What the run raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"run {self.id} is not over after {seconds} s"
        assert "error" in self._outcome, f"the run succeeded: {self._outcome}"
        return self._outcome["error"]

    def wait_for_event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until the journal holds so many events of one kind; returns the last."""
        return eventually(lambda: len(found := self.events(name)) >= count and found[-1], f"{name} in {self.journal}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's events of one kind."""
        return [line for line in journal_lines(self.journal) if line.get("event") == name]


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
