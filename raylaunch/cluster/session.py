"""From a validated spec to results: connects to Ray, starts coordinator and shell, ships functions, waits.

The library uses the Ray session that is there or connects with a bare `ray.init()`; it never shuts one down.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import ray
from ray.runtime_env import RuntimeEnv
from ray.util.placement_group import validate_placement_group

from raylaunch.cluster.coordinator_actor import start_coordinator
from raylaunch.cluster.folders import log_root
from raylaunch.cluster.run import Run
from raylaunch.cluster.shell import Shell
from raylaunch.cluster.shipping import Packed, pack
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.cluster.worker_words import versions
from raylaunch.command import Command, Entry, Logs
from raylaunch.errors import ConfigError
from raylaunch.journal import Journal
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec
from raylaunch.worker.env import check_env, copied_env
from raylaunch.worker.payload import check_call

logger = logging.getLogger("raylaunch")

#: After the time that workers have for stopping: how long the rest of a stop may take, in seconds.
STOP_SLACK_SECONDS = 20.0
ISOLATIONS = ("actor", "process")
#: How long a run may take to end when it is interrupted for the second time, in seconds.
AT_ONCE_SECONDS = 5.0


@dataclass(frozen=True)
class Setup:
    """What the workers are given besides their seats, and where the journal goes. As the user said it."""

    preload: Sequence[str]
    env: Mapping[str, str] | None
    copy_env: Sequence[str]
    runtime_env: Mapping[str, Any] | None
    log_dir: str | os.PathLike[str] | None
    #: Where a function is called: in a worker "actor", or in a "process" of its own, whose output `logs` describes.
    isolation: str = "actor"

    def check(self) -> None:
        """Refuse what can't work, before anything is started. Raises `ConfigError`."""
        check_env("env", {} if self.env is None else self.env)
        for name, items, example in (("copy_env", self.copy_env, "MY_*"), ("preload", self.preload, "torch")):
            if not isinstance(items, (tuple, list)) or not all(isinstance(item, str) and item for item in items):
                raise ConfigError(
                    f"{name}={items!r}: must be a tuple of strings (none of them empty), as ({example!r},)"
                )
        if self.isolation not in ISOLATIONS:
            raise ConfigError(f"isolation={self.isolation!r}: must be {' or '.join(map(repr, ISOLATIONS))}")
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise ConfigError(f"runtime_env={self.runtime_env!r}: must be a dictionary, as Ray's runtime_env")
        if self.log_dir is not None and not isinstance(self.log_dir, (str, os.PathLike)):
            raise ConfigError(f"log_dir={self.log_dir!r}: must be a path")
        if "\0" in str(self.log_dir):
            raise ConfigError(f"log_dir={self.log_dir!r}: the operating system allows no zero byte")


@dataclass(frozen=True)
class Job:
    """What a run calls. As the user said it."""

    train_fn: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None
    no_retry: Sequence[type[BaseException]]

    def pack(self) -> Packed:
        """It is ready for the object store. Refuses what can't work, before anything is started: `ConfigError`."""
        check_call(self.train_fn, self.args, self.kwargs)
        types = self.no_retry if isinstance(self.no_retry, (tuple, list)) else [None]
        if not all(isinstance(item, type) and issubclass(item, BaseException) for item in types):
            raise ConfigError(f"no_retry={self.no_retry!r}: must be a tuple of exception types, as (ValueError,)")
        return pack(self.train_fn, self.args, self.kwargs, tuple(self.no_retry))


def launch(
    spec: RunSpec, setup: Setup, job: Job, *, command: Command | None = None, logs: Logs | None = None
) -> RunResult:
    """Carry a single run out. See `raylaunch.run` for what it raises.

    `command`: of `Entry.FUNCTION`, where the function's processes have properties of a command's.
    """
    setup.check()
    packed = job.pack()
    with Session(spec, setup, held=False, command=command, logs=logs) as session:
        return session.result(session.request(packed, spec.run_id, spec.max_restarts))


