"""The worker actor: a seat's process. It starts as a spare; promoted, it runs its payload as one rank, once.

Its methods are called one after the other on the process's main thread (a plain actor, Ray 2.60), so that signal
handlers and asyncio.run work in train_fn:

    hello -> warm -> (answer ...) -> join -> run -> collect

A side thread sends the pulse. How the payload ended is a value, not a Ray error, so that nothing of it is lost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn, Protocol

import ray

from raylaunch.cluster.command_payload import CommandPayload
from raylaunch.cluster.folders import last_words_directory
from raylaunch.cluster.function_payload import FunctionPayload
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.coordinator.commands import Assignment, Process
from raylaunch.errors import Ending
from raylaunch.version import __version__
from raylaunch.worker.processes import REPLACED, LastWords, end_process, start_time, token_of

#: A predecessor of the seat gets this long to be gone after its SIGKILL, in seconds, before the new process goes on.
PREDECESSOR_SECONDS = 10.0
#: ... and before that, this long to be ended by the node's agent, which sees how it ended.
PREDECESSOR_PATIENCE = 0.3


@dataclass(frozen=True)
class Hello:
    """A worker's first words."""

    node: str
    host: str
    process: Process
    versions: dict[str, str]


@dataclass(frozen=True)
class Warm:
    """A spare is ready. Memory in bytes."""

    port: int
    memory_available: int
    memory_used: int


class Payload(Protocol):
    """What a seat runs: a function (`function_payload`) or a command (`command_payload`). Called in this order."""

    def warm(self, *, gently: bool) -> int | Ending:
        """Get ready to become a rank; the port of a store that the group may use, or what can't work."""

    def join(self, assignment: Assignment, run: RunConfig) -> Ending | None:
        """Become a rank. None, or how it failed."""

    def run(self) -> tuple[Ending, bytes | None]:
        """Run it. How it ended, and the pickled exception if there is one."""

    def collect(self) -> Any:
        """The value that it returned; what nobody may see before, such as leaving the group, is done now."""

    def what_it_fails_with(self) -> Ending | None:
        """What only this rank can tell peers that lost it. Called in a thread, while `run` goes on."""


class WorkerActor:
    """One worker. See the module's text for the order of its calls."""

    def __init__(self, worker: int, config: WorkerConfig) -> None:
        self._config = config
        self._host = ray.util.get_node_ip_address()
        self._process = Process(os.getpid(), start_time(os.getpid()) or 0)
        os.environ.update(RAYLAUNCH_TOKEN=token_of(config.token, self._process), RAYLAUNCH_RUN_ID=config.name)
        sys.path += [path for path in config.code_path if path not in sys.path and os.path.isdir(path)]
        self._last_words = LastWords(last_words_directory(config.name))
        self._payload: Payload
        if config.command is None:
            self._payload = FunctionPayload(config, self._host)
        else:
            self._payload = CommandPayload(config, config.command, self._host, self._last_words)
        self._last_words.leave_when_asked(self._payload.what_it_fails_with)
        arguments = (worker, config, self._last_words)
        threading.Thread(target=_pulse, args=arguments, name="raylaunch-pulse", daemon=True).start()

    def hello(self) -> Hello:
        """Where this process is."""
        return Hello(ray.get_runtime_context().get_node_id(), self._host, self._process, versions())

    def warm(self, *, gently: bool) -> Warm | Ending:
        """Get ready to become a rank."""
        port = self._payload.warm(gently=gently)
        return port if isinstance(port, Ending) else Warm(port, _memory_available(), _memory_used())

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
        """Run the payload. How it ended, and the exception itself where there is one and it pickles."""
        return self._payload.run()

    def collect(self) -> tuple[Any]:
        """What it returned, wrapped: Ray 2.60 takes a generator for several values."""
        return (self._payload.collect(),)


def versions() -> dict[str, str]:
    """What has to be the same on the driver and on every node. Read without importing torch."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    found["raylaunch"] = __version__
    for name in ("torch", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _end_predecessors(processes: tuple[Process, ...]) -> None:
    """See that the seat's earlier processes are gone, stopped ones too."""
    for process in processes:
        end_process(process, PREDECESSOR_SECONDS, patience=PREDECESSOR_PATIENCE)


def _pulse(worker: int, config: WorkerConfig, last_words: LastWords) -> None:
    """Tell the coordinator that this worker lives; end the process when it has been replaced, or its lease is over.

    A process that was stopped, or a long hold of the GIL, makes the lease look over: so one more try comes first.
    """
    contact, interval = time.monotonic(), 1.0
    while True:
        over = time.monotonic() - contact > config.lease
        try:
            reply = ray.get(config.coordinator.pulse.remote(worker), timeout=min(5.0, config.lease / 2))
            if reply.ended:
                _end(last_words, REPLACED)
            contact, interval = time.monotonic(), reply.interval
        except Exception:  # restarting, unreachable or gone: the lease tells which
            if over:
                _end(last_words, f"its lease of {config.lease:g} s without contact to the coordinator is over")
        time.sleep(interval)


def _end(last_words: LastWords, reason: str) -> NoReturn:
    print(f"raylaunch: this worker ends itself: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - its own log
    last_words.exit(1, reason)


def _memory_available() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def _memory_used() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
