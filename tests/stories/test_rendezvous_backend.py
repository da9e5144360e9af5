"""`torchrun --rdzv-backend=ray`, with torch's own torchrun: nodes that die, come and fail, and what is left behind.

An agent is a torchrun process; several on this machine stand for several nodes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from harness import LONGEST, eventually, runs

from raylaunch.cluster.coordinator_actor import NAMESPACE
from raylaunch.cluster.rendezvous_actor import rendezvous_name

ROOT = Path(__file__).parent.parent.parent

#: Trains until the gate `finish` is there, which all ranks see in the same step. Says who it is by a file.
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist

gates = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()

def reduced(value):
    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor)
    return tensor.item()

assert reduced(1) == size
part = gates / f"part-{os.getpid()}"
names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE", "OMP_NUM_THREADS")
part.write_text(" ".join([str(size), str(rank), str(os.getpid()), *(os.environ.get(name, "-") for name in names)]))
part.rename(gates / f"up-{os.getpid()}")  # whole, or not there
while True:
    if (gates / f"fail-{rank}").exists():
        sys.exit(3)
    if (gates / "hang").exists():
        time.sleep(1000)  # as in a collective that waits for its timeout
    if reduced((gates / "finish").exists()):
        break
    time.sleep(0.01)
"""


class Rank:
    """What a rank has said of itself."""

    def __init__(self, text: str) -> None:
        *numbers, self.agent_store, self.threads = text.split()
        self.size, self.rank, self.pid, self.restarts = map(int, numbers)


class Job:
    """The agents of one job."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster = cluster
        self.id = folder.name.replace("_", "-")
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        self.agents: list[Agent] = []
        self._seen: set[str] = set()
        # As an installation of this tree would have it: what is installed may be of another one.
        installed = folder / "installed"
        described = installed / "raylaunch-0.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: raylaunch\nVersion: 0\n")
        (described / "entry_points.txt").write_text(entry_points())
        self.path = os.pathsep.join(filter(None, [str(installed), str(ROOT), os.environ.get("PYTHONPATH")]))

    def start(self, *options: str, nnodes: str = "1:2", conf: str = "", **env: str) -> Agent:
        """One more agent."""
        conf = f"--rdzv-conf=last_call_timeout=20,{conf}".rstrip(",")
        agent = Agent(self, [f"--nnodes={nnodes}", conf, *options], env)
        self.agents.append(agent)
        return agent

    def up(self, size: int) -> list[Rank]:
        """Wait until a world of this size that hasn't been seen yet has all its ranks; returns them by rank."""

        def new() -> list[Rank]:
            for agent in self.agents:
                agent.check()
            names = sorted({path.name for path in self.gates.glob("up-*")} - self._seen)
            found = [Rank((self.gates / name).read_text()) for name in names]
            found = [one for one in found if one.size == size and runs(one.pid)]
            if sorted(one.rank for one in found) != list(range(size)):
                return []
            self._seen |= set(names)
            return sorted(found, key=lambda one: one.rank)

        return eventually(new, f"a world of {size}")

    def gate(self, name: str) -> None:
        (self.gates / name).touch()

    def actors(self) -> list[str]:
        names = ray.util.list_named_actors(all_namespaces=True)
        return [one["name"] for one in names if one["namespace"] == NAMESPACE]

    def end(self) -> None:
        """End all of it, whatever it does."""
        pids = [int(path.name.rpartition("-")[2]) for path in self.gates.glob("up-*")]
        for pid in [*(agent.process.pid for agent in self.agents), *pids]:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        for agent in self.agents:
            agent.process.wait(LONGEST)

    def nothing_is_left(self) -> None:
        """No actor of ours, and no process that keeps contact."""
        contacts = [pid for agent in self.agents for pid in agent.contacts if pid]
        eventually(lambda: not self.actors() and not [pid for pid in contacts if runs(pid)], "nothing is left", 15.0)


