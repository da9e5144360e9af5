"""What Ray would change in this process and on this machine, and what a LocalCluster leaves as it is. For Ray 2.60."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from unittest import mock

import ray._common.utils
import ray._private.utils


@contextlib.contextmanager
def no_address_file() -> Iterator[None]:
    """Ray 2.60's `Cluster` notes its address in the machine's address file, and removes the file in the end. Not here.

    Both functions have no other caller while a cluster starts or ends.
    """
    with (
        mock.patch.object(ray._private.utils, "write_ray_address"),  # noqa: SLF001 - it has no switch
        mock.patch.object(ray._common.utils, "reset_ray_address"),  # noqa: SLF001
    ):
        yield


@contextlib.contextmanager
def sigterm_untouched() -> Iterator[None]:
    """Ray 2.60 takes SIGTERM over, ends its cluster and raises SystemExit, which pytest takes for one more failed test.

    Nobody needs that: the kernel ends the processes of a cluster with the one that started them (PR_SET_PDEATHSIG).
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def environment(variables: dict[str, str | None]) -> Iterator[None]:
    """This process's environment, changed for a while. None: the variable is not there."""
    before = {name: os.environ.get(name) for name in variables}
    set_environment(variables)
    try:
        yield
    finally:
        set_environment(before)


def set_environment(variables: dict[str, str | None]) -> None:
    """Set these variables in this process's environment. None: remove it."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
