"""torch.distributed.launcher.api on Ray: the same calls, results and exceptions. Imports torch."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.elastic import metrics
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError
from torch.distributed.launcher import api as torch_api
from torch.numa.binding import NumaOptions

from raylaunch.command import Logs
from raylaunch.errors import ConfigError, Failure, PlacementTimeout, RunFailedError
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec, Timeouts
from raylaunch.torchrun.entry import Entrypoint, command_for
from raylaunch.torchrun.error_file import error_data, write_error_file
from raylaunch.torchrun.events import Reporter
from raylaunch.torchrun.failure import process_exit_code, wall_clock
from raylaunch.torchrun.launch import launch, run_command, run_function
from raylaunch.torchrun.logs_specs import log_dir_of, logs_of, notes_on
from raylaunch.torchrun.plan import Plan, signals_for
from raylaunch.torchrun.rendezvous import run_id_for, timeouts_of
from raylaunch.torchrun.sizing import Wish

__all__ = [
    "ChildFailedError",
    "LaunchConfig",
    "NumaOptions",
    "ProcessFailure",
    "SignalException",
    "elastic_launch",
    "launch_agent",
    "record",
]

logger = logging.getLogger("raylaunch")


@dataclass
class LaunchConfig(torch_api.LaunchConfig):  # type: ignore[misc] # torch's types are not followed
    """torch's LaunchConfig, every field of it, and what Ray wants to know.

    Whatever `rdzv_backend` says, the coordinator forms the group. torch's own LaunchConfig is accepted everywhere too.

    Attributes:
        use_gpu: one GPU for each worker; None: where the cluster has them.
        resources_per_worker: what each worker reserves, by Ray's names; default: one CPU, and one GPU with `use_gpu`.
        label_selector: only nodes with these Ray labels.
        runtime_env: Ray's, for the workers' code and packages.
        spares: warm processes in reserve on each node, or "auto": none, because starting one costs a fork.
        preload: modules that are imported before a worker needs them.
    """

    use_gpu: bool | None = None
    resources_per_worker: Mapping[str, float] | None = None
    label_selector: Mapping[str, str] | None = None
    runtime_env: Mapping[str, Any] | None = None
    spares: int | str = "auto"
    preload: Sequence[str] = ("torch",)


class elastic_launch:  # noqa: N801 - torch's name
    """Runs a function or a command as the workers of `config`: `elastic_launch(config, entrypoint)(*args)`.

    Args:
        config: a LaunchConfig, this module's or torch's.
        entrypoint: a function, or a program as a text: `elastic_launch(config, "python")("script.py")`.
        health_check_server: is started before the run and stopped after it, as torch does.
    """

    def __init__(self, config: Any, entrypoint: Entrypoint, health_check_server: Any = None) -> None:
        self._config = config
        self._entrypoint = entrypoint
        self._health_check_server = health_check_server

    def __call__(self, *args: Any) -> dict[int, Any]:
        """Run it; see `launch_agent`."""
        return launch_agent(self._config, self._entrypoint, list(args), self._health_check_server)


def launch_agent(
    config: Any, entrypoint: Entrypoint, args: list[Any], health_check_server: Any = None
) -> dict[int, Any]:
    """Run a function or a command on the Ray cluster, and wait for it.

    Uses the Ray session that is there, or connects with a bare `ray.init()`.

    Returns:
        The values by global rank, of all ranks on all nodes; None for each rank of a command.

    Raises:
        ConfigError: the configuration can't work. Nothing was started.
        ChildFailedError: a worker failed, and no restart was left; raylaunch's RunFailedError is its `__cause__`.
        RendezvousTimeoutError: the cluster never had the room.
        SignalException: this process got one of `config.signals_to_handle`; the run was stopped first.
    """
    asked = plan_of(config, entrypoint, args)
    metrics.initialize_metrics(metrics.MetricsConfig(config.metrics_cfg))
    report = Reporter(asked)

    def work(spec: RunSpec) -> RunResult:
        config.run_id = spec.run_id  # torch too notes there the id that it has made up
        return run_function(asked, entrypoint, args, spec) if callable(entrypoint) else run_command(asked, spec)

    try:
        with _health_checks(health_check_server):
            result = launch(asked, work, connection=_session(), say=logger.warning, made=_signal_exception)
    except PlacementTimeout as error:
        report.failed(error)
        raise RendezvousTimeoutError(str(error)) from error
    except RunFailedError as error:
        report.failed(error)
        _count(asked, "failed", 0)
        raised = child_failed_error(asked.command.target, error)
        if raised is None:
            raise
        raise raised from error
    except BaseException as error:
        report.failed(error)
        raise
    report.succeeded(result)
    _count(asked, "success", result.restarts)
    return dict(enumerate(result))


def plan_of(config: Any, entrypoint: Entrypoint, args: Sequence[Any]) -> Plan:
    """What a LaunchConfig asks for. Raises `ConfigError`."""
    low, high, per_node = config.min_nodes, config.max_nodes, config.nproc_per_node
    if not all(isinstance(number, int) for number in (low, high, per_node)) or not 0 < low <= high or per_node < 1:
        raise ConfigError(
            f"min_nodes={low!r}, max_nodes={high!r}, nproc_per_node={per_node!r}: must be whole numbers, with"
            " 0 < min_nodes <= max_nodes and 0 < nproc_per_node"
        )
    resources = dict(getattr(config, "resources_per_worker", None) or {})
    use_gpu = getattr(config, "use_gpu", None)
    if use_gpu is None and "GPU" in resources:
        use_gpu = resources["GPU"] > 0
    prefix = config.log_line_prefix_template
    logs = Logs(
        duplicate_stdout_filters=tuple(config.duplicate_stdout_filters or ()),
        duplicate_stderr_filters=tuple(config.duplicate_stderr_filters or ()),
        **({} if prefix is None else {"prefix": prefix}),
    )
    mode = "" if config.numa_options is None else config.numa_options.affinity_mode.value
    asked = Plan(
        bounds=(low, high),
        wish=Wish(per_node, use_gpu, resources, low),
        command=replace(command_for(entrypoint, args), cwd=os.getcwd(), role=config.role, numa_binding=mode),
        logs=logs_of(config.logs_specs, logs),
        run_id=run_id_for(config.run_id),
        max_restarts=config.max_restarts,
        timeouts=Timeouts(stop=config.shutdown_timeout, **timeouts_of(config.rdzv_configs, "rdzv_configs ")),
        virtual_local_rank=config.virtual_local_rank,
        label_selector=getattr(config, "label_selector", None),
        spares=getattr(config, "spares", "auto"),
        preload=tuple(getattr(config, "preload", ("torch",))),
        runtime_env=getattr(config, "runtime_env", None),
        log_dir=log_dir_of(config.logs_specs),
        signals=signals_for(config.signals_to_handle),
        event_log_handler=config.event_log_handler,
        notes=tuple(notes_on(config.logs_specs, "logs_specs")),
    )
    asked.trial()
    return asked


def child_failed_error(name: str, error: RunFailedError) -> ChildFailedError | None:
    """A ChildFailedError for a failed run; None if no worker failed. The root cause is its first failure."""
    cause = error.root_cause
    if cause is None:
        return None
    write_error_file(error, cause)
    root = _process_failure(error, cause)
    failures = {-1 if cause.rank is None else cause.rank: root}
    for rank, failure in sorted(error.failures.items()):
        if rank not in failures:
            failures[rank] = _process_failure(error, failure)
            # torch takes the earliest for the root cause, in whole seconds.
            failures[rank].timestamp = max(failures[rank].timestamp, root.timestamp)
    return ChildFailedError(name, failures)


def _process_failure(error: RunFailedError, failure: Failure) -> ProcessFailure:
    """One failure, in torch's words."""
    local_rank = -1 if failure.local_rank is None else failure.local_rank
    made = ProcessFailure(local_rank, failure.pid, process_exit_code(failure), "")
    data, made.timestamp = error_data(error, failure), int(wall_clock(failure.at))
    made.error_file_data = data
    made.message = data["message"]
    path = write_error_file(error, failure) if failure.ending.traceback else ""
    made.error_file = path or made.error_file
    return made


@contextlib.contextmanager
def _session() -> Iterator[None]:
    """The Ray session that is there, or a bare ray.init(), which stays."""
    from raylaunch.cluster.session import connect

    connect()
    yield


@contextlib.contextmanager
def _health_checks(server: Any) -> Iterator[None]:
    if server is None:
        yield
        return
    server.start()
    try:
        yield
    finally:
        server.stop()


def _signal_exception(number: int) -> SignalException:
    name = signal.Signals(number)
    return SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)


def _count(asked: Plan, end: str, restarts: int) -> None:
    """Put the metrics that torch puts of a run."""
    prefix = f"workers.{asked.command.role}"
    metrics.put_metric(f"{prefix}.run_total", 1)
    for one in ("success", "failed"):
        for how, happened in (("with_retries", restarts > 0), ("no_retries", restarts == 0)):
            metrics.put_metric(f"{prefix}.run_{one}_{how}", int(one == end and happened))