def entry_points() -> str:
    """The project's entry points for torchrun, as an installation writes them."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'\[project\.entry-points\."torchrun\.handlers"\]\n((?:\w+ = ".*"\n)+)', text)
    assert found is not None
    return "[torchrun.handlers]\n" + found[1].replace('"', "")


class Agent:
    """One torchrun."""

    def __init__(self, job: Job, options: list[str], env: dict[str, str]) -> None:
        self._said = job.gates / f"agent-{len(job.agents)}.txt"
        self.expected_to_end = False
        self.contacts: set[int] = set()
        rendezvous = ["--rdzv-backend=ray", f"--rdzv-endpoint={job.cluster.address}", f"--rdzv-id={job.id}"]
        torchrun = Path(sys.executable).with_name("torchrun")
        surroundings = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self._said.open("wb") as output:
            self.process = subprocess.Popen(
                [torchrun, *rendezvous, "--nproc-per-node=1", "--max-restarts=3", *options, job.script, job.gates],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**surroundings, "PYTHONPATH": job.path, "GLOO_SOCKET_IFNAME": "lo", **env},
            )

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def contact(self) -> int:
        """The process that keeps its contact; 0: there is none yet."""
        children = psutil.Process(self.process.pid).children()
        return next((child.pid for child in children if "rendezvous_contact" in " ".join(child.cmdline())), 0)

    def check(self) -> None:
        """It lives, unless it was meant not to."""
        if not self.expected_to_end:
            assert self.process.poll() is None, f"torchrun has ended:\n{self.said()}"
            with contextlib.suppress(psutil.Error):
                self.contacts.add(self.contact())

    def signal(self, number: int) -> None:
        self.expected_to_end = True
        self.process.send_signal(number)

    def exit_code(self, seconds: float = LONGEST) -> int:
        self.expected_to_end = True
        return self.process.wait(seconds)


@pytest.fixture
def job(two_nodes: Any, tmp_path: Path) -> Iterator[Job]:
    job = Job(two_nodes, tmp_path)
    try:
        yield job
    finally:
        job.end()
    job.nothing_is_left()


def finish(job: Job, *agents: Agent) -> None:
    """The training comes to its end."""
    job.gate("finish")
    for agent in agents:
        assert agent.exit_code() == 0, agent.said()


def test_agents_are_killed_and_come(job: Job) -> None:
    a, b = job.start(), job.start()
    first, second = job.up(2)
    assert job.actors() == [rendezvous_name(job.id)]
    of_b = next(one for one in (first, second) if psutil.Process(one.pid).ppid() == b.process.pid)
    b.signal(signal.SIGKILL)
    (alone,) = job.up(1)
    assert "its torchrun agent has ended" in a.said()
    assert psutil.Process(alone.pid).ppid() == a.process.pid
    eventually(lambda: not runs(of_b.pid), "the rank of the agent that was killed has lost its peer, and ends")
    c = job.start()
    job.up(2)
    finish(job, a, c)


@pytest.mark.slow
def test_killed_ranks_are_replaced_each_time(job: Job) -> None:
    a, b = job.start(nnodes="2"), job.start(nnodes="2")
    for restarts in range(3):
        ranks = job.up(2)
        assert sum(one.restarts for one in ranks) >= restarts  # torch counts for each agent
        os.kill(ranks[restarts % 2].pid, signal.SIGKILL)
    job.up(2)
    finish(job, a, b)


@pytest.mark.slow
def test_too_few_nodes(job: Job) -> None:
    agent = job.start(nnodes="2:3", conf="join_timeout=2")
    began = time.monotonic()
    assert agent.exit_code() == 1
    assert time.monotonic() - began < 30, "two seconds, and the start of Python, torch and Ray"
    expected = r"RendezvousTimeoutError: .* within join_timeout=2 s: 1 of at least 2 nodes have come: \S+:\d+"
    assert re.search(expected, agent.said()), agent.said()


@pytest.mark.slow
def test_a_node_that_is_silent_is_left_and_leaves(job: Job) -> None:
    """What keeps its contact is gone, as after a node has lost its cluster."""
    conf = "keep_alive_interval=0.5,keep_alive_max_attempt=4"
    a, b = job.start(conf=conf), job.start(conf=conf)
    job.up(2)
    b.expected_to_end = True
    os.kill(b.contact(), signal.SIGKILL)
    job.up(1)
    assert b.exit_code() == 1
    assert "RendezvousConnectionError" in b.said()
    assert "exit code -9" in b.said()
    finish(job, a)


@pytest.mark.slow
def test_a_node_that_has_failed_for_good_does_not_leave_the_others_waiting(job: Job) -> None:
    a, b = (job.start("--max-restarts=0", nnodes="2") for _ in range(2))
    job.up(2)
    job.gate("fail-1")
    job.gate("hang")
    codes = [agent.exit_code(60) for agent in (a, b)]
    assert codes == [1, 1]
    assert sum("RendezvousClosedError" in agent.said() and "has failed" in agent.said() for agent in (a, b)) == 1


def test_an_agent_that_is_killed_before_it_has_reached_ray_leaves_nothing(job: Job) -> None:
    with socket.socket() as deaf:  # accepts connections, and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        agent = job.start(f"--rdzv-endpoint=127.0.0.1:{deaf.getsockname()[1]}")
        contact = eventually(agent.contact, "the process between has started")
        agent.contacts.add(contact)
        agent.signal(signal.SIGKILL)


@pytest.mark.slow
def test_where_nothing_listens(job: Job) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and doesn't listen
        agent = job.start(f"--rdzv-endpoint=127.0.0.1:{nobody.getsockname()[1]}")
        assert agent.exit_code() == 1
    assert re.search(r"RendezvousConnectionError: .* can't connect to Ray at '127.0.0.1:\d+': nothing", agent.said())


@pytest.mark.slow
def test_a_terminated_agent_leaves_and_the_rendezvous_survives_its_actor(job: Job) -> None:
    a, b = job.start(), job.start()
    job.up(2)
    actor = ray.get_actor(rendezvous_name(job.id), namespace=NAMESPACE)
    ray.kill(actor, no_restart=False)
    b.signal(signal.SIGTERM)
    job.up(1)
    assert b.exit_code() != 0
    c = job.start()
    job.up(2)
    finish(job, a, c)


#: A node of its own on this machine: another address of it, where Ray finds the raylet that has it.
OTHER = "127.0.0.2"
#: An agent's contact finds a raylet by its machine's address. On one machine only ray.init can tell several apart.
ON_THE_OTHER = f"""
import sys
class Other:
    def find_spec(self, name, path=None, target=None):
        if name == "raylaunch.cluster.rendezvous_contact":
            import functools, ray
            ray.init = functools.partial(ray.init, _node_ip_address={OTHER!r})
