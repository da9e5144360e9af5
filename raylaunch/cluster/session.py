"""From a validated spec to a result: connects to Ray, ships the function, starts coordinator and shell, waits.

The library uses the Ray session that is there or connects with a bare `ray.init()`; it never shuts one down.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.cloudpickle
from ray.runtime_env import RuntimeEnv
from ray.util.placement_group import validate_placement_group

from raylaunch.cluster.coordinator_actor import start_coordinator
from raylaunch.cluster.shell import Shell
from raylaunch.cluster.shipping import pack
from raylaunch.cluster.worker_actor import WorkerConfig, versions
from raylaunch.coordinator.commands import Finish, Outcome
from raylaunch.errors import ConfigError, PlacementTimeout, RunFailedError, run_failed
from raylaunch.journal import Journal
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec
from raylaunch.worker.env import check_env, copied_env
from raylaunch.worker.payload import check_call

logger = logging.getLogger("raylaunch")

#: After the time that workers have for stopping: how long the rest of a stop may take, in seconds.
STOP_SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class Job:
    """What the coordinator doesn't need to know: the function, and what its workers are given. As `run` got it."""

    train_fn: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None
    no_retry: Sequence[type[BaseException]]
    preload: Sequence[str]
    env: Mapping[str, str] | None
    copy_env: Sequence[str]
    runtime_env: Mapping[str, Any] | None
    log_dir: str | os.PathLike[str] | None

    def check(self) -> None:
        """Refuse what can't work, before anything is started. Raises `ConfigError`."""
        check_call(self.train_fn, self.args, self.kwargs)
        check_env("env", {} if self.env is None else self.env)
        types = self.no_retry if isinstance(self.no_retry, (tuple, list)) else [None]
        if not all(isinstance(item, type) and issubclass(item, BaseException) for item in types):
            raise ConfigError(f"no_retry={self.no_retry!r}: must be a tuple of exception types, as (ValueError,)")
        for name, items, example in (("copy_env", self.copy_env, "MY_*"), ("preload", self.preload, "torch")):
            if not isinstance(items, (tuple, list)) or not all(isinstance(item, str) and item for item in items):
                raise ConfigError(
                    f"{name}={items!r}: must be a tuple of strings (none of them empty), as ({example!r},)"
                )
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise ConfigError(f"runtime_env={self.runtime_env!r}: must be a dictionary, as Ray's runtime_env")
        if self.log_dir is not None and not isinstance(self.log_dir, (str, os.PathLike)):
            raise ConfigError(f"log_dir={self.log_dir!r}: must be a path")
        if "\0" in str(self.log_dir):
            raise ConfigError(f"log_dir={self.log_dir!r}: the operating system allows no zero byte")


def launch(spec: RunSpec, job: Job) -> RunResult:
    """Carry a run out. See `raylaunch.run` for what it raises."""
    job.check()
    packed = pack(job.train_fn, job.args, job.kwargs, tuple(job.no_retry))
    connect()
    _check_with_ray(spec, job)
    spec = replace(spec, versions=versions())
    payload = ray.put(packed)
    in_ray_worker = ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    environ = dict(os.environ)
    if in_ray_worker:
        environ.pop("OMP_NUM_THREADS", None)  # Ray's own, for this task or actor
    coordinator = start_coordinator(spec.run_id, spec.timeouts, owns_job=not in_ray_worker)
    config = WorkerConfig(
        run_id=spec.run_id,
        token=uuid.uuid4().hex,
        coordinator=coordinator,
        payload=(payload,),
        code_path=_code_path(),
        copied_env=copied_env(environ, tuple(job.copy_env)),
        env=dict(job.env or {}),
        preload=tuple(job.preload),
        cpus_per_worker=spec.resources_per_worker.get("CPU", 1.0),
        use_gpu=bool(spec.gpus_per_worker),
        virtual_local_rank=spec.virtual_local_rank,
        backend=spec.backend,
        max_restarts=spec.max_restarts,
        lease=spec.timeouts.lease,
        process_group_seconds=spec.timeouts.process_group,
    )
    journal = Journal(os.path.join(job.log_dir or _log_root(), spec.run_id), spec.run_id)
    logger.info("run %s: journal %s", spec.run_id, journal.path)
    shell = Shell(spec, journal, coordinator, config, dict(job.runtime_env or {}))
    try:
        shell.start()
        finish = shell.wait()
    except BaseException as interrupt:  # Ctrl-C, SIGTERM (Ray makes it a SystemExit), a notebook's interrupt
        _stop(shell, spec, interrupt)
        raise
    assert finish is not None, "a wait without a limit ends with the run"
    return _result(shell, finish, spec, journal.path)


