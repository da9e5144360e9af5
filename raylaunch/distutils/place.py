"""Where this process stands among the others, and where they meet: as a launcher says, or as Slurm says."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from raylaunch.distutils.config import Config
from raylaunch.distutils.environment import os_environ_get_or_throw, setup_env_local
from raylaunch.errors import ConfigError

#: Where the ranks of a Slurm job meet, on its first node, unless MASTER_PORT is set: two jobs with the same first node
#: can't have the same.
DISTRIBUTED_PORT = 13356


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place. `init_method` is torch's: `env://`, `tcp://host:port` or `file:///path`."""

    rank: int
    local_rank: int
    world_size: int
    init_method: str


def from_environment(config: Config) -> Place:
    """From torchrun's variables. A process that lacks them, and has world size 1, is alone.

    Raises:
        ConfigError: `world_size` isn't the launcher's.
        RuntimeError: there should be other ranks, and nothing says where, or which this one is.
    """
    size = _world_size(config, os.environ.get("WORLD_SIZE"))
    if size == 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        setup_env_local()
    elif config.init_method == "tcp" and "MASTER_ADDR" not in os.environ:
        raise RuntimeError(
            f"world_size={size}, but nothing says where the ranks meet (MASTER_ADDR is not set): start the processes "
            f"with a launcher, such as raylaunch or torchrun"
        )
    return Place(
        rank=int(os_environ_get_or_throw("RANK")),
        local_rank=int(os_environ_get_or_throw("LOCAL_RANK")),
        world_size=size,
        init_method=_file(config) if config.init_method == "file" else "env://",
    )


def from_slurm(config: Config) -> Place:
    """From the variables that srun gives each task: one task is one rank.

    Raises:
        ConfigError: `world_size` isn't the number of tasks.
        RuntimeError: this is no Slurm step, or `scontrol` can't be asked for its first node.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise RuntimeError(
            "submit=True, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: start the script with srun, "
            "or say submit=False where a launcher starts it"
        )
    size = _world_size(config, os_environ_get_or_throw("SLURM_NTASKS"))
    if config.init_method == "file":
        init_method = _file(config, os_environ_get_or_throw("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0"))
    else:
        init_method = f"tcp://{_first_host(nodes)}:{os.environ.get('MASTER_PORT', DISTRIBUTED_PORT)}"
    return Place(
        rank=int(os_environ_get_or_throw("SLURM_PROCID")),
        local_rank=int(os_environ_get_or_throw("SLURM_LOCALID")),
        world_size=size,
        init_method=init_method,
    )


def _world_size(config: Config, said: str | None) -> int:
    """The world size that was asked for, which must be the one that the launcher says where it says one."""
    if said is None:
        return 1 if config.world_size is None else config.world_size
    if config.world_size not in (None, int(said)):
        raise ConfigError(
            f"config field world_size={config.world_size}: the launcher has started {said} ranks; None takes its word"
        )
    return int(said)


def _first_host(nodes: str) -> str:
    """Of a Slurm node list, as `gpu[07-12]`."""
    try:
        answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        told = getattr(error, "stderr", None) or error
        raise RuntimeError(f"submit=True, but `scontrol show hostnames {nodes}` failed: {told}") from error


def _file(config: Config, *job: str) -> str:
    """The file through which the ranks meet: one that no other job, and no earlier start of this one, has used."""
    folder = os.path.abspath(config.shared_file_dir or "")
    if not os.path.isdir(folder):
        raise ConfigError(f"config field shared_file_dir={config.shared_file_dir!r}: there is no such folder")
    return f"file://{folder}/" + "-".join([".distributed-shared-file", str(config.array_job_num), *job])
