"""A seat whose ranks are forked: by the node's forker, as processes of their own. It lives in the node's agent.

What stands for its worker, and is watched and killed, is a small fork that holds the store which the group may use. It
becomes a rank by having one more process forked beside it: a command, or a function.

Its calls come one after the other, in a thread of its own; `stop`, `returned` and `hang_up` may come at any time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import string
from dataclasses import replace
from typing import Any

import ray

from raylaunch.cluster.faults import SeatLostError
from raylaunch.cluster.folders import log_root, make_rank_folder, no_logs
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.cluster.worker_words import Hello, Warm, memory_available, versions
from raylaunch.command import Command, Entry
from raylaunch.coordinator.commands import Assignment, Process
from raylaunch.errors import Ending, EndKind
from raylaunch.worker import env as worker_env
from raylaunch.worker.account import account_of
from raylaunch.worker.forked import Order
from raylaunch.worker.forker_client import ForkerClient, ForkerError, ForkerGoneError
from raylaunch.worker.function_rank import FunctionCall, Outcome, Value
from raylaunch.worker.numa import NoBinding, cpus_for
from raylaunch.worker.processes import last_words_path, own_memory, token_of

#: How long the node's forker may take to be there, in seconds. Its imports don't count: it listens before.
FORKER_SECONDS = 60.0


class ForkedSeat:
    """One worker, from the store that its generation may use to how its rank ended."""

    def __init__(self, worker: int, config: WorkerConfig, directory: str) -> None:
        assert config.command is not None, "ranks are forked"
        self._worker = worker
        self._config = config
        self._command = config.command
        self._directory = directory
        self._node = ray.get_runtime_context().get_node_id()
        self._host = ray.util.get_node_ip_address()
        self._client: ForkerClient | None = None
        self._over = False
        #: The rank's process, and whether it is known to have ended.
        self._pid = 0
        self._ended = False
        self._process = Process(0, 0)
        self._port = 0
        self._order: Order | None = None
        self._error_file = ""
        #: Where the rank leaves how its function ended.
        self._outcome_file = ""
        self._outcome = Outcome()

    def hello(self) -> Hello | Ending:
        """Have the store opened; which process it is that holds it."""
        try:
            self._client = ForkerClient(self._directory, FORKER_SECONDS)
        except ForkerError as error:
            return Ending(EndKind.TIMED_OUT, message=str(error))
        if self._over:  # meanwhile: there was nothing to hang up then
            self._client.hang_up()
        try:
            self._process, self._port = self._client.open_store(self._host)
        except ForkerGoneError as error:  # there will be another
            return Ending(EndKind.KILLED, message=str(error))
        except ForkerError as error:
            return Ending(EndKind.CANNOT_WORK, message=str(error), fatal=True)
        # By this file forks of its rank are found, and it is the place for its last words.
        last_words_path(self._directory, self._process).touch(0o600)
        return Hello(self._node, self._host, self._process, versions())

    def warm(self) -> Warm:
        """What a spare has to say: there is nothing to import any more."""
        return Warm(self._port, memory_available(), own_memory(self._process.pid))

    def answer(self) -> None:
        """Answer the roll call."""

    def join(self, assignment: Assignment, run: RunConfig, call: str) -> Ending | None:
        """See that everything is there that the rank needs. None, or what can't work; the rank joins by itself.

        `call`: where the function lies, if it is one.
        """
        config = self._config
        root = config.log_dir or log_root()
        try:
            files = make_rank_folder(root, run.run_id, assignment.generation, assignment.rank)
        except OSError as error:
            return self._cannot_work(no_logs(root, error))
        self._error_file = files.error
        cwd = self._command.cwd if os.path.isdir(self._command.cwd) else os.getcwd()
        env = self._env(assignment, run)
        missing = _missing(self._command, cwd, env)
        if missing:
            return self._cannot_work(missing)
        target, args = self._command.target, self._command.args
        if self._command.entry is Entry.FUNCTION:
            self._outcome_file = os.path.join(self._directory, f"outcome-{self._process.pid}.pickle")
            target, args = call, (self._call(assignment),)
        else:
            args = tuple(string.Template(arg).safe_substitute(local_rank=env["LOCAL_RANK"]) for arg in args)
        self._order = Order(
            generation=assignment.generation,
            entry=self._command.entry,
            target=target,
            args=args,
            cwd=cwd,
            env=env,
            stdout=files.stdout,
            stderr=files.stderr,
            fresh_interpreter=self._command.fresh_interpreter,
            mark=str(last_words_path(self._directory, self._process)),
            cpus=self._cpus(assignment, files.stderr),
        )
        return None

    def run(self) -> tuple[Ending, bytes | None]:
        """Run it, and wait for its end; how it was, and the pickled exception of a function, if there is one.

        Raises `SeatLostError` when the worker has been ended.
        """
        if self._client is None or self._order is None:
            return Ending(EndKind.KILLED, message="it never joined"), None
        try:
            self._pid = self._client.start(self._order)
            ending = self._end_of(self._client)
        except ForkerGoneError as error:
            raise SeatLostError(str(error)) from None
        except ForkerError as error:
            return Ending(EndKind.CANNOT_WORK, message=self._at_home(str(error))), None
        if ending is None:
            return Ending(EndKind.RETURNED, pid=self._pid), None
        self._ended = True
        return ending, self._outcome.exception

    def returned(self) -> None:
        """The rank's function has returned: `run` is over, and `collect` waits for the process's end."""
        if self._client is not None:
            self._client.returned()

    def collect(self) -> tuple[Any] | Ending:
        """What the function returned, wrapped, in a form that becomes the value on the driver. Commands have none.

        Or how its process failed after that, in an exit handler for one. Raises `SeatLostError` as `run` does.
        """
        if not self._ended and self._client is not None:
            try:
                ending = self._end_of(self._client)
            except ForkerError as error:
                raise SeatLostError(str(error)) from None
            if ending is not None and ending.kind is not EndKind.RETURNED:
                return ending
        value = self._outcome.value
        return (None if value is None else Value(value),)

    def _end_of(self, client: ForkerClient) -> Ending | None:
        """Wait for the end of the rank's process; how it was. None: its function has returned before."""
        assert self._order is not None
        ended = client.wait()
        if self._order.entry is Entry.FUNCTION and self._outcome.ending is None:
            self._outcome = Outcome.read(self._outcome_file)
        if ended is None:
            return None
        ending = replace(ended, pid=self._pid)
        if self._order.entry is Entry.FUNCTION:
            ending = self._outcome.ending_of(ending)
        return ending if ending.traceback else account_of(ending, self._error_file, self._order.stderr)

    def stop(self) -> None:
        """SIGTERM to the rank's whole session, and SIGKILL when its time is over."""
        if self._client is not None:
            self._client.stop()

    def hang_up(self) -> None:
        """End the connection, which ends whatever this seat has there, and every wait for an answer."""
        self._over = True
        if self._client is not None:
            self._client.hang_up()

    def close(self) -> None:
        """Let go: what is left of it is ended."""
        if self._client is not None:
            self._client.close()
        with contextlib.suppress(OSError):
            os.unlink(self._outcome_file)

    def _env(self, assignment: Assignment, run: RunConfig) -> dict[str, str]:
        config = self._config
        env = config.command_env(os.environ, self._host)
        env["RAYLAUNCH_TOKEN"] = token_of(config.token, self._process)
        env["RAYLAUNCH_AGENT"] = self._directory
        env["RAYLAUNCH_LEASE"] = str(config.lease)
        env.update(
            worker_env.rank_env(
                assignment,
                run_id=run.run_id,
                max_restarts=run.max_restarts,
                error_file=self._error_file,
                virtual_local_rank=config.virtual_local_rank,
                use_gpu=config.use_gpu,
                role=self._command.role,
                agent_store=True,
            )
        )
        return env

    def _call(self, assignment: Assignment) -> str:
        config = self._config
        return FunctionCall(
            worker=self._worker,
            assignment=assignment,
            code_path=config.code_path,
            backend=config.backend,
            use_gpu=config.use_gpu,
            virtual_local_rank=config.virtual_local_rank,
            process_group_seconds=config.process_group_seconds,
            outcome=self._outcome_file,
        ).to_json()

    def _cpus(self, assignment: Assignment, stderr: str) -> tuple[int, ...]:
        """What the rank is bound to; none if that can't be, which it is told."""
        if not self._command.numa_binding:
            return ()
        try:
            return _cpus(self._command.numa_binding, assignment, use_gpu=self._config.use_gpu)
        except NoBinding as why:
            where = f"({self._command.numa_binding}) on {socket.gethostname()}"
            with open(stderr, "a", encoding="utf-8") as file:
                file.write(f"raylaunch: no NUMA binding {where}: {why}\n")
            return ()

    def _cannot_work(self, reason: str) -> Ending:
        return Ending(EndKind.CANNOT_WORK, message=self._at_home(reason), fatal=True)

    def _at_home(self, reason: str) -> str:
        return f"on {socket.gethostname()} ({self._host}): {reason}"


