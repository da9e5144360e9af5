"""A launch on the cluster: from an ElasticLauncher's parameters to a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raylaunch.command import Logs
from raylaunch.elastic.call import Call, DevicesTakenError
from raylaunch.elastic.devices import NodeDevices
from raylaunch.elastic.events import Events
from raylaunch.elastic.params import JOB_OPTIONS, OMP, SPEC_OPTIONS, Params
from raylaunch.elastic.progress import ProgressDisplay
from raylaunch.errors import ConfigError
from raylaunch.spec import RunSpec, Timeouts, make_spec
from raylaunch.torchrun.rendezvous import run_id_for
from raylaunch.worker.board_copy import BoardCopy
from raylaunch.worker.env import DEFAULT_COPY_ENV

if TYPE_CHECKING:
    from raylaunch.cluster.run import Run
    from raylaunch.cluster.session import Setup
    from raylaunch.elastic.launcher import ElasticLauncher

logger = logging.getLogger("raylaunch")

#: What a rank needs before its function begins, beside the user's own.
PRELOAD = ("raylaunch.cluster.board_link",)


def nodes() -> list[Mapping[str, float]]:
    """What each node of the cluster has; connects to it, as a launch does."""
    from raylaunch.cluster.connection import node_resources
    from raylaunch.cluster.session import connect

    connect()
    return node_resources()


def launch(
    launcher: ElasticLauncher, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Carry it out; the values by rank."""
    params, settled = launcher.config, launcher._settled  # noqa: SLF001 - the launcher's own helper
    assert settled is not None, "the launcher has settled it"
    spec, setup = spec_of(params, settled, launcher.dist_backend), setup_of(params)
    if note := params.threads_note(os.environ):
        logger.warning("%s", note)
    given = params.without_effect()
    if given:
        logger.warning("without effect on Ray: %s", "; ".join(given))
    from raylaunch.cluster.session import Job
    from raylaunch.cluster.talking import launch_talking

    copy: BoardCopy = launcher._copy  # noqa: SLF001
    no_retry = params.run_options.get("no_retry", ())
    if isinstance(no_retry, (tuple, list)):
        no_retry = (*no_retry, DevicesTakenError)
    try:
        result = launch_talking(
            spec,
            setup,
            Job(Call(launcher, function), args, kwargs, no_retry),
            copy,
            logs=Logs(redirects=params.streams("redirects"), tee=params.streams("tee")),
            indices=settled.indices,
            meanwhile=ProgressDisplay(copy),
            before_stop=lambda run: _save_first(params, copy, run),
        )
    finally:
        copy.clear()
    return list(result)


def spec_of(params: Params, settled: NodeDevices, backend: str | None) -> RunSpec:
    """The run that the parameters ask for. Raises `ConfigError`."""
    low, high = params.nodes
    options = {name: value for name, value in params.run_options.items() if name in SPEC_OPTIONS}
    asked = options.pop("resources_per_worker", None) or {}
    if not isinstance(asked, Mapping):
        raise ConfigError(f"run_options['resources_per_worker']={asked!r}: must map names of resources to numbers")
    resources = dict(asked)
    if "GPU" in resources:
        raise ConfigError("run_options['resources_per_worker']: `devices` says how much of a GPU each process has")
    if settled.kind == "cuda":
        resources["GPU"] = settled.share
    timeouts = options.pop("timeouts", None) or Timeouts()
    if not isinstance(timeouts, Timeouts):
        raise ConfigError(f"run_options['timeouts']={timeouts!r}: must be a raylaunch.Timeouts")
    return make_spec(
        num_workers=(low * settled.per_node, high * settled.per_node),
        workers_per_node=settled.per_node,
        use_gpu=settled.kind == "cuda",
        resources_per_worker=resources,
        backend=backend,
        max_restarts=params.max_restarts,
        run_id=run_id_for(params.rdzv_id),
        timeouts=replace(timeouts, **params.timeouts()),
        **options,
    )


def setup_of(params: Params) -> Setup:
    """What the workers are given besides their seats."""
    from raylaunch.cluster.session import Setup

    options = {name: value for name, value in params.run_options.items() if name not in (*SPEC_OPTIONS, *JOB_OPTIONS)}
    env = options.get("env") or {}
    if params.omp_num_threads is not None and isinstance(env, Mapping):
        env = {OMP: str(params.omp_num_threads), **env}
    preload = options.get("preload", ("torch",))
    if isinstance(preload, (tuple, list)):
        preload = (*preload, *PRELOAD)
    log_dir = None if params.log_dir is None else os.fspath(params.log_dir)
    return Setup(preload, env, options.get("copy_env", DEFAULT_COPY_ENV), options.get("runtime_env"), log_dir)


def _save_first(params: Params, copy: BoardCopy, run: Run) -> None:
    """Before a launch is stopped that was interrupted: ask for a checkpoint, where that is the policy.

    Bounded by `save_timeout`, and by the next interrupt.
    """
    if params.on_interrupt != "save_then_stop":
        return
    events = Events(copy)
    try:
        logger.warning(
            "interrupted: a checkpoint is saved before the launch is stopped, within %g s; once more stops it at once",
            params.save_timeout,
        )
        events.trigger_save_checkpoint.set()
        copy.wait(lambda: events.finished_save_checkpoint.is_set() or run.future.done(), params.save_timeout)
    except (KeyboardInterrupt, SystemExit):
        logger.warning("interrupted once more: stopping without the checkpoint")
        return
    if not events.finished_save_checkpoint.is_set():
        logger.warning(
            "no checkpoint was saved within %g s: do all ranks call launcher.between_steps(save=...)?",
            params.save_timeout,
        )
