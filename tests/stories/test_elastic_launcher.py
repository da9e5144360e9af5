"""ElasticLauncher on real clusters: launches, what ranks see of them, devices, files, a debugger."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launches import QUICK

import raylaunch
from raylaunch import ConfigError, ElasticLauncher, RunFailedError
from raylaunch.elastic import set_trace


def what_a_rank_sees(launcher, first, *, second="default"):
    import torch.distributed as dist

    current = raylaunch.get_current_launcher()
    assert current is launcher
    environ = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_NAME", "MASTER_ADDR")}
    return {
        "rank": launcher.rank,
        "local_rank": launcher.local_rank,
        "world_size": launcher.world_size,
        "local_world_size": launcher.local_world_size,
        "group_rank": launcher.group_rank,
        "group_world_size": launcher.group_world_size,
        "role": (launcher.role_name, launcher.role_rank, launcher.role_world_size),
        "restarts": (launcher.restart_count, launcher.max_restarts),
        "rdzv_id": launcher.rdzv_id,
        "assigned_device": str(launcher.assigned_device),
        "devices": [str(device) for device in launcher.devices],
        "backend": (launcher.dist_backend, dist.get_backend()),
        "eager_mode": launcher.eager_mode,
        "endpoint": (
            launcher.master_addr == environ["MASTER_ADDR"],
            launcher.master_port == int(os.environ["MASTER_PORT"]),
        ),
        "environ": environ,
        "arguments": (first, second),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def test_every_rank_sees_where_it_stands_and_the_values_come_back_by_rank(two_nodes, tmp_path):
    launcher = ElasticLauncher(
        "cpu:0-1",
        nnodes=2,
        role="trainer",
        rdzv_id="where",
        max_restarts=2,
        omp_num_threads=1,
        log_dir=str(tmp_path),
        run_options=QUICK,
    )
    values = launcher(what_a_rank_sees, launcher, 1, second="two")
    assert [value["rank"] for value in values] == [0, 1, 2, 3]
    assert [value["local_rank"] for value in values] == [0, 1, 0, 1]
    assert [value["group_rank"] for value in values] == [0, 0, 1, 1]
    last = values[3]
    assert last["environ"] == {
        **last["environ"],
        "RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "ROLE_NAME": "trainer",
    }
    same = {
        "world_size": 4,
        "local_world_size": 2,
        "group_world_size": 2,
        "restarts": (0, 2),
        "rdzv_id": "where",
        "assigned_device": "cpu",
        "devices": ["cpu", "cpu"],
        "backend": ("gloo", "gloo"),
        "eager_mode": False,
        "endpoint": (True, True),
        "arguments": (1, "two"),
        "threads": "1",
    }
    for rank, value in enumerate(values):
        assert {name: value[name] for name in same} == same
        assert value["role"] == ("trainer", rank, 4)
    # On the driver it is outside again.
    assert raylaunch.get_current_launcher().eager_mode
    assert (launcher.rank, launcher.world_size, launcher.rdzv_id) == (0, 1, "where")


@pytest.mark.slow
def test_what_a_rank_raises_is_raised_on_the_driver_and_what_cannot_be_called_is_refused(one_node, tmp_path):
    launcher = ElasticLauncher("cpu:0-1", log_dir=str(tmp_path), run_options=QUICK).freeze()

    def fails(launcher):
        if launcher.rank == 1:
            raise KeyError("column")
        launcher.between_steps()
        launcher.between_steps()  # waits for rank 1

    with pytest.raises(KeyError) as caught:
        launcher(fails, launcher)
    assert isinstance(caught.value, RunFailedError)
    assert caught.value.root_cause.rank == 1
    with pytest.raises(ConfigError, match="don't fit train_fn, which is fails"):
        launcher(fails, launcher, 1)
    with pytest.raises(ConfigError, match="nxcl"):
        launcher.clone().update_params(dist_backend="nxcl")(fails)


@pytest.mark.slow
def test_what_others_decide_is_said_once(one_node, tmp_path, caplog):
    launcher = ElasticLauncher("cpu", master_port=29500, node_rank=3, log_dir=str(tmp_path), run_options=QUICK)
    assert launcher(lambda: os.environ["MASTER_PORT"] == "29500") == [False]
    (said,) = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert "node_rank=3 (the coordinator gives the ranks)" in said
    assert "master_port=29500 (the endpoint has a port that rank 0 has bound)" in said


class Leaves:
    """Notes when its process group is destroyed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, launcher):
        import torch.distributed as dist

        destroy = dist.destroy_process_group

        def noted(*args):
            destroy(*args)
            (self.path / f"{launcher.rank}").touch()

        dist.destroy_process_group = noted
        return dist.is_initialized()


