"""The command's connection to a Ray cluster: the one it is told of, the one that runs here, or one of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray._private.services
import ray._private.worker

from raylaunch.errors import ConfigError

#: How long the cluster's head may take to accept a connection, in seconds.
KNOCK_SECONDS = 5.0
#: The command shows its ranks' output by itself, and tells what happens by itself.
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
#: What of a runtime_env may be a folder of this machine. Ray (2.60) ships that for a whole job only, in ray.init.
_OF_THE_JOB = ("working_dir", "py_modules", "excludes")


@contextlib.contextmanager
def connected(
    address: str | None,
    *,
    standalone: bool,
    cpus: int,
    min_nodes: int,
    runtime_env: Mapping[str, Any] | None = None,
    say: Callable[[str], None],
) -> Iterator[None]:
    """A connection for the block; a Ray that was started for it ends with it.

    Args:
        address: the cluster's; None: the one that RAY_ADDRESS names, or that runs on this machine.
        standalone: start a Ray of one node.
        cpus: how many CPUs that node has at least: as many as one node's workers take.
        min_nodes: how many nodes the run needs.
        runtime_env: the workers'; what it has of this machine's folders is shipped. See `shipped`.
        say: takes what the user should know.

    Raises:
        ConfigError: `address` is of a kind that can't carry a run, or `runtime_env` can't be shipped.
        ConnectionError: there is no cluster.
    """
    if ray.is_initialized() and address is None and not standalone:
        yield
        return
    where, name = address or os.environ.get("RAY_ADDRESS", ""), "--address" if address else "RAY_ADDRESS"
    own = standalone or where == "local"  # Ray's word for it
    job_env = {key: value for key, value in (runtime_env or {}).items() if key in _OF_THE_JOB}
    options = {**_QUIET, **({"runtime_env": job_env} if job_env else {})}
    breakpoints = os.environ.get("PYTHONBREAKPOINT")
    if not own:
        _check_address(name, where)
        try:
            _knock(where)
            with _shipping(job_env):
                ray.init(address=address or "auto", **options)
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
        with _out_of_the_terminals_reach(), _shipping(job_env):
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **options)
    if breakpoints is not None:  # Ray 2.60 has put its debugger there; the ranks get what the user has
        os.environ["PYTHONBREAKPOINT"] = breakpoints
    with _no_notices():
        try:
            yield
        finally:
            ray.shutdown()  # which prints what is left of them


def shipped(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A runtime_env for actors: with what `connected` has shipped in place of folders of this machine."""
    if runtime_env is None:
        return None
    where: Mapping[str, Any] = ray.get_runtime_context().runtime_env
    found = {key: where[key] for key in ("working_dir", "py_modules") if key in runtime_env and key in where}
    return {**{key: value for key, value in runtime_env.items() if key != "excludes"}, **found}


@contextlib.contextmanager
def _shipping(job_env: Mapping[str, Any]) -> Iterator[None]:
    """Say what it was when Ray can't ship something, such as a folder that is too large."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not job_env:
            raise
        raise ConfigError(f"runtime_env={job_env!r}: Ray can't ship it: {error}") from error


def _check_address(name: str, where: str) -> None:
    """Refuse what is no cluster's address, with which ray.init (2.60) would fail in its own words, or start another."""
    if where.startswith(("ray://", "http://", "https://")):
        kind = "a Ray Client address" if where.startswith("ray://") else "the address of Ray's dashboard"
        raise ConfigError(
            f"{name}={where}: {kind} can't carry a run: the launcher must live in the cluster; use"
            " `ray job submit -- raylaunch run ...`"
        )
    host, _, port = where.rpartition(":")
    if where not in ("", "auto") and not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{name}={where}: must be HOST:PORT, the address of the cluster's head, or auto")


@contextlib.contextmanager
def _out_of_the_terminals_reach() -> Iterator[None]:
    """Start Ray's processes in sessions of their own, which ray.init (2.60) leaves in the launcher's process group.

    What a terminal that closes, `timeout` or a batch system sends to the whole group would end Ray under the launcher,
    which could then stop nothing in order, and would wait for Ray. The kernel ends them with the launcher all the same.
    """
    services = ray._private.services  # noqa: SLF001 - it has no switch
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextlib.contextmanager
def _no_notices() -> Iterator[None]:
    """Keep Ray's notices of dead workers off stdout, where the ranks' own output is; log_to_driver doesn't (2.60)."""
    worker = ray._private.worker  # noqa: SLF001 - the switch of Ray's own debugger
    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False  # noqa: SLF001
    try:
        yield
    finally:
        worker._worker_logs_enabled = before  # noqa: SLF001


def _knock(where: str) -> None:
    """See that somebody listens at an address. Raises OSError; ray.init (2.60) would try for five minutes and more."""
    host, _, port = where.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def node_resources() -> list[Mapping[str, float]]:
    """What each node of the cluster has, by Ray's resource names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