def _check_with_ray(spec: RunSpec, job: Job) -> None:
    """What Ray itself would refuse later, in the middle of things."""
    labels = [spec.label_selector] if spec.label_selector else None
    try:
        validate_placement_group([spec.bundle_resources], spec.placement_strategy, bundle_label_selector=labels)
    except Exception as error:
        shown = f"label_selector={spec.label_selector!r}, resources_per_worker={spec.resources_per_worker!r}"
        raise ConfigError(f"{shown}: Ray refuses them: {error}") from error
    try:
        RuntimeEnv(**(job.runtime_env or {}))
    except Exception as error:
        raise ConfigError(f"runtime_env={job.runtime_env!r}: Ray refuses it: {error}") from error


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


def _stop(shell: Shell, spec: RunSpec, interrupt: BaseException) -> None:
    """Stop in order; interrupted once more, at once."""
    try:
        _call_off_abort(interrupt)
        shell.stop(f"{type(interrupt).__name__} in the driver")
        if shell.wait(spec.timeouts.stop + STOP_SLACK_SECONDS) is None:
            logger.error("run %s could not be stopped in order; ending it at once", spec.run_id)
            shell.abandon()
            shell.wait(STOP_SLACK_SECONDS)
    except (KeyboardInterrupt, SystemExit) as second:
        _call_off_abort(second)
        shell.abandon()
        shell.wait(STOP_SLACK_SECONDS)


def _call_off_abort(interrupt: BaseException) -> None:
    """Let a driver live that was told to end.

    Ray's C++ side (2.60) sees a SIGTERM before Python does, and sets an alarm that aborts the process three seconds
    later, whatever it still has to do (`alarm_on_failure_secs` of Abseil's failure signal handler).
    """
    if isinstance(interrupt, SystemExit):
        signal.alarm(0)


def _result(shell: Shell, finish: Finish, spec: RunSpec, journal: str) -> RunResult:
    if finish.outcome is Outcome.SUCCEEDED:
        return RunResult(
            values=tuple(shell.values),
            run_id=spec.run_id,
            world_size=finish.world_size,
            generation=finish.generation,
            restarts=finish.restarts,
            journal=journal,
            recoveries=finish.recoveries,
        )
    failures = {failure.rank: failure for failure in finish.failures if failure.rank is not None}
    message = f"{finish.reason}\n{shell.shortage}" if shell.shortage else finish.reason
    kind = PlacementTimeout if finish.outcome is Outcome.NO_ROOM else RunFailedError
    error = kind(message, finish.root_cause, failures, spec.run_id, journal)
    cause = _load_exception(shell.exception)
    raise run_failed(error, cause) from cause


def _load_exception(pickled: bytes | None) -> BaseException | None:
    if pickled is None:
        return None
    try:
        loaded = ray.cloudpickle.loads(pickled)
    except (Exception, SystemExit):  # its class isn't importable in the driver
        return None
    return loaded if isinstance(loaded, BaseException) else None


def _code_path() -> tuple[str, ...]:
    """Where the driver finds modules that no installation put there: its script's folder, pytest's, PYTHONPATH's.

    Ray 2.60 gives its workers only the script's folder and the working directory.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths = (os.path.abspath(path) for path in sys.path)
    return tuple(
        p for p in paths if os.path.isdir(p) and not any(p == i or p.startswith(f"{i}{os.sep}") for i in installed)
    )


def _log_root() -> str:
    """Ray's session log folder, so that Ray's dashboard lists the files. Private: 2.60 has no public way to it."""
    node = ray._private.worker.global_worker.node  # noqa: SLF001
    return os.path.join(node.get_logs_dir_path() if node is not None else tempfile.gettempdir(), "raylaunch")
