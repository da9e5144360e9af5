"""Environment variables: reading one that must be there, and those of a process that is alone."""

from __future__ import annotations

import os


def os_environ_get_or_throw(x: str) -> str:
    """The environment variable `x`.

    Raises:
        RuntimeError: it is not set.
    """
    if x not in os.environ:
        raise RuntimeError(f"the environment variable {x} is not set: is this process started by a launcher?")
    return os.environ[x]


def setup_env_local() -> None:
    """Set the variables by which this process alone can form a process group: rank 0 of 1, on this machine.

    MASTER_PORT is 0: the system chooses the port when the group is formed, so nobody can take it before.
    """
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
