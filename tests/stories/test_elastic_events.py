"""Driver and ranks of a launch talk between the steps: pauses, checkpoints, stops; across nodes and failures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import actor_pids, eventually, nothing_is_left
from steps import any_rank

import raylaunch
from raylaunch import ElasticLauncher

WAIT = 60.0


def trains(launcher, folder: Path):
    """Steps until it is told to stop; each rank writes its steps, rank 0 the checkpoints."""
    generation = raylaunch.get_context().generation
    step = 0

    def save() -> None:
        if launcher.rank == 0:
            (folder / f"saved-{generation}-{step}").touch()

    with (folder / f"{generation}-{launcher.rank}").open("a", buffering=1) as log:
        while launcher.between_steps(step, 1_000_000, save=save):
            any_rank(False)
            step += 1
            log.write(f"{step}\n")
            time.sleep(0.002)
    return launcher.rank, generation, step


def steps_of(folder: Path, generation: int, rank: int) -> int:
    path = folder / f"{generation}-{rank}"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def training(two_nodes, launch, gate):
    """Two ranks on two nodes that step; and the folder of what they write."""
    gate("steps").mkdir()
    run = launch(trains, ElasticLauncher("cpu", nnodes=2, max_restarts=3), gate("steps"))
    run.wait_until(lambda: steps_of(gate("steps"), 1, 1) > 3, "steps of rank 1")
    return run, gate("steps")


def stands_in(launcher, generation: int) -> bool:
    """The driver knows of this generation."""
    return launcher._copy.group.generation >= generation and launcher._copy.group.world_size > 0


def test_a_rank_killed_between_pause_and_resume_leaves_the_next_generation_paused(two_nodes, training):
    run, folder = training
    events = run.launcher.events
    events.pause.set()
    assert events.paused.wait(WAIT)
    assert steps_of(folder, 1, 0) == steps_of(folder, 1, 1)  # at the same step
    two_nodes.kill_worker(run.id, 1)
    run.wait_until(lambda: stands_in(run.launcher, 2), "the second generation")
    assert events.paused.wait(WAIT)
    assert (steps_of(folder, 2, 0), steps_of(folder, 2, 1)) == (0, 0)
    assert not events.resume.is_set()
    events.resume.set()
    run.wait_until(lambda: steps_of(folder, 2, 1) > 3, "steps of the second generation")
    events.stop_all_tasks.set()
    (first, second) = run.result()
    assert (first[:2], second[:2]) == ((0, 2), (1, 2))
    assert first[2] == second[2] > 3


@pytest.mark.slow
def test_a_pause_survives_the_coordinator_and_the_generation_formed_after_it(two_nodes, training):
    run, folder = training
    events = run.launcher.events
    events.pause.set()
    assert events.paused.wait(WAIT)
    (pid,) = actor_pids(two_nodes.nodes[0], "CoordinatorActor")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid), "the coordinator is gone")
    run.running()  # it is back
    two_nodes.kill_worker(run.id, 0)
    run.wait_until(lambda: stands_in(run.launcher, 2), "the second generation")
    assert events.paused.wait(WAIT)
    assert (steps_of(folder, 2, 0), steps_of(folder, 2, 1)) == (0, 0)
    events.resume.set()
    run.wait_until(lambda: steps_of(folder, 2, 1) > 3, "steps of the second generation")
    events.stop_all_tasks.set()
    assert [rank for rank, _, _ in run.result()] == [0, 1]


def test_checkpoints_are_saved_when_asked_for_also_in_a_pause(training):
    run, folder = training
    events = run.launcher.events
    assert not events.finished_save_checkpoint.is_set()
    events.trigger_save_checkpoint.set()
    assert events.finished_save_checkpoint.wait(WAIT)
    assert len(list(folder.glob("saved-1-*"))) == 1
    events.pause.set()
    assert events.paused.wait(WAIT)
    before = steps_of(folder, 1, 0)
    events.trigger_save_checkpoint.set()
    assert not events.finished_save_checkpoint.is_set() or len(list(folder.glob("saved-1-*"))) == 2
    assert events.finished_save_checkpoint.wait(WAIT)
    assert (folder / f"saved-1-{before}").exists()
    assert steps_of(folder, 1, 0) == before  # still paused
    assert events.iteration == before
    assert events.total == 1_000_000
    events.stop_all_tasks.set()  # ends a pause too
    assert [step for _, _, step in run.result()] == [before, before]
    assert not events.stop_all_tasks.is_set()  # the next launch begins with nothing


def saves(launcher):
    """Steps with all others; returns at which steps a checkpoint was saved, and how many there were."""
    saved: list[int] = []
    steps: list[int] = []
    while launcher.between_steps(len(steps), save=lambda: saved.append(len(steps))):
        any_rank(False)
        steps.append(1)
    return saved, len(steps)


@pytest.mark.slow
def test_however_quickly_requests_follow_one_another_all_ranks_do_the_same(one_node, launch):
    chance = random.Random(7)
    run = launch(saves, ElasticLauncher("cpu:0-2"))
    events = run.launcher.events
    run.wait_until(lambda: events.iteration > 10, "steps")
    for _ in range(200):
        chance.choice([events.pause, events.resume, events.trigger_save_checkpoint]).set()
        time.sleep(chance.choice([0, 0, 0.001, 0.01, 0.03]))
    events.resume.set()
    events.trigger_save_checkpoint.set()
    assert events.finished_save_checkpoint.wait(WAIT)
    before = events.iteration
    run.wait_until(lambda: events.iteration > before + 10, "further steps")
    events.stop_all_tasks.set()
    first, *others = run.result()
    assert others == [first, first]
    assert len(first[0]) > 5


@pytest.mark.slow
def test_what_is_set_before_a_launch_stands_when_it_begins(two_nodes, launch, gate):
    gate("steps").mkdir()
    launcher = ElasticLauncher("cpu")
    launcher.events.stop_all_tasks.set()
    run = launch(trains, launcher, gate("steps"))
    assert run.result() == [(0, 1, 0)]


INTERRUPTED = """
import sys, time
from pathlib import Path
import ray, raylaunch

