"""raylaunch.distutils alone, in groups of 1, 2 and 4, under Slurm's variables, under torchrun, in raylaunch's workers.

What must hold everywhere stands in distutils_checks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distutils_checks import CHECKS, run_checks

import raylaunch

GANG = Path(__file__).with_name("distutils_gang.py")
CONFIG = {"submit": False, "world_size": None, "cpu": True, "distributed_backend": "gloo"}

#: The plays of distutils_gang.py, and how many ranks each has.
PLAYS = {"alone": 1, "environment": 1, "file1": 1, "file2": 2, "file4": 4, "slurm": 2}


def run_python(*arguments: str) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CURRRENT_DEVICE"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def reports(folder: Path, name: str, size: int) -> list[dict[str, Any]]:
    """What the ranks of a play have left."""
    found = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(size)]
    assert not [report["broken"] for report in found if "broken" in report]
    return found


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All plays, by name."""
    folder = tmp_path_factory.mktemp("distutils")
    run_python(str(GANG), str(folder))
    return {name: reports(folder, name, size) for name, size in PLAYS.items()}


def assert_all_hold(results: list[dict[str, str]]) -> None:
    for rank, checks in enumerate(results):
        broken = {name: trace for name, trace in checks.items() if trace}
        assert not broken, f"rank {rank}: {''.join(broken.values())}"
        assert list(checks) == list(CHECKS)


# -- the checks, everywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("play", PLAYS)
def test_every_check_holds(played, play):
    assert_all_hold([report["checks"] for report in played[play]])


def test_nothing_here_imports_ray(played):
    (report,) = played["alone"]
    assert report["modules"] == ["raylaunch.distutils", "torch"]


@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node=2",
        pytest.param("raylaunch run --standalone --nproc-per-node=2 --spares=0", marks=pytest.mark.slow),
    ],
)
def test_every_check_holds_in_a_script(tmp_path, launcher):
    run_python("-m", *launcher.split(), str(GANG), str(tmp_path), "torchrun")
    found = reports(tmp_path, "torchrun", 2)
    assert_all_hold([report["checks"] for report in found])
    assert [report["timeout"] for report in found] == [30.0, 30.0]  # half a minute was asked for


def in_a_worker() -> dict[str, Any]:
    """What a function on raylaunch finds; it takes the group that is there, or forms one where there is none."""
    from raylaunch import distutils

    context = raylaunch.get_context()
    report: dict[str, Any] = {"there": distutils.initialized(), "device": distutils.get_device_for_local_rank()}
    distutils.setup({**CONFIG, "world_size": context.world_size})
    report["checks"] = run_checks(context.rank, context.world_size)
    distutils.cleanup()
    report["left"] = distutils.initialized()
    return report


@pytest.mark.parametrize("backend", ["gloo", pytest.param(None, marks=pytest.mark.slow)])
def test_every_check_holds_in_the_workers_of_a_run(one_node, start, backend):
    result = start(in_a_worker, num_workers=2, backend=backend).result()
    assert_all_hold([report.pop("checks") for report in result])
    assert list(result) == [{"there": backend == "gloo", "device": "cpu", "left": False}] * 2


# -- setup and cleanup -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("play", ["file1", "file2", "file4"])
def test_after_cleanup_a_process_is_alone_and_setup_forms_another_group(played, play):
    size = PLAYS[play]
    for report in played[play]:
        assert report["left"] == [False, 0, 1, 5]
        assert not report["device_left"]
        assert "in no process group" in report["stale"]
        assert report["again"] == [size, list(range(size))]


def test_one_process_without_a_launcher_forms_a_group_of_one(played):
    (report,) = played["environment"]
    assert report["initialized"]
    assert report["again"] == [True, 1]


def test_slurm_says_who_and_where(played):
    for report in played["slurm"]:
        assert report["timeout"] == 30.0
        assert report["by_file"] == 2
        assert report["files"] == [".distributed-shared-file-0-slurm-7-0"]  # of this job, and this start of it


