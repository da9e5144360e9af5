"""A plan carried out: connects, asks the cluster what only it knows, runs the command. For the command and the API."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raylaunch.result import RunResult
from raylaunch.spec import RunSpec
from raylaunch.torchrun.plan import Plan
from raylaunch.torchrun.signals import interrupt, raising
from raylaunch.torchrun.sizing import settled, size_for

if TYPE_CHECKING:
    from raylaunch.cluster.session import Setup

OMP = "OMP_NUM_THREADS"


def launch(
    asked: Plan,
    work: Callable[[RunSpec], RunResult],
    *,
    connection: AbstractContextManager[None],
    say: Callable[[str], None],
    made: Callable[[int], BaseException] = interrupt,
) -> RunResult:
    """Carry a plan out, and wait for its end.

    Args:
        asked: the plan.
        work: what is done with the run's spec, while there is a connection to Ray.
        connection: the connection.
        say: takes what the user should know.
        made: what is raised for a signal.

    Raises:
        ConfigError: it can't work.
        ConnectionError: there is no Ray cluster.
        RunFailedError: the run failed.
    """
    for note in asked.notes:
        say(note)
    with raising(asked.signals, made) as install_again, connection:
        install_again()
        size = settled(asked.wish)
        if size is None:
            from raylaunch.cluster.connection import node_resources

            size = size_for(asked.wish, node_resources())
        if size.note:
            say(size.note)
        spec = asked.spec(size)
        _tell_threads(asked, spec, say)
        return work(spec)


def own_connection(asked: Plan, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """The command's connection, which ends with it. What Ray would refuse is refused before: `ConfigError`."""
    from raylaunch.cluster.connection import connected
    from raylaunch.cluster.session import check_with_ray

    check_with_ray(asked.trial(), _setup(asked))
    per_node = asked.wish.per_node
    workers = asked.bounds[1] if per_node is None else per_node if isinstance(per_node, int) else 1
    return connected(
        asked.address,
        standalone=asked.standalone,
        cpus=math.ceil(workers * asked.wish.resources.get("CPU", 1.0)),
        min_nodes=1 if per_node is None else asked.bounds[0],
        runtime_env=asked.runtime_env,
        say=say,
    )


def run_command(asked: Plan, spec: RunSpec) -> RunResult:
    """The plan's command, as the ranks of a run."""
    from raylaunch.cluster.connection import shipped
    from raylaunch.cluster.session import launch_command

    asked = replace(asked, runtime_env=shipped(asked.runtime_env))
    return launch_command(spec, _setup(asked), asked.command, asked.logs)


def run_function(asked: Plan, function: Callable[..., Any], args: Sequence[Any], spec: RunSpec) -> RunResult:
    """A function, as the ranks of a run."""
    from raylaunch.cluster.session import Job
    from raylaunch.cluster.session import launch as launch_function

    job = Job(function, tuple(args), None, ())
    return launch_function(spec, _setup(asked), job, command=asked.command, logs=asked.logs)


def _setup(asked: Plan) -> Setup:
    from raylaunch.cluster.session import Setup

    # As torchrun's, the workers have the launcher's environment, but for what the coordinator gives each rank.
    return Setup(asked.preload, None, ("*",), asked.runtime_env, asked.log_dir)


def _tell_threads(asked: Plan, spec: RunSpec, say: Callable[[str], None]) -> None:
    """Say once how many threads torch will use, where nobody has said it; torchrun says it too."""
    own = (asked.runtime_env or {}).get("env_vars", {})
    if OMP not in os.environ and OMP not in own and spec.bounds.max_workers > 1:
        threads = max(1, int(spec.resources_per_worker.get("CPU", 1)))
        say(f"{OMP} is {threads} in each worker, as many as it reserves CPUs; set it to choose another number")
