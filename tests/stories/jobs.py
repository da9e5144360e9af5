"""A Ray cluster as administrators start it (`ray start --head`), with the job server, and jobs that a test submits.

Nothing here asks raylaunch, nor connects to Ray as a driver: jobs are seen by their gates (files), by Ray's own HTTP
interface, and in /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from drivers import PRELUDE
from harness import LONGEST, eventually

#: Marks every process of such a cluster, so that its end can be seen to.
MARK = "RAYLAUNCH_TEST_CLUSTER"

_PORTS = (
    "port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class JobCluster:
    """One node with two CPUs, ports and folder of its own, token authentication on or off."""

    def __init__(self, *, token: bool, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rl-jobs-"))  # short: Ray's sockets lie below it
        self._mark = f"{MARK}={self.folder.name}/"
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._port = ports["port"]
        self.http = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"RAY_AUTH_MODE": "token" if token else "disabled", **environment}
        self.headers: dict[str, str] = {}
        if token:
            secret = self.folder / "auth_token"
            secret.write_text(secrets.token_hex(32))
            secret.chmod(0o600)
            self.environment["RAY_AUTH_TOKEN_PATH"] = str(secret)
            self.headers["Authorization"] = f"Bearer {secret.read_text()}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        options = [f"--{name}={number}" for name, number in ports.items()]
        self._start("--head", f"--temp-dir={self.folder}/ray", "--disable-usage-stats", *options)

    def _start(self, *options: str) -> None:
        """`ray start`, in a session of its own; returns when the node is there."""
        said = self.folder / f"output-{len(self._nodes)}.txt"
        with said.open("wb") as output:
            node = subprocess.Popen(
                ray_command("start", *options, "--num-cpus=2", "--min-worker-port=0", "--max-worker-port=0", "--block"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, MARK: self._mark_of(len(self._nodes))},
                start_new_session=True,
            )
        self._nodes.append(node)

        def is_up() -> bool:
            assert node.poll() is None, f"ray start has ended:\n{said.read_text(errors='replace')}"
            with contextlib.suppress(OSError):  # urllib's errors too
                return self.ask("/api/jobs/") == [] and len(self.rows("nodes")) == len(self._nodes)
            return False

        try:
            eventually(_rarely(is_up), "the job server is up, and knows the node", 2 * LONGEST)  # a dozen processes
        except BaseException:
            self.end()
            raise

    def _mark_of(self, node: int) -> str:
        return f"{self.folder.name}/{node}"

    def add_node(self) -> None:
        """One more node, as `ray start --address` makes it."""
        (head,) = self.rows("nodes")
        (agent,) = _free_ports(1)
        self._start(f"--address={head['node_ip']}:{self._port}", f"--dashboard-agent-listen-port={agent}")

    def kill_head(self) -> None:
        """End the head node as a power cut would: each of its processes, drivers and workers too, by SIGKILL."""
        for pid in processes_with(f"{MARK}={self._mark_of(0)}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, path: str) -> Any:
        """What Ray's head answers to a GET."""
        request = urllib.request.Request(self.http + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def rows(self, what: str) -> list[dict[str, Any]]:
        """Ray's own list of its `actors`, `placement_groups` or `nodes`."""
        return self.ask(f"/api/v0/{what}")["data"]["result"]["result"]

    def refuses_strangers(self) -> bool:
        """Whether a request without the token is refused."""
        try:
            urllib.request.urlopen(f"{self.http}/api/jobs/", timeout=10).close()
        except urllib.error.HTTPError as error:
            with error:
                return error.code == 401
        return False

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, as a user types it."""
        command = ray_command("job", arguments[0], "--address", self.http, *arguments[1:])
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=LONGEST)

    def end(self) -> None:
        """End every process of this cluster, by its pid."""
        for node in reversed(self._nodes):
            node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(10)
        for pid in processes_with(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self._nodes:
            node.wait(10)
        eventually(lambda: not processes_with(self._mark), "the cluster is gone", 20)
        shutil.rmtree(self.folder)


class Job:
    """One script, with the files that it needs, submitted with a working directory.

    `gates` are files by which it and its workers talk with the test, as in `drivers.Driver`. The run's id stands in the
    job's environment, which Ray gives every process that it starts for the job.
    """

    def __init__(self, cluster: JobCluster, folder: Path, script: str, **modules: str) -> None:
        self.cluster = cluster
        self.id = self.run_id = f"job-{os.getpid()}-{cluster.folder.name[-8:]}-{folder.name.replace('_', '-')}"[:60]
        self.gates, self.code = folder / "gates", folder / "code"
        self.gates.mkdir()
        self.code.mkdir()
        (self.code / "main.py").write_text(PRELUDE + script)
        for name, text in modules.items():
            (self.code / f"{name}.py").write_text(text)
        self.entrypoint = [sys.executable, "main.py", str(self.gates), str(folder / "runs"), self.run_id]
        self.runtime_env: dict[str, Any] = {"env_vars": {"STORY_RUN": self.run_id}}

    def submit_by_cli(self) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, which follows the log until the job is over."""
        runtime_env = json.dumps(self.runtime_env)
        options = ["--submission-id", self.id, "--working-dir", str(self.code), "--runtime-env-json", runtime_env]
        return self.cluster.cli("submit", *options, "--", *self.entrypoint)

    def submit_by_sdk(self) -> Any:
        """Submit by Ray's SDK; returns its client."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.cluster.http, headers=self.cluster.headers)
        runtime_env = {"working_dir": str(self.code), **self.runtime_env}
        entrypoint = " ".join(self.entrypoint)
        assert client.submit_job(entrypoint=entrypoint, submission_id=self.id, runtime_env=runtime_env) == self.id
        return client

    def info(self) -> dict[str, Any]:
        """What the job server knows: status, message, the driver's exit code."""
        return self.cluster.ask(f"/api/jobs/{self.id}")

    def log(self) -> str:
        """What the driver has printed."""
        return self.cluster.ask(f"/api/jobs/{self.id}/logs")["logs"]

    def ended(self) -> dict[str, Any]:
        """Wait until the job is over; returns its `info`."""

        def over() -> dict[str, Any] | None:
            info = self.info()
            return info if info["status"] in ("SUCCEEDED", "FAILED", "STOPPED") else None

        return eventually(_rarely(over), f"job {self.id} is over")

    def wait_for(self, name: str) -> str:
        """Wait until the script or a worker has written this file; returns its text."""
        path = self.gates / name

        def check() -> None:
            info = self.info()
            alive = path.exists() or info["status"] in ("PENDING", "RUNNING")
            assert alive, f"the job has ended: {info}\n{self.log()}"

        check_rarely = _rarely(check)
        eventually(lambda: path.exists() or check_rarely(), f"{name} of {self.run_id}")
        return path.read_text()

    def processes(self) -> list[str]:
        """The processes with the run's id in their environment."""
        found = []
        for pid in processes_with(self.run_id):
            with contextlib.suppress(psutil.Error):
                found.append(f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:80]}")
        return found

    def leftovers(self, *, port: int | None = None) -> list[str]:
        """What is left: processes by their environment, and what Ray knows of, none of it raylaunch's word."""
        left = self.processes()
        if port and any(c.laddr.port == port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN):
            left.append(f"port {port}")
        for row in self.cluster.rows("actors"):
            if row["state"] != "DEAD":
                left.append(f"actor {row['class_name']} {row['state']}")
        for row in self.cluster.rows("placement_groups"):
            if row["state"] != "REMOVED":
                left.append(f"placement group {row['name']} {row['state']}")
        return left


def ray_command(*arguments: str) -> list[str]:
    """The `ray` command of this interpreter's environment."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def processes_with(text: str) -> list[int]:
    """The processes that were started with this text in their environment; not this one, and no zombies."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and text.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def _rarely(question: Callable[[], Any]) -> Callable[[], Any]:
    """The same question, asked every half second only: each costs Ray's head some milliseconds of a core."""
    asked = 0.0

    def ask() -> Any:
        nonlocal asked
        if time.monotonic() < asked + 0.5:
            return None
        try:
            return question()
        finally:
            asked = time.monotonic()

    return ask


def _free_ports(count: int) -> list[int]:
    """Different ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