def launch_command(spec: RunSpec, setup: Setup, command: Command, logs: Logs) -> RunResult:
    """Carry a single run of a command out; each rank's value is None. See `raylaunch.run` for what it raises.

    Commands get the driver's whole environment, but for what belongs to it alone, whatever `setup.copy_env` says; over
    that comes what runtime_env sets, and over that `setup.env`. They form their process group themselves.
    """
    setup.check()
    runtime_env = dict(setup.runtime_env or {})
    env = {**runtime_env.get("env_vars", {}), **(setup.env or {})}
    if "working_dir" in runtime_env:  # that is where they run
        command = replace(command, cwd="")
    setup = replace(setup, env=env, copy_env=("*",))
    with Session(replace(spec, backend=None), setup, held=False, command=command, logs=logs) as session:
        return session.result(session.request(None, spec.run_id, spec.max_restarts))


class Session:
    """A shell and its coordinator, and the runs that are made with them: one; or, `held`, a launcher's.

    A context manager: leaving it releases everything that the session has in the cluster. Raises `ConfigError` for what
    only Ray can say can't work.
    """

    def __init__(
        self,
        spec: RunSpec,
        setup: Setup,
        *,
        held: bool,
        command: Command | None = None,
        logs: Logs | None = None,
    ) -> None:
        connect()
        check_with_ray(spec, setup)
        if command is None and setup.isolation == "process":
            command = Command(Entry.FUNCTION, "")
        if command is not None and spec.spares < 0:
            spec = replace(spec, spares=0)  # a seat costs a fork: nothing is gained by having it before
        self._spec = spec = replace(spec, versions=versions())
        in_ray_worker = ray.get_runtime_context().worker.mode == ray.WORKER_MODE
        environ = dict(os.environ)
        if in_ray_worker:
            environ.pop("OMP_NUM_THREADS", None)  # Ray's own, for this task or actor
        coordinator = start_coordinator(spec.run_id, spec.timeouts, owns_job=not in_ray_worker)
        config = WorkerConfig(
            name=spec.run_id,
            token=uuid.uuid4().hex,
            coordinator=coordinator,
            code_path=_code_path(),
            copied_env=copied_env(environ, tuple(setup.copy_env)),
            env=dict(setup.env or {}),
            preload=tuple(setup.preload),
            cpus_per_worker=spec.resources_per_worker.get("CPU", 1.0),
            use_gpu=bool(spec.gpus_per_worker),
            virtual_local_rank=spec.virtual_local_rank,
            backend=spec.backend,
            lease=spec.timeouts.lease,
            process_group_seconds=spec.timeouts.process_group,
            stop_seconds=spec.timeouts.stop,
            log_dir="" if setup.log_dir is None else os.path.abspath(setup.log_dir),
            logs=logs or Logs(),
            command=command,
        )
        self._forked = config.forked
        journal = Journal(os.path.join(setup.log_dir or log_root(), spec.run_id), spec.run_id)
        logger.info("%s %s: journal %s", "launcher" if held else "run", spec.run_id, journal.path)
        self._journal = journal.path
        self._shell = Shell(spec, journal, coordinator, config, dict(setup.runtime_env or {}), held=held)
        self._shell.start()

    def request(self, packed: Packed | None, run_id: str, max_restarts: int) -> Run:
        """Have a run made, after those that were requested before."""
        if not ray.is_initialized():  # or Ray 2.60 would start a new session for the first call
            raise ConfigError("ray.shutdown() was called under the launcher: its workers are gone with the session")
        if packed is not None and packed[1] and self._forked:
            raise ConfigError(
                "args, kwargs: hold an ObjectRef, and isolation='process' has no Ray inside: pass its value"
            )
        spec = replace(self._spec, run_id=run_id, max_restarts=max_restarts)
        run = Run(spec, RunConfig(run_id, None if packed is None else ray.put(packed), max_restarts), self._journal)
        self._shell.request(run)
        return run

    def result(self, run: Run, before_stop: Callable[[], None] | None = None) -> RunResult:
        """Wait for a run's result. Interrupted (Ctrl-C, SIGTERM as Ray's SystemExit), it stops the run first.

        `before_stop`, bounded, is called before that.
        """
        try:
            return run.future.result()
        except BaseException as interrupt:
            if not run.future.done():
                if before_stop is not None:
                    _call_off_abort(interrupt)
                    before_stop()
                self._stop(run, interrupt)
            raise

    def _stop(self, run: Run, interrupt: BaseException) -> None:
        """Stop a run in order; interrupted once more, at once."""
        if run.future.cancel():  # it had not begun
            return
        reason = f"{type(interrupt).__name__} in the driver"
        try:
            _call_off_abort(interrupt)
            self._shell.stop(run, reason)
            ended = _ends(run, self._spec.timeouts.stop + STOP_SLACK_SECONDS)
        except (KeyboardInterrupt, SystemExit) as second:
            _call_off_abort(second)
            self._shell.stop(run, f"{reason}, once more")
            ended = _ends(run, AT_ONCE_SECONDS)
        if not ended:
            logger.error("run %s could not be stopped in order; ending everything at once", run.spec.run_id)
            self._shell.abandon()

    def __enter__(self) -> Session:  # noqa: PYI034 - Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release everything, and see that it is gone. Interrupted, at once."""
        try:
            _call_off_abort(error)
            self._shell.release("the launcher was left")
            if not self._shell.wait(self._spec.timeouts.stop + STOP_SLACK_SECONDS):
                logger.error("%s could not be released in order; ending it at once", self._spec.run_id)
                self._abandon()
        except (KeyboardInterrupt, SystemExit) as interrupt:
            _call_off_abort(interrupt)
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._shell.abandon()
        self._shell.wait(STOP_SLACK_SECONDS)