sys.meta_path.insert(0, Other())
"""


@pytest.mark.slow
def test_a_killed_raylet_alone_stops_nobody_and_a_node_that_is_lost_is_left(job: Job, two_nodes: Any) -> None:
    node = two_nodes.add_node(node_ip_address=OTHER)
    there = job.gates.parent / "there"
    there.mkdir()
    (there / "sitecustomize.py").write_text(ON_THE_OTHER)
    a = job.start(conf="keep_alive_interval=0.5,keep_alive_max_attempt=4")
    b = job.start(
        conf="keep_alive_interval=0.5,keep_alive_max_attempt=4",
        PYTHONPATH=os.pathsep.join([str(there), job.path]),
    )
    ranks = job.up(2)
    two_nodes.kill_node(node)
    eventually(lambda: not next(one for one in ray.nodes() if one["NodeID"] == node.node_id)["Alive"], "Ray knows it")
    assert [one for one in ranks if runs(one.pid)] == ranks  # agent and ranks still reach each other, and go on
    assert "is gone" not in a.said()
    on_b = [b.process.pid, b.contact(), *(one.pid for one in ranks if psutil.Process(one.pid).ppid() == b.process.pid)]
    b.expected_to_end = True
    for pid in on_b:
        os.kill(pid, signal.SIGKILL)
    (alone,) = job.up(1)
    assert psutil.Process(alone.pid).ppid() == a.process.pid
    finish(job, a)


@pytest.mark.slow
def test_the_cluster_that_this_node_is_part_of(job: Job) -> None:
    agent = job.start("--rdzv-endpoint=auto", "--nproc-per-node=2", nnodes="1")
    ranks = job.up(2)
    assert [(one.agent_store, one.threads) for one in ranks] == [("True", "1")] * 2
    assert job.actors() == [rendezvous_name(job.id)]
    finish(job, agent)
    assert agent.said().count("OMP_NUM_THREADS") == 1  # by torchrun, and by nobody else


@pytest.mark.slow
def test_ranks_may_have_a_store_of_their_own(job: Job) -> None:
    a, b = (job.start(nnodes="2", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2))
    for _ in range(2):
        ranks = job.up(2)
        assert [one.agent_store for one in ranks] == ["False"] * 2
        os.kill(ranks[0].pid, signal.SIGKILL)
    job.up(2)
    finish(job, a, b)
