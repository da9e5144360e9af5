"""torch's elastic events: what a run comes to, told to the handler that the user has named (torch 2.13)."""

from __future__ import annotations

import json
import socket
import time
import traceback
from typing import TYPE_CHECKING, Any

from raylaunch.errors import ConfigError, RunFailedError
from raylaunch.torchrun.error_file import error_data
from raylaunch.torchrun.failure import process_exit_code

if TYPE_CHECKING:
    from raylaunch.result import RunResult
    from raylaunch.torchrun.plan import Plan

#: The handler that takes no notice: torch is not even imported for it.
NOBODY = "null"


class Reporter:
    """Tells one run's end.

    Raises `ConfigError` for a handler that torch doesn't know.
    """

    def __init__(self, asked: Plan) -> None:
        self._handler = asked.event_log_handler
        self._role = asked.command.role
        self._entry_point = asked.command.target
        self._run_id = asked.run_id or ""
        self._began = time.monotonic()
        if self._handler != NOBODY:
            from torch.distributed.elastic.events import get_logging_handler

            try:
                get_logging_handler(self._handler)
            except KeyError:
                raise ConfigError(f"--event-log-handler={self._handler}: torch has no such handler") from None

    def succeeded(self, result: RunResult) -> None:
        """Every rank has."""
        if self._handler == NOBODY:
            return
        self._run_id = result.run_id
        for rank in range(result.world_size):
            self._record("SUCCEEDED", rank=rank, world_size=result.world_size, restarts=result.restarts)
        self._record("SUCCEEDED", world_size=result.world_size, restarts=result.restarts)

    def failed(self, error: BaseException) -> None:
        """The ranks that failed have; or the launcher, by another error."""
        if self._handler == NOBODY:
            return
        if not isinstance(error, RunFailedError) or not error.failures:
            self._record("FAILED", raw_error="".join(traceback.format_exception(error)))
            return
        self._run_id = error.run_id
        for rank, failure in error.failures.items():
            raw = json.dumps(error_data(error, failure))
            code, pid, local = process_exit_code(failure), failure.pid, failure.local_rank
            self._record("FAILED", rank=rank, raw_error=raw, exit_code=code, worker_pid=pid, local_rank=local)
        self._record("SUCCEEDED")  # torch's agent has done its work, and says so

    def _record(self, state: str, *, rank: int | None = None, raw_error: str | None = None, **known: Any) -> None:
        from torch.distributed.elastic import events

        worker = {} if rank is None else {"role_rank": [rank], "role_world_size": [known.get("world_size")]}
        worker |= {key: [known[key]] for key in ("local_rank", "exit_code", "worker_pid") if key in known}
        metadata = {
            "run_id": self._run_id,
            "global_rank": rank,
            "group_rank": None,
            "worker_id": None if rank is None else str(known.get("worker_pid", "")),
            "role": self._role,
            "hostname": socket.gethostname(),
            "state": state,
            "total_run_time": int(time.monotonic() - self._began),
            "rdzv_backend": "ray",
            "raw_error": raw_error,
            "metadata": json.dumps({"group_world_size": None, "entry_point": self._entry_point, **worker}),
            "agent_restarts": known.get("restarts"),
            "duration_ms": None,
        }
        source = events.EventSource.AGENT if rank is None else events.EventSource.WORKER
        events.record(events.Event(f"torchelastic.worker.status.{state}", source, metadata=metadata), self._handler)
