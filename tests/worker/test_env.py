"""A worker's environment: what the driver gives, what a rank gets, and who owns an address."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import replace

import pytest

from raylaunch.coordinator.commands import Assignment
from raylaunch.errors import ConfigError
from raylaunch.worker.env import (
    DEFAULT_COPY_ENV,
    check_env,
    command_env,
    copied_env,
    interface_of,
    rank_env,
    spare_env,
)

ASSIGNMENT = Assignment(
    generation=4,
    rank=5,
    local_rank=1,
    node_rank=2,
    world_size=8,
    local_world_size=2,
    num_nodes=4,
    master_addr="10.0.0.7",
    master_port=4711,
    restart_count=1,
    devices=("2", "3"),
    own_devices=(1,),
)


def env_of(assignment: Assignment, *, use_gpu: bool = True, virtual: bool = False) -> dict[str, str]:
    return rank_env(
        assignment,
        run_id="abc",
        max_restarts=3,
        error_file="/tmp/error.json",
        virtual_local_rank=virtual,
        use_gpu=use_gpu,
    )


def spare(copied: dict[str, str] | None = None, env: dict[str, str] | None = None, **changes) -> dict[str, str]:
    arguments = {"run_id": "abc", "cpus_per_worker": 4.0, "use_gpu": True, "host": "127.0.0.1", **changes}
    return spare_env(copied=copied or {}, env=env or {}, **arguments)


def test_a_rank_has_torchruns_whole_environment(monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    assert {**spare(), **env_of(ASSIGNMENT)} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "GROUP_WORLD_SIZE": "4",
        "NODE_RANK": "2",
        "ROLE_NAME": "default",
        "ROLE_RANK": "5",
        "ROLE_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "4711",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "abc",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": "/tmp/error.json",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "OMP_NUM_THREADS": "4",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAYLAUNCH_RUN_ID": "abc",
        "RAYLAUNCH_GENERATION": "4",
    }


@pytest.mark.parametrize(
    ("changes", "virtual", "local_rank", "visible"),
    [
        ({}, False, "1", "2,3"),
        ({}, True, "0", "3"),
        # two GPUs each
        ({"devices": ("0", "1", "2", "3"), "own_devices": (2, 3)}, True, "0", "2,3"),
        # a third of a GPU each: LOCAL_RANK 1 would be the other GPU, LOCAL_RANK 2 none
        ({"local_world_size": 3, "own_devices": (0,)}, False, "0", "2"),
        ({"local_world_size": 3, "local_rank": 2, "own_devices": (1,)}, False, "0", "3"),
        # half a GPU each, all of one
        ({"devices": ("GPU-5ae2",), "own_devices": (0,)}, False, "0", "GPU-5ae2"),
    ],
)
def test_local_rank_indexes_the_visible_devices(changes, virtual, local_rank, visible):
    env = env_of(replace(ASSIGNMENT, **changes), virtual=virtual)
    assert (env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) == (local_rank, visible)


@pytest.mark.parametrize(("virtual", "local_rank"), [(False, "1"), (True, "0")])
def test_without_gpus_none_is_visible(virtual, local_rank):
    env = env_of(replace(ASSIGNMENT, devices=(), own_devices=()), use_gpu=False, virtual=virtual)
    assert (env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) == (local_rank, "")


def test_the_drivers_environment_is_copied_by_pattern_and_never_whole():
    given = {
        "NCCL_DEBUG": "INFO",
        "TORCH_LOGS": "recompiles",
        "WANDB_API_KEY": "k",
        "DS_ACCELERATOR": "cpu",
        "CUDA_LAUNCH_BLOCKING": "1",
        "LOGLEVEL": "INFO",
        "PATH": "/bin",
        "nccl_debug": "lower",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    assert set(copied_env(given, DEFAULT_COPY_ENV)) == {
        "NCCL_DEBUG",
        "TORCH_LOGS",
        "WANDB_API_KEY",
        "DS_ACCELERATOR",
        "CUDA_LAUNCH_BLOCKING",
        "LOGLEVEL",
    }
    assert copied_env(given, ("AWS_*", "PATH")) == {"AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin"}


def test_what_another_launcher_or_ray_set_is_never_copied():
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK ROLE_RANK ROLE_NAME "
    names += "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE "
    names += "RAYLAUNCH_RUN_ID RAYLAUNCH_GENERATION SLURM_NTASKS SLURMD_NODENAME PMI_RANK PMIX_RANK "
    names += "OMPI_COMM_WORLD_RANK RAY_ADDRESS CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES "
    names += "NVIDIA_VISIBLE_DEVICES"
    assert copied_env(dict.fromkeys(names.split(), "1"), ("*",)) == {}
    with pytest.raises(ConfigError, match=r"copy_env='WANDB_\*': must be a sequence of patterns"):
        copied_env({}, "WANDB_*")


def test_the_users_env_goes_over_what_was_copied_and_both_over_the_defaults(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    env = spare({"OMP_NUM_THREADS": "2", "HF_HOME": "a"}, {"HF_HOME": "b", "GLOO_SOCKET_IFNAME": "ib0"})
    assert (env["OMP_NUM_THREADS"], env["HF_HOME"], env["GLOO_SOCKET_IFNAME"]) == ("2", "b", "ib0")
    assert spare(use_gpu=False)["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in spare()
    assert spare(cpus_per_worker=0.5)["OMP_NUM_THREADS"] == "1"
    assert "GLOO_SOCKET_IFNAME" not in spare(host="203.0.113.9")


def test_what_the_node_itself_gives_stays_but_for_rays_thread_count(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env = spare()
    assert not {"GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING"} & set(env)
    assert env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"RANK": "3"}, r"env\['RANK'\]='3': raylaunch sets this variable itself"),
        ({"MASTER_PORT": "1"}, "raylaunch sets this variable itself"),
        ({"TORCHELASTIC_RUN_ID": "1"}, "raylaunch sets this variable itself"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "those that Ray reserved"),
        ({"N": 3}, r"env\['N'\]=3: names and values of environment variables must be strings"),
        ({3: "N"}, r"env\[3\]='N': names and values"),
        ({"A=B": "1"}, "no '=' in it"),
        ({"": "1"}, "no empty name"),
        ({"A": "\0"}, "no zero byte"),
        (["A=1"], r"env=\['A=1'\]: must map"),
    ],
)
def test_an_env_that_cannot_work_is_refused(mapping, words):
    with pytest.raises(ConfigError, match=words):
        check_env("env", mapping)


def test_an_env_that_can_work_is_not_refused():
    check_env("env", {"MY_FLAG": "1", "RANKING": "best", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "NCCL_DEBUG": "INFO"})


def command(node: dict[str, str], driver: dict[str, str], env: dict[str, str] | None = None) -> dict[str, str]:
    return command_env(
        node,
        run_id="abc",
        copied=copied_env(driver, ("*",)),
        env=env or {},
        cpus_per_worker=2.5,
        use_gpu=False,
        host="127.0.0.1",
    )


def test_a_command_has_the_drivers_whole_environment_over_the_nodes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    node = {"PATH": "/node", "ONLY_NODE": "1", "HOSTNAME": "node", "OMP_NUM_THREADS": "1"}
    driver = {"PATH": "/driver", "ANYTHING": "a=b", "HOSTNAME": "driver", "HOME": "/home/me"}
    seen = command(node, driver, {"ANYTHING": "mine"})
    expected = {"PATH": "/driver", "ONLY_NODE": "1", "HOSTNAME": "node", "HOME": "/home/me", "ANYTHING": "mine"}
    assert {name: seen[name] for name in expected} == expected
    assert seen["OMP_NUM_THREADS"] == "2"  # by its CPUs: what the node has is Ray's own
    assert command(node, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert command({}, {})["RAYLAUNCH_RUN_ID"] == "abc"  # a cluster that was started under `env -i`


@pytest.mark.parametrize("where", ["node", "driver"])
def test_what_others_have_set_for_themselves_reaches_no_command(where):
    others = {
        "RANK": "3",
        "MASTER_ADDR": "elsewhere",
        "TORCHELASTIC_RUN_ID": "other",
        "SLURM_PROCID": "3",
        "PMI_RANK": "3",
        "OMPI_COMM_WORLD_RANK": "3",
        "RAY_JOB_ID": "3",
        "CUDA_VISIBLE_DEVICES": "0",
        "RAYLAUNCH_TOKEN": "other",
        "MPI_LOCALRANKID": "3",
        "MV2_COMM_WORLD_RANK": "3",
        "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace",
    }
    node, driver = (others, {}) if where == "node" else ({}, others)
    assert not set(command(node, driver)) & set(others)
    assert command(node, {"PYTHONBREAKPOINT": "0"})["PYTHONBREAKPOINT"] == "0"  # the user's own


def test_what_runtime_env_ships_stays_importable():
    assert command({"PYTHONPATH": "/shipped"}, {"PYTHONPATH": "/mine:/shipped"})["PYTHONPATH"] == "/shipped:/mine"
    assert "PYTHONPATH" not in command({}, {})


def test_the_interface_that_owns_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("127.0.1.1") == "lo"
    assert interface_of("203.0.113.9") is None
    # every address that this machine has, as the kernel lists it
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))
            except OSError:
                continue
        assert interface_of(socket.inet_ntoa(answer[20:24])) == name


def test_nothing_here_changes_the_environment():
    before = dict(os.environ)
    spare()
    env_of(ASSIGNMENT)
    assert dict(os.environ) == before
