"""A seat's payload that is a command: the node's forker runs it as a process of its own, and the worker waits for it.

The worker itself needs no torch: the forker holds its store too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import string
from dataclasses import replace

from raylaunch.cluster.folders import last_words_directory, log_root, rank_folder
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.command import Command, Entry
from raylaunch.coordinator.commands import Assignment
from raylaunch.errors import Ending, EndKind
from raylaunch.worker import env as worker_env
from raylaunch.worker.account import account_of
from raylaunch.worker.forked import Order
from raylaunch.worker.forker_client import ForkerClient, ForkerError
from raylaunch.worker.numa import NoBinding, cpus_for
from raylaunch.worker.processes import LastWords

#: How long the node's forker may take to be there, in seconds. Its imports don't count: it listens before.
FORKER_SECONDS = 60.0


class CommandPayload:
    """One rank's command, from the store that its generation may use to how it ended."""

    def __init__(self, config: WorkerConfig, command: Command, host: str, last_words: LastWords) -> None:
        self._config = config
        self._command = command
        self._host = host
        self._last_words = last_words
        self._forker: ForkerClient | None = None
        self._order: Order | None = None
        self._error_file = ""

    def warm(self, *, gently: bool) -> int | Ending:  # noqa: ARG002 - there is nothing to import
        """Have the store opened that the group may use; its port."""
        directory = last_words_directory(self._config.name)
        try:
            self._forker = ForkerClient(directory, FORKER_SECONDS, self._forker_lost)
        except ForkerError as error:
            return Ending(EndKind.TIMED_OUT, message=str(error))
        try:
            return self._forker.open_store(self._host)
        except ForkerError as error:
            return Ending(EndKind.CANNOT_WORK, message=str(error), fatal=True)

    def join(self, assignment: Assignment, run: RunConfig) -> Ending | None:
        """See that everything is there that the rank needs. None, or what can't work; the command joins by itself."""
        config, command = self._config, self._command
        folder = rank_folder(config.log_dir or log_root(), run.run_id, assignment.generation, assignment.rank)
        stdout, stderr, self._error_file = (
            os.path.join(folder, name) for name in ("stdout.log", "stderr.log", "error.json")
        )
        try:
            os.makedirs(folder, exist_ok=True)
            for path in (stdout, stderr, self._error_file):  # of an earlier run of the same name
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        except OSError as error:
            return self._cannot_work(f"its logs can't be written to {folder}: {error.strerror}")
        env = config.command_env(os.environ, self._host)
        env["RAYLAUNCH_TOKEN"] = os.environ["RAYLAUNCH_TOKEN"]
        env.update(
            worker_env.rank_env(
                assignment,
                run_id=run.run_id,
                max_restarts=run.max_restarts,
                error_file=self._error_file,
                virtual_local_rank=config.virtual_local_rank,
                use_gpu=config.use_gpu,
                role=command.role,
                agent_store=True,
            )
        )
        cwd = command.cwd if os.path.isdir(command.cwd) else os.getcwd()
        missing = _missing(command, cwd, env)
        if missing:
            return self._cannot_work(missing)
        cpus: tuple[int, ...] = ()
        if command.numa_binding:
            try:
                cpus = _cpus(command.numa_binding, assignment, use_gpu=config.use_gpu)
            except NoBinding as why:
                with open(stderr, "a", encoding="utf-8") as file:
                    file.write(
                        f"raylaunch: no NUMA binding ({command.numa_binding}) on {socket.gethostname()}: {why}\n"
                    )
        self._order = Order(
            generation=assignment.generation,
            entry=command.entry,
            target=command.target,
            args=tuple(string.Template(arg).safe_substitute(local_rank=env["LOCAL_RANK"]) for arg in command.args),
            cwd=cwd,
            env=env,
            stdout=stdout,
            stderr=stderr,
            fresh_interpreter=command.fresh_interpreter,
            mark=str(self._last_words.path),
            cpus=cpus,
        )
        return None

    def run(self) -> tuple[Ending, None]:
        """Run the command, and wait for its end."""
        if self._forker is None or self._order is None:
            return Ending(EndKind.KILLED, message="it never joined"), None
        forker = self._forker
        signal.signal(signal.SIGTERM, lambda _number, _frame: forker.stop())
        try:
            pid = forker.start(self._order)
        except ForkerError as error:  # it could not fork
            return Ending(EndKind.KILLED, message=str(error)), None
        ending = replace(forker.wait(), pid=pid)
        return account_of(ending, self._error_file, self._order.stderr), None

    def collect(self) -> None:
        """A command has no value."""

    def what_it_fails_with(self) -> Ending | None:
        """Nothing that the command's end wouldn't tell."""
        return None

    def _cannot_work(self, reason: str) -> Ending:
        where = f"on {socket.gethostname()} ({self._host})"
        return Ending(EndKind.CANNOT_WORK, message=f"{where}: {reason}", fatal=True)

    def _forker_lost(self) -> None:
        self._last_words.exit(1, "the process that forks this node's ranks is gone")


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
