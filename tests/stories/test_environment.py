"""What a rank finds around it: torchrun's environment, what was copied from the driver, its GPUs, a port that holds.

The cluster is started under `env -i`: a local one inherits the driver's environment, and nothing could be missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import eventually

import raylaunch

#: A node with 4 CPUs and 4 GPUs, and one with 2 CPUs and 2 GPUs; lives until its stdin is closed.
CLUSTER = """
import sys
from raylaunch.testing.cluster import LocalCluster
with LocalCluster(nodes=1, cpus=4, gpus=4) as cluster:
    cluster.add_node(cpus=2, gpus=2)
    print("cluster", cluster.address, *(node.node_id for node in cluster.nodes), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def two_nodes():
    """The cluster, with this process as its driver."""
    import ray

    clean = ["env", "-i", f"PATH={os.environ['PATH']}", "RAYLAUNCH_FAKE_GPUS=1"]
    with subprocess.Popen(
        [*clean, sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        words = next(line.split() for line in process.stdout if line.startswith("cluster "))
        ray.init(address=words[1], log_to_driver=False)
        yield SimpleNamespace(address=words[1], nodes=words[2:])
        ray.shutdown()
        process.stdin.close()
        assert process.wait(60) == 0


# -- the driver's environment ----------------------------------------------------------------------------------------


def environment() -> tuple[dict[str, str], int]:
    import torch

    return dict(os.environ), torch.get_num_threads()


@pytest.fixture
def driver_env(monkeypatch):
    """What stands in the driver's environment."""
    given = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/data/hf",
        "OMP_NUM_THREADS": "2",
        "MY_FLAG": "on",
        "RANK": "7",
        "MASTER_ADDR": "elsewhere",
        "SLURM_PROCID": "7",
        "PMI_RANK": "7",
        "RAY_OF_THE_DRIVER": "1",
        "CUDA_VISIBLE_DEVICES": "5",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_what_libraries_read_reaches_the_ranks_and_what_other_launchers_set_does_not(two_nodes, start, driver_env):
    ((env, threads),) = start(environment).result()
    assert (env["NCCL_DEBUG"], env["HF_HOME"]) == ("INFO", "/data/hf")
    assert (env["OMP_NUM_THREADS"], threads) == ("2", 2)  # there before torch was imported
    assert "MY_FLAG" not in env
    assert (env["RANK"], env["MASTER_ADDR"]) == ("0", raylaunch_host())
    assert not {"SLURM_PROCID", "PMI_RANK", "RAY_OF_THE_DRIVER"} & set(env)
    assert env["CUDA_VISIBLE_DEVICES"] == ""  # no GPU was asked for
    assert env["ACCELERATE_USE_CPU"] == "true"


def raylaunch_host() -> str:
    import ray

    return ray.util.get_node_ip_address()


@pytest.mark.slow
def test_copy_env_changes_what_is_copied_and_env_goes_over_it(two_nodes, start, driver_env):
    run = start(environment, copy_env=("MY_*", "HF_*", "*RANK", "SLURM_*", "RAY_*"), env={"HF_HOME": "/mine"})
    ((env, threads),) = run.result()
    assert env["MY_FLAG"] == "on"
    assert env["HF_HOME"] == "/mine"
    assert "NCCL_DEBUG" not in env
    assert (env["OMP_NUM_THREADS"], threads) == ("1", 1)  # one CPU each
    assert env["RANK"] == "0"
    assert not {"SLURM_PROCID", "PMI_RANK", "RAY_OF_THE_DRIVER"} & set(env)


# -- torchrun's ------------------------------------------------------------------------------------------------------


def trains_as_under_torchrun():
    """A script's main() as it is written for torchrun: the environment is all that it knows."""
    import torch
    import torch.distributed as dist

    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"])])
    dist.all_reduce(total)
    return dict(os.environ), raylaunch.get_context(), total.item(), torch.get_num_threads()


def test_every_rank_on_uneven_nodes_has_torchruns_whole_environment(two_nodes, start):
    run = start(trains_as_under_torchrun, num_workers=3, resources_per_worker={"CPU": 2}, backend=None, max_restarts=5)
    result = run.result()
    envs = [env for env, _, _, _ in result]
    assert [total for _, _, total, _ in result] == [3.0, 3.0, 3.0]
    assert [threads for _, _, _, threads in result] == [2, 2, 2]

    def column(name):
        return [env[name] for env in envs]

    assert column("RANK") == column("ROLE_RANK") == ["0", "1", "2"]
    # Contiguous per node; which node is first is nobody's business.
    bigger_first = column("LOCAL_RANK") == ["0", "1", "0"]
    assert column("LOCAL_RANK") == (["0", "1", "0"] if bigger_first else ["0", "0", "1"])
    assert column("LOCAL_WORLD_SIZE") == (["2", "2", "1"] if bigger_first else ["1", "2", "2"])
    assert column("GROUP_RANK") == column("NODE_RANK") == (["0", "0", "1"] if bigger_first else ["0", "1", "1"])
    same_on_all = {
        "WORLD_SIZE": "3",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "3",
        "ROLE_NAME": "default",
        "MASTER_ADDR": raylaunch_host(),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "5",
        "TORCHELASTIC_RUN_ID": run.id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "2",
        "RAYLAUNCH_RUN_ID": run.id,
        "RAYLAUNCH_GENERATION": "1",
    }
    for name, value in same_on_all.items():
        assert column(name) == [value] * 3, name
    assert len(set(column("MASTER_PORT"))) == 1
    assert len(set(column("TORCHELASTIC_ERROR_FILE"))) == 3
    assert all(column("GLOO_SOCKET_IFNAME"))


def test_the_context_says_what_the_environment_says(two_nodes, start):
    for env, context, _, _ in start(trains_as_under_torchrun, num_workers=2, backend=None, max_restarts=4).result():
        told = {
            "RANK": context.rank,
            "LOCAL_RANK": context.local_rank,
            "WORLD_SIZE": context.world_size,
            "LOCAL_WORLD_SIZE": context.local_world_size,
            "NODE_RANK": context.node_rank,
            "MASTER_ADDR": context.master_addr,
            "MASTER_PORT": context.master_port,
            "TORCHELASTIC_RUN_ID": context.run_id,
            "TORCHELASTIC_RESTART_COUNT": context.restart_count,
            "TORCHELASTIC_MAX_RESTARTS": context.max_restarts,
            "RAYLAUNCH_GENERATION": context.generation,
        }
        assert told.items() <= {name: type(told.get(name, ""))(value) for name, value in env.items()}.items()
        assert context.device == "cpu"


# -- GPUs ------------------------------------------------------------------------------------------------------------


def what_it_sees():
    context = raylaunch.get_context()
    assert context.local_rank == int(os.environ["LOCAL_RANK"])
    assert context.device == f"cuda:{context.local_rank}"
    assert "ACCELERATE_USE_CPU" not in os.environ
    return context.local_rank, os.environ["CUDA_VISIBLE_DEVICES"].split(",")


@pytest.fixture
def train_on_gpus(start):
    """What each rank sees: (LOCAL_RANK, devices). The GPUs are fake, hence gloo."""

    def train(**arguments):
        return list(start(what_it_sees, use_gpu=True, backend="gloo", **arguments).result())

    return train


def test_the_ranks_of_a_node_see_the_same_gpus_and_local_rank_is_the_index_of_their_own(two_nodes, train_on_gpus):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    big = two_nodes.nodes[0]
    somebody = placement_group([{"GPU": 1}], bundle_label_selector=[{"ray.io/node-id": big}])
    ray.get(somebody.ready())
    try:
        result = train_on_gpus(num_workers=3)  # of which there is room for three on the big node only
        assert len({tuple(devices) for _, devices in result}) == 1
        (_, devices), *_ = result
        assert devices == sorted(devices)
        assert len(set(devices)) == 3  # never the one that is somebody else's
        assert [local_rank for local_rank, _ in result] == [0, 1, 2]
    finally:
        remove_placement_group(somebody)


def test_with_virtual_local_rank_each_sees_only_its_own_gpus(two_nodes, train_on_gpus):
    label = {"ray.io/node-id": two_nodes.nodes[0]}
    result = train_on_gpus(
        num_workers=2, resources_per_worker={"GPU": 2}, virtual_local_rank=True, label_selector=label
    )
    assert [local_rank for local_rank, _ in result] == [0, 0]
    assert [len(devices) for _, devices in result] == [2, 2]
    assert len({device for _, devices in result for device in devices}) == 4


@pytest.mark.slow
def test_the_workers_of_one_bundle_share_its_list_and_each_has_its_own(two_nodes, train_on_gpus):
    first, second = train_on_gpus(num_workers=2, workers_per_node=2)
    assert first[1] == second[1]
    assert len(set(first[1])) == 2
    assert (first[0], second[0]) == (0, 1)


def test_workers_may_share_a_gpu_with_gloo(two_nodes, train_on_gpus):
    result = train_on_gpus(num_workers=2, resources_per_worker={"GPU": 0.5}, workers_per_node=2)
    (device,) = {device for _, devices in result for device in devices}
    assert result == [(0, [device]), (0, [device])]


# -- ports -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def port_thieves(tmp_path):
    """Thieves at work on all ephemeral ports; two, since a process may hold only so many."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    middle = (low + high) // 2
    thief = str(Path(__file__).with_name("port_thief.py"))
    ready = [tmp_path / "low", tmp_path / "high"]
    thieves = [
        subprocess.Popen([sys.executable, thief, str(start), str(stop), str(tell)])
        for start, stop, tell in ((low, middle, ready[0]), (middle, high + 1, ready[1]))
    ]
    try:
        eventually(lambda: all(tell.exists() for tell in ready), "the thieves are at work")
        yield
        assert all(thief.poll() is None for thief in thieves)
    finally:
        for thief in thieves:
            thief.kill()
            thief.wait()


def test_a_process_that_steals_ports_changes_nothing(two_nodes, start, port_thieves):
    result = start(trains_as_under_torchrun, num_workers=2, placement_strategy="SPREAD", backend=None).result()
    assert [total for _, _, total, _ in result] == [1.0, 1.0]
    assert result.restarts == 0
    assert result.generation == 1
