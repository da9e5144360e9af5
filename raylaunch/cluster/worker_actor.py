"""The worker actor: a seat's process. It starts as a spare; promoted, it calls its function as one rank, once.

Its methods are called one after the other on the process's main thread (a plain actor, Ray 2.60), so that signal
handlers and asyncio.run work in train_fn:

    hello -> warm -> (answer ...) -> join -> run -> collect

A side thread keeps up the pulse. How the function ended is a value, not a Ray error, so that nothing of it is lost.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import ray

from raylaunch.cluster.folders import last_words_directory
from raylaunch.cluster.function_payload import FunctionPayload
from raylaunch.cluster.pulse import WorkerPulse
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.cluster.worker_words import Hello, Warm, memory_available, versions
from raylaunch.coordinator.commands import Assignment, Process
from raylaunch.errors import Ending
from raylaunch.worker.processes import LastWords, end_process, start_time, token_of

#: A predecessor of the seat gets this long to be gone after its SIGKILL, in seconds, before the new process goes on.
PREDECESSOR_SECONDS = 10.0
#: ... and before that, this long to be ended by the node's agent, which sees how it ended.
PREDECESSOR_PATIENCE = 0.3


class WorkerActor:
    """One worker. See the module's text for the order of its calls."""

    def __init__(self, worker: int, config: WorkerConfig) -> None:
        self._config = config
        self._host = ray.util.get_node_ip_address()
        self._process = Process(os.getpid(), start_time(os.getpid()) or 0)
        os.environ.update(RAYLAUNCH_TOKEN=token_of(config.token, self._process), RAYLAUNCH_RUN_ID=config.name)
        sys.path += [path for path in config.code_path if path not in sys.path and os.path.isdir(path)]
        self._last_words = LastWords(last_words_directory(config.name))
        self._payload = FunctionPayload(config, self._host)
        self._last_words.leave_when_asked(self._payload.what_it_fails_with)
        self._pulse = WorkerPulse(worker, config.coordinator, config.lease, self._last_words)

    def hello(self) -> Hello:
        """Where this process is."""
        return Hello(ray.get_runtime_context().get_node_id(), self._host, self._process, versions())

    def warm(self, agent: Any, *, gently: bool) -> Warm | Ending:
        """Get ready to become a rank. From here on the node's agent speaks for this worker."""
        self._pulse.agent = agent
        port = self._payload.warm(gently=gently)
        return port if isinstance(port, Ending) else Warm(port, memory_available(), _memory_used())

    def answer(self) -> None:
        """Answer the roll call."""

    def join(self, assignment: Assignment, run: RunConfig) -> Ending | None:
        """Become a rank. None, or how it failed."""
        ending = threading.Thread(target=_end_predecessors, args=(assignment.predecessors,), daemon=True)
        ending.start()
        if self._config.use_gpu:
            ending.join()  # its memory must be free before this process allocates; on CPUs nothing waits
        return self._payload.join(assignment, run)

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def run(self) -> tuple[Ending, bytes | None]:
        """Call the function. How it ended, and the exception itself where there is one and it pickles."""
        return self._payload.run()

    def collect(self) -> tuple[Any]:
        """What it returned, wrapped: Ray 2.60 takes a generator for several values."""
        return (self._payload.collect(),)


def _end_predecessors(processes: tuple[Process, ...]) -> None:
    """See that the seat's earlier processes are gone, stopped ones too."""
    for process in processes:
        end_process(process, PREDECESSOR_SECONDS, patience=PREDECESSOR_PATIENCE)


def _memory_used() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
