"""The seats of forked ranks, and what they live with: a forker and an agent that die or are stopped, at bad moments."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import actor_pids, eventually
from steps import step_until

import raylaunch
from raylaunch import EndKind, Timeouts
from raylaunch.worker.processes import PARENT, stat_fields

#: A module that takes its time to be imported, once in each forker.
SLOW = """
import os, time
open(f"{os.environ['FOLDER']}/importing-{os.getpid()}", "w").close()
while not os.path.exists(f"{os.environ['FOLDER']}/go-on"):
    time.sleep(0.01)
"""


@pytest.fixture
def slow(tmp_path):
    """What makes a run's forkers import until there is a file `go-on`."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "slow_to_import.py").write_text(SLOW)
    return {
        "isolation": "process",
        "preload": ("slow_to_import",),
        "env": {"FOLDER": str(tmp_path), "PYTHONPATH": str(tmp_path / "lib")},
    }


def importing(folder: Path) -> int:
    """Wait until a forker imports; its pid."""
    (found,) = eventually(lambda: list(folder.glob("importing-*")), "a forker imports")
    return int(found.name.removeprefix("importing-"))


def forker_of(cluster, run) -> int:
    """The forker of a run on one node: the parent of what holds a worker's store."""
    return int(stat_fields(cluster.member(run, 0).process.pid)[PARENT])


def agent_of(cluster) -> int:
    """The agent of the only run on a cluster of one node."""
    eventually(lambda: len(actor_pids(cluster.nodes[0], "NodeAgent")) == 1, "an earlier run's agent is gone")
    (agent,) = actor_pids(cluster.nodes[0], "NodeAgent")
    return agent


@pytest.mark.parametrize("whom", ["forker", pytest.param("agent", marks=pytest.mark.slow)])
def test_what_dies_while_seats_start_is_started_again_and_charged_to_nobody(one_node, start, tmp_path, slow, whom):
    run = start(os.getpid, num_workers=2, max_restarts=0, **slow)
    forker = importing(tmp_path)
    run.wait_for_event("BundlesPlaced")
    time.sleep(0.5)  # until seats wait for their stores: nothing tells
    os.kill(forker if whom == "forker" else agent_of(one_node), signal.SIGKILL)
    (tmp_path / "go-on").touch()
    assert run.result().restarts == 0


def test_a_run_that_fails_while_its_forker_imports_is_over_at_once(one_node, start, tmp_path, slow):
    run = start(os.getpid, num_workers=2, max_restarts=0, timeouts=Timeouts(start=1.0, stop=600.0), **slow)
    importing(tmp_path)
    assert run.error().root_cause.ending.kind is EndKind.TIMED_OUT


@pytest.mark.parametrize(
    ("working_dir", "told"), [("HERE", "Ray can't start workers like"), ("file:///no/such.zip", "runtime_env can't be")]
)
def test_a_runtime_env_that_can_not_work_ends_the_run_at_once(one_node, start, tmp_path, working_dir, told):
    runtime_env = {"working_dir": working_dir.replace("HERE", str(tmp_path))}  # Ray takes a folder from ray.init only
    error = start(os.getpid, isolation="process", runtime_env=runtime_env).error()
    assert error.root_cause.ending.kind is EndKind.CANNOT_WORK
    assert told in str(error)


def test_a_fork_that_leaves_train_fn_and_a_closed_stderr_change_nothing_about_how_a_rank_ends(one_node, tmp_path):
    def forks():
        if not os.fork():
            raise ValueError("the fork's own")
        os.wait()
        os._exit(5)

    def closes_stderr():
        sys.stderr.close()
        raise ValueError("mine")

    def removes_a_variable():
        del os.environ["CUDA_VISIBLE_DEVICES"]
        return raylaunch.get_context().world_size

    with raylaunch.Launcher(num_workers=2, isolation="process", log_dir=str(tmp_path)) as launcher:
        for train_fn, told in ((forks, "exited with code 5"), (closes_stderr, "raised ValueError: mine")):
            with pytest.raises(raylaunch.RunFailedError) as failed:
                launcher.run(train_fn, max_restarts=0)
            assert failed.value.root_cause.ending.describe().startswith(told)
        assert list(launcher.run(removes_a_variable)) == [2, 2]


@pytest.fixture(scope="module")
def gpu_node(clusters):
    """A cluster of one node with two fake GPUs, for the module."""
    yield clusters.take({"nodes": 1, "cpus": 4, "gpus": 2})
    clusters.give_back()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["forker", "agent"])
def test_what_is_stopped_is_ended_after_a_lease_and_started_again(one_node, start, gate, whom):
    """A stopped forker doesn't tell how ranks end; a stopped agent tells nothing at all."""
    run = start(
        step_until,
        args=(gate("enough"),),
        num_workers=2,
        isolation="process",
        timeouts=Timeouts(lease=2.0, stop=1.0),
    )
    run.running()
    stopped = forker_of(one_node, run) if whom == "forker" else agent_of(one_node)
    os.kill(stopped, signal.SIGSTOP)
    one_node.kill_worker(run, 1)
    run.running(generation=2)
    gate("enough").touch()
    (recovery,) = run.result().recoveries
    cause = {"forker": "the process that forks its node's ranks is gone", "agent": "the agent of its node"}
    assert cause[whom] in recovery.cause


@pytest.mark.slow  # for its cluster's start
@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ({}, [("cuda:0", "0,1"), ("cuda:1", "0,1")]),
        ({"virtual_local_rank": True}, [("cuda:0", "0"), ("cuda:0", "1")]),
    ],
)
def test_functions_in_processes_see_their_gpus_also_fake_ones(gpu_node, tmp_path, more, seen):
    def devices():
        return raylaunch.get_context().device, os.environ["CUDA_VISIBLE_DEVICES"]

    result = raylaunch.run(
        devices, num_workers=2, use_gpu=True, backend="gloo", isolation="process", log_dir=tmp_path, **more
    )
    assert list(result) == seen
