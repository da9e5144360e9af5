"""Runs the checks in processes that it forks, having imported torch once; or, under torchrun, in its own.

`python distutils_gang.py FOLDER`: alone without a group, and in groups of 1, 2 and 4 that meet through a file, and of 2
that meet as Slurm says. `torchrun ... distutils_gang.py FOLDER torchrun`: as one rank. Each rank leaves a file of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distutils_checks import run_checks

from raylaunch import distutils

CONFIG = {"submit": False, "world_size": None, "cpu": True, "distributed_backend": "gloo", "timeout": 0.5}


def alone(_rank: int, _size: int, _folder: Path) -> dict[str, Any]:
    """One process, no launcher, no group."""
    modules = sorted({"torch", "ray", "raylaunch.cluster", "raylaunch.distutils"} & sys.modules.keys())
    return {"checks": run_checks(0, 1), "modules": modules}


def by_file(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Twice: the second group is another one, and the calls must find it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    config = {**CONFIG, "world_size": size, "init_method": "file", "shared_file_dir": str(folder)}
    distutils.setup({**config, "array_job_num": f"{size}a"})
    old = dist.group.WORLD
    checks = run_checks(rank, size)
    distutils.cleanup()
    distutils.cleanup()
    left = [distutils.initialized(), distutils.get_rank(), distutils.get_world_size(), distutils.all_reduce(5)]
    device_left = distutils.CURRENT_DEVICE_STR in os.environ
    try:
        stale = str(distutils.all_reduce(5, group=old))
    except ValueError as error:
        stale = str(error)
    distutils.setup({**config, "array_job_num": f"{size}b"})
    again = [distutils.all_reduce(1), distutils.all_gather_objects(rank)]
    distutils.cleanup()
    return {"checks": checks, "left": left, "device_left": device_left, "stale": stale, "again": again}


def by_environment(rank: int, size: int, _folder: Path) -> dict[str, Any]:
    """One process that nobody has started: it is alone, twice, and its group is real."""
    distutils.setup({**CONFIG, "world_size": 1})
    found = {"checks": run_checks(rank, size), "initialized": distutils.initialized()}
    distutils.cleanup()
    distutils.setup(CONFIG)
    found["again"] = [distutils.initialized(), distutils.all_reduce(1)]
    distutils.cleanup()
    return found


def by_slurm(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """As srun starts its tasks; only `scontrol` is a stand-in."""
    distutils.setup({**CONFIG, "submit": True, "world_size": size})
    found = {"checks": run_checks(rank, size), "timeout": default_timeout()}
    distutils.cleanup()
    distutils.setup({**CONFIG, "submit": True, "init_method": "file", "shared_file_dir": str(folder)})
    found["by_file"] = distutils.all_reduce(1)
    found["files"] = sorted(path.name for path in folder.glob(".distributed*slurm*"))
    distutils.synchronize()
    distutils.cleanup()
    return found


def default_timeout() -> float:
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def play(folder: Path, name: str, size: int, function: Callable[..., dict[str, Any]], **variables: str) -> None:
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update({key: value.replace("RANK", str(rank)) for key, value in variables.items()})
            try:
                found = function(rank, size, folder)
            except BaseException:
                found = {"broken": traceback.format_exc()}
            (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def slurm(folder: Path) -> dict[str, str]:
    """What srun gives its tasks, with the rank in place of RANK."""
    scontrol = folder / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n')
    scontrol.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_NODELIST": "n[1-9]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "RANK",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "slurm-7",
        "MASTER_PORT": str(port),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    play(folder, "alone", 1, alone)
    play(folder, "environment", 1, by_environment)
    for size in (1, 2, 4):
        play(folder, f"file{size}", size, by_file)
    play(folder, "slurm", 2, by_slurm, **slurm(folder))


def as_rank(folder: Path) -> None:
    """The whole of a script for torchrun."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distutils.setup(CONFIG)
    found = {"checks": run_checks(rank, size), "timeout": default_timeout()}
    distutils.cleanup()
    (folder / f"torchrun-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    (as_rank if sys.argv[2:] else main)(Path(sys.argv[1]))