@pytest.mark.slow
def test_the_process_group_is_destroyed_in_the_end(one_node, tmp_path):
    launcher = ElasticLauncher("cpu:0-1", log_dir=str(tmp_path / "runs"), run_options=QUICK)
    (tmp_path / "left").mkdir()
    assert launcher(Leaves(tmp_path / "left"), launcher) == [True, True]
    assert sorted(path.name for path in (tmp_path / "left").iterdir()) == ["0", "1"]


def prints(launcher):
    print(f"out of {launcher.rank}")
    os.write(2, f"err of {launcher.rank}\n".encode())  # as a library does


@pytest.mark.slow
def test_every_rank_has_its_files_and_redirects_and_tee_say_what_the_console_shows(one_node, tmp_path, capfd):
    launcher = ElasticLauncher("cpu:0-1", redirects="2", tee="0:1", log_dir=str(tmp_path), rdzv_id="prints")
    launcher.update_params(run_options=QUICK)
    launcher(prints, launcher)
    folder = tmp_path / "prints" / "generation_1"
    written = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.log")}
    assert written == {
        "0/stdout.log": "out of 0\n",
        "0/stderr.log": "err of 0\n",
        "1/stdout.log": "out of 1\n",
        "1/stderr.log": "err of 1\n",
    }
    shown = capfd.readouterr()
    assert "[default0]:out of 0\n" in shown.out
    assert "of 1" not in shown.out
    assert "err of" not in shown.err


def stops_in_rank_1(launcher):
    value = launcher.rank
    set_trace(rank=1)
    return value


def launches_from_rank_0(launcher):
    """In rank 0 another launch, which its own driver stops, and an eager one; neither is the rank's."""
    if launcher.rank:
        return None
    inner = ElasticLauncher("cpu", run_options=QUICK)

    def steps_until_told(inner):
        steps = 0
        while inner.between_steps(steps):
            steps += 1
            time.sleep(0.01)
        return inner.rank, inner.world_size, steps > 0

    def stop_when_it_steps():
        while not (inner._launching.locked() and inner.events.iteration > 3):
            time.sleep(0.01)
        inner.events.stop_all_tasks.set()

    threading.Thread(target=stop_when_it_steps, daemon=True).start()
    values = inner(steps_until_told, inner)
    alone = ElasticLauncher("cpu", eager_mode=True)
    eager = alone(lambda: [alone.between_steps(step) for step in range(3)])
    outer = raylaunch.get_current_launcher() is launcher and not launcher.events.stop_all_tasks.is_set()
    return values, eager, outer


@pytest.mark.slow
def test_a_rank_can_launch_by_itself_and_its_own_launch_hears_nothing_of_it(one_node, tmp_path):
    launcher = ElasticLauncher("cpu:0-1", log_dir=str(tmp_path), run_options=QUICK)
    assert launcher(launches_from_rank_0, launcher) == [([(0, 1, True)], [[True] * 3], True), None]


@pytest.mark.slow
def test_without_a_launcher_of_its_own_a_run_of_several_refuses_to_stop_in_a_debugger(one_node, tmp_path):
    with pytest.raises(ConfigError, match="ranks wait for one another in the launch of an ElasticLauncher"):
        raylaunch.run(lambda: set_trace(rank=1), num_workers=2, spares=0, max_restarts=0, log_dir=str(tmp_path))


@pytest.mark.slow
def test_a_rank_stops_in_a_debugger_and_the_others_wait(one_node, launch, tmp_path, caplog):
    run = launch(stops_in_rank_1, ElasticLauncher("cpu:0-1"))

    def command():
        found = [re.search(r"raylaunch.elastic.remote_pdb (\S+)", record.getMessage()) for record in caplog.records]
        return next((one[1] for one in found if one), None)

    path = run.wait_until(command, "the debugger")
    assert not run.done()
    typed = "p value\nvalue = 41 + value\nc\n"
    attached = subprocess.run(
        [sys.executable, "-m", "raylaunch.elastic.remote_pdb", path],
        input=typed,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "-> return value" in attached.stdout
    assert "(Pdb) 1\n" in attached.stdout
    assert run.result() == [0, 42]


@pytest.mark.slow
def test_a_debugger_that_nobody_attaches_to_lets_the_rank_go(one_node, tmp_path):
    launcher = ElasticLauncher("cpu:0-1", log_dir=str(tmp_path), run_options=QUICK)

    def stops(launcher):
        set_trace(rank=0, timeout=0.2)
        return launcher.rank

    assert launcher(stops, launcher) == [0, 1]
    missing = subprocess.run(
        [sys.executable, "-m", "raylaunch.elastic.remote_pdb", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert "no debugger waits at" in missing.stderr
