"""One run on its way: what is asked for, and the future of what it comes to."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import ray.cloudpickle

from raylaunch.cluster.worker_config import RunConfig
from raylaunch.coordinator.commands import Finish, Outcome
from raylaunch.errors import PlacementTimeout, RunFailedError, run_failed
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec


@dataclass(frozen=True, eq=False)
class Run:
    """One run, from its request until its future has a result or an error."""

    spec: RunSpec
    config: RunConfig
    #: The journal's path.
    journal: str
    future: Future[RunResult] = field(default_factory=Future)

    def finish(self, finish: Finish, values: Sequence[Any], exception: bytes | None, shortage: str) -> None:
        """It has ended: with these values by rank, or with the culprit's pickled exception."""
        with contextlib.suppress(InvalidStateError):  # the launcher has failed meanwhile
            if finish.outcome is Outcome.SUCCEEDED:
                self.future.set_result(self._result(finish, values))
            else:
                self.future.set_exception(self._error(finish, exception, shortage))

    def fail(self, error: BaseException) -> None:
        """It can't end by itself any more, nor begin."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def _result(self, finish: Finish, values: Sequence[Any]) -> RunResult:
        return RunResult(
            values=tuple(values),
            run_id=self.spec.run_id,
            world_size=finish.world_size,
            generation=finish.generation,
            restarts=finish.restarts,
            journal=self.journal,
            recoveries=finish.recoveries,
        )

    def _error(self, finish: Finish, exception: bytes | None, shortage: str) -> RunFailedError:
        failures = {failure.rank: failure for failure in finish.failures if failure.rank is not None}
        message = f"{finish.reason}\n{shortage}" if shortage else finish.reason
        kind = PlacementTimeout if finish.outcome is Outcome.NO_ROOM else RunFailedError
        error = kind(message, finish.root_cause, failures, self.spec.run_id, self.journal)
        return run_failed(error, _load_exception(exception))


def _load_exception(pickled: bytes | None) -> BaseException | None:
    if pickled is None:
        return None
    try:
        loaded = ray.cloudpickle.loads(pickled)
    except (Exception, SystemExit):  # its class isn't importable in the driver
        return None
    return loaded if isinstance(loaded, BaseException) else None