def _cpus(mode: str, assignment: Assignment, *, use_gpu: bool) -> tuple[int, ...]:
    """What a rank is bound to. Raises `NoBinding`."""
    gpu = None
    if use_gpu:
        device = assignment.devices[assignment.own_devices[0]]
        if not device.isdigit():
            raise NoBinding(f"GPU {device} is a part of one")
        gpu = int(device)
    return tuple(
        cpus_for(
            mode,
            gpu=gpu,
            local_rank=assignment.local_rank,
            local_world_size=assignment.local_world_size,
            allowed=os.sched_getaffinity(0),
        )
    )


def _missing(command: Command, cwd: str, env: dict[str, str]) -> str:
    """What isn't there, in a sentence; "" when all is."""
    path = os.path.join(cwd, command.target)
    hint = "; it must be at the same path on every node, or be shipped by runtime_env's working_dir"
    if command.entry in (Entry.SCRIPT, Entry.RUN_PATH) and not os.path.exists(path):
        return f"there is no script {path}{hint}"
    if command.entry is Entry.PROGRAM:
        found = path if os.sep in command.target else shutil.which(command.target, path=env.get("PATH", os.defpath))
        if found is None or not os.access(found, os.X_OK):
            return f"there is no program {found or command.target} that can be executed{hint}"
    return ""