@pytest.fixture
def nobody(monkeypatch):
    """No launcher, no Slurm."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CURRRENT_DEVICE", raising=False)
    before = dict(os.environ)
    yield monkeypatch
    os.environ.clear()  # distutils sets variables, for the process
    os.environ.update(before)


@pytest.mark.parametrize(
    ("variables", "changes", "error", "told"),
    [
        ({}, {"submit": True}, RuntimeError, "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set"),
        ({"SLURM_JOB_NODELIST": "n1"}, {"submit": True}, RuntimeError, "SLURM_NTASKS is not set"),
        (
            {"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "4"},
            {"submit": True, "world_size": 8},
            raylaunch.ConfigError,
            "world_size=8: the launcher has started 4 ranks",
        ),
        (
            {"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "4", "PATH": "/nowhere"},
            {"submit": True},
            RuntimeError,
            "`scontrol show hostnames n1` failed",
        ),
        ({}, {"world_size": 2}, RuntimeError, "world_size=2, but nothing says where the ranks meet"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "x"}, {"world_size": 2}, raylaunch.ConfigError, "has started 4 ranks"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "x"}, {}, RuntimeError, "the environment variable RANK is not set"),
        (
            {},
            {"init_method": "file", "shared_file_dir": "/no/such/folder"},
            raylaunch.ConfigError,
            "there is no such folder",
        ),
    ],
)
def test_setup_says_why_it_forms_no_group(nobody, variables, changes, error, told):
    from raylaunch import distutils

    for name, value in variables.items():
        nobody.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # put back what setup sets
        nobody.setenv(name, os.environ.get(name, "")) if name in os.environ else nobody.delenv(name, raising=False)
    with pytest.raises(error) as raised:
        distutils.setup({**CONFIG, **changes})
    assert told in str(raised.value)
    assert not distutils.initialized()


def test_scontrol_that_fails_is_told_with_its_words(nobody, tmp_path):
    from raylaunch import distutils

    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Invalid hostlist: n[' >&2\nexit 1\n")
    scontrol.chmod(0o755)
    nobody.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nobody.setenv("SLURM_JOB_NODELIST", "n[")
    nobody.setenv("SLURM_NTASKS", "1")
    with pytest.raises(RuntimeError, match="Invalid hostlist"):
        distutils.setup({**CONFIG, "submit": True})


def test_alone_the_environment_is_that_of_rank_0_of_1(nobody):
    from raylaunch import distutils

    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        nobody.setenv(name, "7")  # so that it is put back
    distutils.setup_env_local()
    assert [distutils.os_environ_get_or_throw(name) for name in names] == ["localhost", "0", "0", "0", "1"]
    nobody.delenv("RANK")
    with pytest.raises(RuntimeError, match="RANK is not set"):
        distutils.os_environ_get_or_throw("RANK")


# -- the device ------------------------------------------------------------------------------------------------------


def test_the_device_is_the_assigned_one_then_raylaunchs_then_a_guess(nobody, caplog):
    from raylaunch import context, distutils

    nobody.setattr("torch.cuda.is_available", lambda: False)
    assert distutils.get_device_for_local_rank() == "cpu"
    assert "no device has been assigned" in caplog.text
    caplog.clear()
    nobody.setattr(context, "_context", raylaunch.Context(run_id="r", device="cuda:1"))
    assert distutils.get_device_for_local_rank() == "cuda:1"
    nobody.setenv(distutils.CURRENT_DEVICE_STR, "put back")
    distutils.assign_device_for_local_rank(cpu=True, local_rank=3)
    assert os.environ["CURRRENT_DEVICE"] == distutils.get_device_for_local_rank() == "cpu"
    with pytest.raises(RuntimeError, match="local_rank=0, but this process sees 0 GPUs"):
        distutils.assign_device_for_local_rank(cpu=False, local_rank=0)
    assert not caplog.text
    nobody.setenv("CURRRENT_DEVICE", "tpu:0")
    with pytest.raises(ValueError, match="'tpu:0' in the environment: must be cpu, cuda or cuda:N"):
        distutils.get_device_for_local_rank()


def on_a_gpu() -> None:
    """In a process of its own: CUDA, and a group with NCCL."""
    import torch

    from raylaunch import distutils

    distutils.setup({"submit": False, "world_size": 1, "cpu": False, "distributed_backend": "nccl"})
    assert distutils.get_device_for_local_rank() == "cuda:0"
    data = torch.arange(3)
    averaged = distutils.all_reduce(data, average=True, device="cuda:0")
    assert (averaged.device.type, averaged.dtype, data.tolist()) == ("cuda", torch.float32, [0, 1, 2])
    moved = distutils.all_reduce(data.float(), device="cuda:0")
    assert moved.device.type == "cuda"
    assert [one.device.type for one in distutils.all_gather(data, device="cuda:0")] == ["cuda"]
    distutils.cleanup()
    assert "CURRRENT_DEVICE" not in os.environ


def test_on_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    program = "import test_distutils; test_distutils.on_a_gpu()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)
