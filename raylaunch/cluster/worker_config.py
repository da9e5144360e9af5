"""What workers and node agents are told: of the session when they start, of a run when they become ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylaunch.command import Command, Logs
from raylaunch.worker import env as worker_env


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker is given when it starts, before it is known which run it will serve."""

    #: The run's id, or the launcher's name.
    name: str
    #: Random: marks the workers' processes, whatever run ids are about in the environment.
    token: str
    coordinator: Any
    #: Where the driver finds its own code; used after everything else, where the path is there on the node too.
    code_path: tuple[str, ...]
    copied_env: dict[str, str]
    env: dict[str, str]
    preload: tuple[str, ...]
    cpus_per_worker: float
    use_gpu: bool
    virtual_local_rank: bool
    backend: str | None
    lease: float
    process_group_seconds: float
    #: The run's `timeouts.stop`.
    stop_seconds: float
    #: Where logs go on each node; "": into Ray's session log folder there.
    log_dir: str
    #: What of the ranks' output the console shows.
    logs: Logs
    #: What ranks are that are processes of their own, with their seats in their node's agent. None: workers are actors.
    command: Command | None

    @property
    def forked(self) -> bool:
        """Whether the ranks are processes of their own."""
        return self.command is not None

    def command_env(self, environ: Mapping[str, str], host: str) -> dict[str, str]:
        """The environment of a command on a node, made of that of Ray's processes there, before it has a rank."""
        return worker_env.command_env(
            environ,
            run_id=self.name,
            copied=self.copied_env,
            env=self.env,
            cpus_per_worker=self.cpus_per_worker,
            use_gpu=self.use_gpu,
            host=host,
        )


@dataclass(frozen=True)
class RunConfig:
    """What a worker is told of its run when it becomes a rank."""

    run_id: str
    #: A reference to the pickled function. Inside this object, so that Ray hands on the reference itself. None: there
    #: is none, it is a command.
    payload: Any
    max_restarts: int