def trains(launcher, folder):
    step = 0
    def save():
        Path(folder, "saved").touch()
    while launcher.between_steps(step, save=save):
        step += 1
        Path(folder, "steps").touch()
        time.sleep(0.01)

def never_asks(launcher, folder):
    Path(folder, "steps").touch()
    time.sleep(1000)

ray.init(address={address!r}, log_to_driver=False)
launcher = raylaunch.ElasticLauncher("cpu", on_interrupt={policy!r}, save_timeout=10)
launcher.update_params(log_dir={folder!r} + "/runs", run_options={{"spares": 0}})
launcher(globals()[{function!r}], launcher, {folder!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "policy", "said"),
    [
        ("trains", "save_then_stop", "a checkpoint is saved before"),
        ("trains", "stop", ""),
        ("never_asks", "save_then_stop", "no checkpoint was saved within 10 s"),
    ],
)
def test_ctrl_c_on_the_driver_does_what_the_policy_says(one_node, tmp_path, function, policy, said):
    script = INTERRUPTED.format(address=one_node.address, policy=policy, folder=str(tmp_path), function=function)
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as driver:
        eventually((tmp_path / "steps").exists, "it trains")
        driver.send_signal(signal.SIGINT)
        _, said_there = driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert "KeyboardInterrupt" in said_there
    assert said in said_there
    assert (tmp_path / "saved").exists() == ((function, policy) == ("trains", "save_then_stop"))
    nothing_is_left(tmp_path / "runs")


@pytest.mark.slow
def test_ctrl_c_once_more_stops_without_the_checkpoint(one_node, tmp_path):
    script = INTERRUPTED.format(
        address=one_node.address, policy="save_then_stop", folder=str(tmp_path), function="never_asks"
    ).replace("save_timeout=10", "save_timeout=1000")
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as driver:
        eventually((tmp_path / "steps").exists, "it trains")
        driver.send_signal(signal.SIGINT)
        assert driver.stderr is not None
        while "once more stops it at once" not in driver.stderr.readline():
            assert driver.poll() is None
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    assert "stopping without the checkpoint" in said
    nothing_is_left(tmp_path / "runs")
