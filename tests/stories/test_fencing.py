"""Only one generation is live: whoever was stopped, cut off or replaced can't report, commit or stay."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from harness import actor_pids, eventually, runs
from steps import any_rank, step_until
from test_coordinator_dies import coordinator_pid

import raylaunch
from raylaunch import Timeouts


def commits_while_current(enough: Path, commits: Path) -> int:
    """Rank 0 commits after every step, if its generation is the live one: one line of generation and time."""
    context = raylaunch.get_context()
    while not any_rank(enough.exists()):
        if context.rank == 0 and context.is_current():
            with commits.open("a") as file:
                file.write(f"{context.generation} {time.monotonic()}\n")
        time.sleep(0.005)
    return context.generation


def commits_alone(enough: Path, commits: Path) -> int:
    """Rank 0 does so without a step together, so that it goes straight to its next commit when it thaws."""
    context = raylaunch.get_context()
    while not enough.exists():
        asked = time.monotonic()
        if context.rank == 0 and context.is_current():
            with commits.open("a") as file:
                file.write(f"{context.generation} {os.getpid()} {asked}\n")
        time.sleep(0.005)
    return context.generation


def frozen_tree(node) -> list[psutil.Process]:
    """A node's raylet and everything below it."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def test_rank_0_on_a_node_that_freezes_is_replaced_and_commits_nothing_when_it_thaws(two_nodes, start, gate):
    gate("commits").touch()
    added = [two_nodes.add_node(resources={"not_the_head": 1}) for _ in range(3)]
    run = start(
        commits_alone,
        args=(gate("enough"), gate("commits")),
        num_workers=2,
        workers_per_node=1,
        resources_per_worker={"CPU": 1, "not_the_head": 1},
    )
    there = run.running().members[0]
    frozen = next(node for node in added if node.node_id == there.node)
    pid = there.process.pid
    eventually(lambda: f" {pid} " in gate("commits").read_text(), "rank 0 has committed")
    processes = frozen_tree(frozen)
    for process in processes:
        process.suspend()
    run.running(generation=2)  # on the node that is left over
    replaced = time.monotonic()
    for process in reversed(processes):
        process.resume()
    eventually(lambda: not psutil.pid_exists(pid), "the thawed worker is gone")
    gate("enough").touch()
    assert list(run.result()) == [2, 2]
    lines = [line.split() for line in gate("commits").read_text().splitlines()]
    assert lines[-1][1] != str(pid)  # the new rank 0 commits
    # The one commit that it may have been frozen in was allowed before: what counts is when it asked.
    assert not [line for line in lines if line[1] == str(pid) and float(line[2]) > replaced]
    two_nodes.forget_node(frozen)
    added.remove(frozen)
    for node in added:
        two_nodes.kill_node(node)


@pytest.mark.slow
def test_a_stopped_rank_is_given_up_when_it_is_silent_for_too_long_and_killed(two_nodes, start, gate):
    timeouts = Timeouts(lease=1, unresponsive=3)
    run = start(commits_while_current, args=(gate("enough"), gate("commits")), num_workers=2, timeouts=timeouts)
    run.running()
    stopped = two_nodes.pause_worker(run.id, 0)
    run.running(generation=2)
    assert not runs(stopped)
    gate("enough").touch()
    result = run.result()
    assert list(result) == [2, 2]
    assert "rank 0" in result.recoveries[0].cause
    assert "unresponsive" in result.recoveries[0].cause
    generations = [int(line.split()[0]) for line in gate("commits").read_text().splitlines()]
    assert generations == sorted(generations)


@pytest.mark.slow
def test_a_short_stop_costs_nothing_but_a_word_of_warning(two_nodes, start, gate, caplog):
    run = start(step_until, args=(gate("enough"),), num_workers=2, timeouts=Timeouts(lease=1, unresponsive=60))
    run.running()
    stopped = two_nodes.pause_worker(run.id, 1)
    run.wait_for_event("PulseMissed")
    os.kill(stopped, signal.SIGCONT)
    gate("enough").touch()
    result = run.result()
    assert result.generation == 1
    assert "rank 1" in caplog.text
    assert "has sent no pulse" in caplog.text


