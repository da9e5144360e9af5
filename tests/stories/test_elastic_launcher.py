"""ElasticLauncher on real clusters: launches, what ranks see of them, devices, files, a debugger."""

from __future__ import annotations

import os

import pytest
from harness import Run, eventually

import raylaunch
from raylaunch import ConfigError, ElasticLauncher, RunFailedError

QUICK = {"spares": 0}


class Launch(Run):
    """A launch in the background: the function gets the launcher as its first argument."""

    def __init__(self, cluster, function, launcher, tmp_path, *args):
        self.launcher = launcher.update_params(rdzv_id=f"test-{os.urandom(4).hex()}", log_dir=str(tmp_path / "runs"))
        self.launcher.update_params(run_options={**QUICK, **launcher.config.run_options}).freeze()
        self._args = args
        super().__init__(cluster, function, {"run_id": launcher.config.rdzv_id, "log_dir": launcher.config.log_dir})

    def _carry_out(self, train_fn, arguments):
        return self.launcher(train_fn, self.launcher, *self._args)


@pytest.fixture
def launch(request, tmp_path):
    """Launch in the background on the module's cluster."""
    from harness import nothing_is_left

    name = next(name for name in ("two_nodes", "one_node", "gpu_node") if name in request.fixturenames)
    cluster = request.getfixturevalue(name)
    runs = []

    def start(function, launcher, *args):
        runs.append(Launch(cluster, function, launcher, tmp_path, *args))
        return runs[-1]

    yield start
    for run in runs:
        eventually(run.done, f"{run.id} is over")
    nothing_is_left(tmp_path / "runs")


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
