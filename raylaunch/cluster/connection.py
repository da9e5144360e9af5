"""The command's connection to a Ray cluster: the one it is told of, the one that runs here, or one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping

import ray

from raylaunch.errors import ConfigError

#: How long the cluster's head may take to accept a connection, in seconds.
KNOCK_SECONDS = 5.0
#: The command shows its ranks' output by itself, and tells what happens by itself.
_QUIET = {"log_to_driver": False, "logging_level": logging.WARNING}


@contextlib.contextmanager
def connected(
    address: str | None, *, standalone: bool, cpus: int, min_nodes: int, say: Callable[[str], None]
) -> Iterator[None]:
    """A connection for the block; a Ray that was started for it ends with it.

    Args:
        address: the cluster's; None: the one that RAY_ADDRESS names, or that runs on this machine.
        standalone: start a Ray of one node.
        cpus: how many CPUs that node has at least: as many as one node's workers take.
        min_nodes: how many nodes the run needs.
        say: takes what the user should know.

    Raises:
        ConfigError: `address` is of a kind that can't carry a run.
        ConnectionError: there is no cluster.
    """
    if ray.is_initialized() and address is None and not standalone:
        yield
        return
    where, name = address or os.environ.get("RAY_ADDRESS", ""), "--address" if address else "RAY_ADDRESS"
    if where.startswith("ray://") and not standalone:
        raise ConfigError(
            f"{name}={where}: a Ray Client address can't carry a run: the launcher must live in the cluster; use"
            " `ray job submit -- raylaunch run ...`"
        )
    own = standalone
    if not standalone:
        try:
            _knock(where)
            ray.init(address=address or "auto", **_QUIET)
        except OSError as error:
            if where and where != "auto":
                raise ConnectionError(f"{name}={where}: no Ray cluster answers there: {error}") from error
            if min_nodes > 1:
                raise ConnectionError(
                    f"no Ray cluster runs here, and the run needs {min_nodes} nodes: start one (`ray start --head`), or"
                    " say where it is (--address, RAY_ADDRESS)"
                ) from error
            say("no Ray cluster runs here: starting one of one node, as with --standalone")
            own = True
    if own:
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **_QUIET)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(where: str) -> None:
    """See that somebody listens at an address. Raises OSError; ray.init (2.60) would try for five minutes and more."""
    host, _, port = where.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def node_resources() -> list[Mapping[str, float]]:
    """What each node of the cluster has, by Ray's resource names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
