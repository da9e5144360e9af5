"""A real Ray cluster of several nodes on this machine, and the means to hurt it. For your own tests and ours.

    with LocalCluster(nodes=2, cpus=2) as cluster:
        run = cluster.start_run(train, num_workers=2)
        run.running()
        cluster.kill_node(cluster.nodes[1])

All nodes share one address; GPUs may be fake (`gpus=2` on a machine without any, with `backend="gloo"`).

No other Ray cluster is touched. Ray 2.60 notes the newest cluster in a file of the machine, which a bare `ray.init()`
anywhere follows: a LocalCluster doesn't stand in it. While this process is connected, RAY_ADDRESS names the
LocalCluster, for the programs that a test starts, and so that nothing in the test can reach the cluster that it named.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import ray
import ray.exceptions
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from raylaunch.cluster.coordinator_actor import NAMESPACE, Member, Status, actor_name
from raylaunch.errors import ConfigError
from raylaunch.testing import reaper
from raylaunch.testing.background_run import BackgroundRun
from raylaunch.testing.reaper import KILL_SECONDS, MARK, processes
from raylaunch.testing.surroundings import environment, no_address_file, set_environment, sigterm_untouched
from raylaunch.worker.env import FAKE_GPUS
from raylaunch.worker.processes import rank_of

#: Ray's health checks, made quicker than its defaults (5 s, 3 s, 10 s, 5 times), so that a dead node is declared dead
#: in some 2 s instead of 15. Real clusters have the defaults: see `fast_health_checks`.
FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}

RAY_ADDRESS = "RAY_ADDRESS"
#: How long a run's coordinator may take to answer, in seconds: Ray restarts it in 1.7.
STATUS_SECONDS = 30.0
#: How long a run may take to end after its Ray session, in seconds.
END_SECONDS = 10.0
#: How long what has ended may take to give its resources back, in seconds.
SETTLE_SECONDS = 5.0


class LocalCluster:
    """A Ray cluster of processes on this machine; this process is its driver, connected to its first node.

    Made on the main thread, of a process that is connected to no other cluster. Its processes end with this one,
    however that ends.

    Args:
        nodes: how many.
        cpus: CPUs of each, a number that Ray believes.
        gpus: GPUs of each; fake where the machine has fewer.
        fast_health_checks: whether Ray declares a dead node dead in some 2 s, instead of 15.

    Attributes:
        nodes: the nodes that live, the first being the driver's: Ray's own objects, each with a `node_id`.
        address: for `ray.init(address=...)` in another process.
        log_dir: Ray's logs, with what the workers print; below it, in `raylaunch`, the journals. It stays.

    Raises:
        ConfigError: an argument can't work, or this process or thread can't have a cluster. Nothing was started.
    """

    def __init__(self, nodes: int = 1, cpus: int = 2, gpus: int = 0, *, fast_health_checks: bool = True) -> None:
        _check_count("nodes", nodes, 1)
        _check_count("cpus", cpus, 0)
        _check_count("gpus", gpus, 0)
        _check_main_thread()
        _check_not_connected()
        self.cpus, self.gpus = cpus, gpus
        self.nodes: list[Any] = []
        self.address = self.log_dir = ""
        self._mark = uuid.uuid4().hex
        self._cluster = Cluster()
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, self._mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal doesn't reach it
        )
        self._ray_address: str | None = None  # what the variable said before
        self._connected = self._changed = self._over = False
        try:
            settings: dict[str, Any] = {"_system_config": FAST_HEALTH_CHECKS} if fast_health_checks else {}
            # Neither Ray's autoscaler nor the reader of its logs: nobody needs them here, and each is a process.
            head = self.add_node(include_dashboard=False, no_monitor=True, include_log_monitor=False, **settings)
            self.address, self.log_dir = self._cluster.address, head.get_logs_dir_path()
            for _ in range(nodes - 1):
                self.add_node()
            self._changed = False
            self.connect()
        except BaseException:
            self.shutdown()
            raise

    # -- the driver's connection -------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Make this process the cluster's driver again, after `disconnect`. A new cluster is connected already."""
        self._check_there()
        if self._connected:
            return
        _check_not_connected()
        self._ray_address = os.environ.get(RAY_ADDRESS)
        os.environ[RAY_ADDRESS] = self.address
        self._connected = True
        # Everything explicit: a bare ray.init() would take whatever cluster the machine's address file names.
        with sigterm_untouched():
            ray.init(address=self.address, log_to_driver=False)

    def disconnect(self) -> None:
        """Leave the cluster, which ends what this process has left there: runs, actors, placement groups.

        Raises:
            RuntimeError: a run did not end.
        """
        if not self._connected:
            return
        self._connected = False
        try:
            ray.shutdown()
            # Without their session the runs end by themselves. Until they have, a call of theirs may make Ray connect
            # by itself (Ray 2.60 does so for any call): RAY_ADDRESS still says that it is to this cluster.
            until = time.monotonic() + END_SECONDS
            runs = _run_threads()
            for thread in runs:
                thread.join(max(0.0, until - time.monotonic()))
            ray.shutdown()
        finally:
            set_environment({RAY_ADDRESS: self._ray_address})
        if alive := [thread.name for thread in runs if thread.is_alive()]:
            raise RuntimeError(f"{', '.join(alive)}: not over {END_SECONDS:g} s after Ray was shut down under them")

    # -- what a test does to it --------------------------------------------------------------------------------------

    def start_run(self, train_fn: Callable[..., Any], **arguments: Any) -> BackgroundRun:
        """Start `raylaunch.run(train_fn, **arguments)` in the background."""
        self._check_connected()
        return BackgroundRun(self, train_fn, arguments)

    def status(self, run: BackgroundRun | str) -> Status:
        """What a run is doing: `phase`, `generation`, `members` by rank, `ready_spares`, `restarts`.

        Args:
            run: the run, or its id.

        Raises:
            ConfigError: no such run is going on.
            TimeoutError: its coordinator doesn't answer; it is being restarted.
        """
        self._check_connected()
        run_id = run.id if isinstance(run, BackgroundRun) else run
        try:
            coordinator = ray.get_actor(actor_name(run_id), namespace=NAMESPACE)
        except ValueError as error:
            raise ConfigError(f"run={run_id!r}: no such run is going on in the cluster at {self.address}") from error
        try:
            status: Status = ray.get(coordinator.status.remote(), timeout=STATUS_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise TimeoutError(f"run={run_id!r}: its coordinator does not answer: {error}") from error
        return status

    def member(self, run: BackgroundRun | str, rank: int) -> Member:
        """Where a rank of a run is: `node`, `host`, `process.pid`. Raises ConfigError when there is no such rank."""
        members = self.status(run).members
        if rank not in members:
            now = f"ranks {sorted(members)}" if members else "none: no generation runs; wait for run.running()"
            raise ConfigError(f"rank={rank!r}: must be a rank of the run, which has {now}")
        return members[rank]

    def kill_worker(self, run: BackgroundRun | str, rank: int) -> None:
        """End a rank's process with SIGKILL."""
        os.kill(rank_of(self.member(run, rank).process), signal.SIGKILL)

    def pause_worker(self, run: BackgroundRun | str, rank: int) -> int:
        """Stop a rank's process (SIGSTOP); returns its pid, to be continued with SIGCONT."""
        pid = rank_of(self.member(run, rank).process)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def add_node(self, *, cpus: int | None = None, gpus: int | None = None, **options: Any) -> Any:
        """One more node; returns it when Ray knows it.

        Args:
            cpus: its CPUs; default: as the others.
            gpus: its GPUs; default: as the others.
            options: Ray's other options of a node: `labels={"zone": "a"}`, `resources={"disk": 1}`.
        """
        self._check_there()
        if wrong := {"num_cpus", "num_gpus"} & options.keys():
            raise ConfigError(f"{', '.join(sorted(wrong))}: no such argument; write cpus=, gpus=")
        _check_main_thread()
        cpus, gpus = self.cpus if cpus is None else cpus, self.gpus if gpus is None else gpus
        _check_count("cpus", cpus, 0)
        _check_count("gpus", gpus, 0)
        fake = {"env_vars": {FAKE_GPUS: "1"}} if gpus > len(glob.glob("/dev/nvidia[0-9]*")) else {}
        with no_address_file(), sigterm_untouched(), environment({MARK: self._mark, RAY_ADDRESS: None}):
            node = self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, **fake, **options)
        self.nodes.append(node)
        self._changed = True
        return node

    def kill_node(self, node: Any) -> None:
        """End a node as a power cut would: its raylet and every worker on it, by SIGKILL, all at once."""
        self.kill_nodes([node])

    def kill_nodes(self, nodes: Sequence[Any]) -> None:
        """End several nodes at the same time. The first can't be ended: Ray ends the driver with it."""
        doomed = list(nodes)
        for node in doomed:
            self._check_node(node)
            if node is self.nodes[0]:
                raise ConfigError(f"node={_shown(node)}: is the driver's own, and Ray would end this process with it")
        pids = [pid for raylet in map(_raylet_pid, doomed) for pid in (raylet, *_descendants(raylet))]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in doomed:
            self.forget_node(node)

    def forget_node(self, node: Any) -> None:
        """Clear away what is left of a node that has died."""
        self._check_node(node)
        self.nodes.remove(node)
        self._changed = True
        self._cluster.remove_node(node, allow_graceful=False)  # reaps the raylet, ends its helpers

    def drain_node(self, node: Any, *, seconds: float = 60.0) -> None:
        """Tell Ray that a node will be preempted in so many seconds. It goes on working until it is killed."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined] # the hidden `ray drain-node` uses it too
        from ray.core.generated import autoscaler_pb2

        self._check_node(node)
        if not seconds > 0:
            raise ConfigError(f"seconds={seconds!r}: must be more than 0")
        self._changed = True
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "test", deadline)
        if not accepted:
            raise RuntimeError(f"Ray would not drain node {node.node_id}: {why}")

    # -- its end -----------------------------------------------------------------------------------------------------

    def as_new(self) -> bool:
        """Whether another test can have it: all its nodes, and nothing on them. Waits while something ends."""
        if self._over or self._changed or any(_raylet_ended(node) for node in self.nodes):
            return False
        until = time.monotonic() + SETTLE_SECONDS
        while self._in_use():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def shutdown(self) -> None:
        """End the cluster and all that was started in it, and the driver's connection to it."""
        if self._over:
            return
        self._over = True
        try:
            self.disconnect()
        finally:
            self.nodes.clear()
            try:
                with no_address_file():
                    self._cluster.shutdown()
            finally:
                self._reap()

    def __enter__(self) -> LocalCluster:  # noqa: PYI034 - Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _in_use(self) -> bool:
        """Whether anything of a run is left; what Ray alone knows, only while this process is connected."""
        if any("RAYLAUNCH_RUN_ID" in environment for _, environment in processes(self._mark)):
            return True
        if not self._connected:
            return False
        groups = any(info["state"] != "REMOVED" for info in placement_group_table().values())
        actors = ray.util.list_named_actors(all_namespaces=True)
        return bool(groups or actors or _amounts(ray.available_resources()) != _amounts(ray.cluster_resources()))

    def _reap(self) -> None:
        """End what is left of the cluster, and of what was started in it: a child in a session of its own."""
        assert self._reaper.stdin is not None, "it was given a pipe"
        self._reaper.stdin.close()
        if self._reaper.wait(2 * KILL_SECONDS) != 0:
            left = [pid for pid, _ in processes(self._mark)]
            raise RuntimeError(f"processes {left} of the cluster have not ended {KILL_SECONDS:g} s after SIGKILL")

    def _check_there(self) -> None:
        if self._over:
            raise ConfigError("this LocalCluster has been shut down")

    def _check_connected(self) -> None:
        self._check_there()
        if not self._connected or not ray.is_initialized():
            raise ConfigError("this process is not connected to its LocalCluster; call its connect()")

    def _check_node(self, node: Any) -> None:
        self._check_there()
        if not any(node is known for known in self.nodes):
            there = ", ".join(map(_shown, self.nodes))
            raise ConfigError(f"node={_shown(node)}: must be one of the cluster's `nodes`, which are {there}")


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number, {least} or more")


def _check_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "LocalCluster: nodes can be started on the main thread only, where Ray can set a signal handler, and with"
            " which they end"
        )


def _check_not_connected() -> None:
    if ray.is_initialized():
        raise ConfigError(
            "LocalCluster: this process is connected to a Ray cluster already, and can be the driver of only one;"
            " call ray.shutdown() first, or shut the other LocalCluster down"
        )


def _shown(node: Any) -> str:
    return str(getattr(node, "node_id", None) or repr(node))[:60]


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs; of memory something is always in use."""
    return {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}


def _run_threads() -> list[threading.Thread]:
    """The threads of runs that are going on in this process: shells, and background runs."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("raylaunch-")]


def _raylet_pid(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def _raylet_ended(node: Any) -> bool:
    raylets = node.all_processes.get("raylet")
    return not raylets or raylets[0].process.poll() is not None


def _descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            for child in map(int, file.read().split()):
                found += [child, *_descendants(child)]
    return found