def _ends(run: Run, seconds: float) -> bool:
    """Whether a run ends within this time."""
    return bool(futures.wait([run.future], seconds).done)


def check_with_ray(spec: RunSpec, setup: Setup) -> None:
    """Refuse what Ray itself would refuse later, in the middle of things. Needs no connection. Raises `ConfigError`."""
    labels = [spec.label_selector] if spec.label_selector else None
    try:
        validate_placement_group([spec.bundle_resources], spec.placement_strategy, bundle_label_selector=labels)
    except Exception as error:
        shown = f"label_selector={spec.label_selector!r}, resources_per_worker={spec.resources_per_worker!r}"
        raise ConfigError(f"{shown}: Ray refuses them: {error}") from error
    try:
        RuntimeEnv(**(setup.runtime_env or {}))
    except Exception as error:
        raise ConfigError(f"runtime_env={setup.runtime_env!r}: Ray refuses it: {error}") from error


def connect() -> None:
    """Use the session that is there, or connect as Ray does by itself."""
    by_address = not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "").startswith("ray://")
    if by_address or ray.util.client.ray.is_connected():
        raise ConfigError(
            "a Ray Client address (ray://) can't carry a run: the driver must live in the cluster; use"
            " `ray job submit -- python your_script.py`"
        )
    if not ray.is_initialized():
        ray.init()


def _call_off_abort(interrupt: BaseException | None) -> None:
    """Let a driver live that was told to end.

    Ray's C++ side (2.60) sees a SIGTERM before Python does, and sets an alarm that aborts the process three seconds
    later, whatever it still has to do (`alarm_on_failure_secs` of Abseil's failure signal handler).
    """
    if isinstance(interrupt, SystemExit):
        signal.alarm(0)


def _code_path() -> tuple[str, ...]:
    """Where the driver finds modules that no installation put there: its script's folder, pytest's, PYTHONPATH's.

    Ray 2.60 gives its workers only the script's folder and the working directory.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths = (os.path.abspath(path) for path in sys.path)
    return tuple(
        p for p in paths if os.path.isdir(p) and not any(p == i or p.startswith(f"{i}{os.sep}") for i in installed)
    )
