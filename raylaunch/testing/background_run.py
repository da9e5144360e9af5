"""A run that goes on in the background, so that a test can hurt it. `LocalCluster.start_run` makes them."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raylaunch.api import run
from raylaunch.errors import ConfigError
from raylaunch.result import RunResult

if TYPE_CHECKING:
    from raylaunch.cluster.coordinator_actor import Status
    from raylaunch.testing.cluster import LocalCluster

T = TypeVar("T")

#: How long a test waits for anything, in seconds, unless it says otherwise: a bound, not an expectation.
PATIENCE_SECONDS = 60.0
#: How often it looks, in seconds.
LOOK_SECONDS = 0.02


class BackgroundRun:
    """One call of `raylaunch.run`, in a thread of the test's process.

    What it raises comes to light in `running`, `wait_until` and `result`: an argument that can't work too.

    Attributes:
        id: the run's id, a random one if `run_id` was not given.
        journal: path of its journal. A second run of the same id in the same `log_dir` has another: `result().journal`.
    """

    def __init__(self, cluster: LocalCluster, train_fn: Callable[..., Any], arguments: dict[str, Any]) -> None:
        arguments = {"run_id": f"test-{uuid.uuid4().hex[:8]}", **arguments}
        if "log_dir" not in arguments:
            arguments["log_dir"] = os.path.join(cluster.log_dir, "raylaunch")
        self.id: str = arguments["run_id"]
        self.journal = Path(str(arguments["log_dir"]), str(self.id), "journal.jsonl")
        self._cluster = cluster
        self._result: RunResult | None = None
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._result = self._carry_out(train_fn, arguments)
            except BaseException as error:  # also what a rank's SystemExit became: it belongs to the test
                self._error = error

        self._thread = threading.Thread(target=work, name=f"raylaunch-background-{self.id}", daemon=True)
        self._thread.start()

    def _carry_out(self, train_fn: Callable[..., Any], arguments: dict[str, Any]) -> RunResult:
        return run(train_fn, **arguments)

    def running(self, generation: int = 1, *, spares: int = 0, seconds: float = PATIENCE_SECONDS) -> Status:
        """Wait until a generation runs, this one or a later, and so many spares are ready; returns the run's status.

        Its `members`, by rank, say where each rank is: `node`, `host`, `process.pid`.

        Raises:
            AssertionError: the run was over before; its cause is what the run raised.
            TimeoutError: it took longer than `seconds`.
        """

        def there() -> Status | None:
            try:
                now = self._cluster.status(self)
            except (ConfigError, TimeoutError):  # its coordinator isn't there yet, or is being restarted
                return None
            ready = now.phase == "running" and now.generation >= generation and now.ready_spares >= spares
            return now if ready else None

        what = f"generation {generation} running" + (f" with {spares} ready spares" if spares else "")
        return self.wait_until(there, what, seconds=seconds)

    def wait_until(self, condition: Callable[[], T | None], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
        """Wait until `condition()` is true while the run goes on, and return what it gave. Raises as `running`.

        Args:
            condition: looked at some fifty times a second.
            what: what is waited for, in words, for the message of a failure: "a checkpoint".
            seconds: how long at most.
        """
        until = time.monotonic() + seconds
        while True:
            over = self.done()
            if found := condition():
                return found
            if over:
                raise AssertionError(
                    f"run {self.id} was over before there was {what}: {self._outcome()}"
                ) from self._error
            if time.monotonic() > until:
                raise TimeoutError(f"run {self.id}: no {what} within {seconds:g} s; {self._outcome()}")
            time.sleep(LOOK_SECONDS)

    def done(self) -> bool:
        """Whether the run is over."""
        return not self._thread.is_alive()

    def result(self, seconds: float = PATIENCE_SECONDS) -> RunResult:
        """Wait for the run's end, and return its result; raises what the run raised.

        Raises:
            TimeoutError: it took longer than `seconds`.
        """
        self._wait(seconds)
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a run that is over has a result or an error"
        return self._result

    def error(self, seconds: float = PATIENCE_SECONDS) -> Any:
        """Wait for the run's end, and return what it raised.

        Raises:
            AssertionError: it succeeded.
            TimeoutError: it took longer than `seconds`.
        """
        self._wait(seconds)
        assert self._error is not None, f"run {self.id} did not fail: {self._outcome()}"
        return self._error

    def _wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if not self.done():
            raise TimeoutError(f"run {self.id} is not over after {seconds:g} s; {self._outcome()}")

    def _outcome(self) -> str:
        """How it stands with the run, for a message."""
        if self._error is not None:
            return f"it raised {self._error!r}"
        if self._result is not None:
            return f"it returned {self._result!r}"
        try:
            now = self._cluster.status(self)
        except Exception as error:  # whatever it is, the message is about something else
            return f"its status is unknown ({error}); journal {self.journal}"
        return (
            f"it is in phase {now.phase!r} of generation {now.generation}, with ranks {sorted(now.members)} and"
            f" {now.ready_spares} ready spares; journal {self.journal}"
        )