@pytest.mark.slow
def test_a_worker_without_its_coordinator_for_a_lease_ends_itself_and_the_run_recovers(two_nodes, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=2, timeouts=Timeouts(lease=2))
    workers = [member.process.pid for member in run.running().members.values()]
    coordinator = coordinator_pid(two_nodes)
    os.kill(coordinator, signal.SIGSTOP)
    try:
        eventually(lambda: not any(runs(pid) for pid in workers), "the workers end themselves")
    finally:
        os.kill(coordinator, signal.SIGCONT)
    run.running(generation=2)
    gate("enough").touch()
    assert "lease" in run.result().recoveries[0].cause


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_workers_speak_for_themselves_when_their_nodes_agent_does_not(two_nodes, start, gate, how):
    """The agent is stopped, or is killed, and so are those that follow it: the training goes on past several leases."""
    lease = 2.0
    timeouts = Timeouts(lease=lease, unresponsive=2 * lease)
    run = start(step_until, args=(gate("enough"),), num_workers=2, timeouts=timeouts)
    run.running()
    until, hurt = time.monotonic() + 4 * lease, set()

    def hurt_agents() -> bool:
        for pid in {pid for node in two_nodes.nodes for pid in actor_pids(node, "NodeAgent")} - hurt:
            hurt.add(pid)
            with contextlib.suppress(ProcessLookupError):  # an earlier run's, just about to go
                os.kill(pid, how)
        return time.monotonic() > until

    run.wait_until(hurt_agents, "the end of some leases")
    assert hurt
    if how == signal.SIGSTOP:
        for pid in hurt:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    gate("enough").touch()
    result = run.result()
    assert (result.generation, result.restarts) == (1, 0)


@pytest.mark.slow
def test_two_nodes_that_die_together_are_one_re_formation(two_nodes, start, gate):
    while len(two_nodes.nodes) < 3:
        two_nodes.add_node()
    run = start(step_until, args=(gate("enough"),), num_workers=(2, 6), placement_strategy="SPREAD", grow=False)
    assert len(run.running().members) == 6
    two_nodes.kill_nodes(two_nodes.nodes[1:3])
    status = run.running(generation=2)
    assert {member.node for member in status.members.values()} == {two_nodes.nodes[0].node_id}
    gate("enough").touch()
    result = run.result()
    assert result.restarts == 1
    assert result.recoveries[-1].world_size == 2
    assert "lost" in result.recoveries[-1].cause
    two_nodes.add_node()


def has_children(enough: Path, gates: Path) -> int:
    """Steps; each rank has a program and a fork in sessions of their own."""
    program = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    fork = os.fork()
    if not fork:
        os.setsid()
        time.sleep(1000)
    context = raylaunch.get_context()
    for pid in (os.getpid(), program.pid, fork):
        (gates / f"{context.generation}-{context.rank}-{pid}").touch()
    while not any_rank(enough.exists()):
        time.sleep(0.01)
    return context.world_size


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_raylet_leaves_nothing_on_its_node(two_nodes, start, tmp_path, gate, stopped):
    pids = tmp_path / "pids"
    pids.mkdir()
    run = start(has_children, args=(gate("enough"), pids), num_workers=2, resources_per_worker={"CPU": 2})
    members = run.running().members
    node = two_nodes.nodes[-1]
    (rank,) = [rank for rank, member in members.items() if member.node == node.node_id]
    there = eventually(lambda: len(found := list(pids.glob(f"1-{rank}-*"))) == 3 and found, "its children are there")
    if stopped:
        two_nodes.pause_worker(run.id, rank)
    agents = actor_pids(node, "NodeAgent")
    assert agents
    node.all_processes["raylet"][0].process.kill()
    gone = agents + [int(path.name.rpartition("-")[2]) for path in there]
    eventually(lambda: not any(runs(pid) for pid in gone), "nothing of it is left", 10)
    two_nodes.forget_node(node)
    two_nodes.add_node()
    run.running(generation=2)
    gate("enough").touch()
    assert list(run.result()) == [2, 2]
