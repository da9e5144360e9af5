"""`raylaunch run` on a node with GPUs: who gets them, and what each worker sees of them."""

from __future__ import annotations

import pytest
from command_lines import SEES, said


@pytest.fixture(scope="module")
def gpu_node(clusters):
    """A cluster of one node with two fake GPUs, for the module."""
    yield clusters.take({"nodes": 1, "cpus": 4, "gpus": 2})
    clusters.give_back()


def seen(run) -> list[tuple[str, str, str]]:
    assert run.exit_code() == 0, run.stderr
    envs = [said(run, f"sees-{rank}")["env"] for rank in (0, 1)]
    return [(env["WORLD_SIZE"], env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) for env in envs]


def test_a_worker_for_each_gpu_and_each_sees_all_of_its_node(gpu_node, command):
    assert seen(command("LOGS --nproc-per-node=gpu train.py", SEES)) == [("2", "0", "0,1"), ("2", "1", "0,1")]


def test_with_virtual_local_ranks_each_sees_only_its_own(gpu_node, command):
    """GPUs are used where the cluster has them, though nobody has said so."""
    line = "LOGS --nproc-per-node=2 --virtual-local-rank train.py"
    assert seen(command(line, SEES)) == [("2", "0", "0"), ("2", "0", "1")]


@pytest.mark.slow
def test_no_gpu_when_nobody_wants_one(gpu_node, command):
    assert seen(command("LOGS --nproc-per-node=2 --no-use-gpu train.py", SEES)) == [("2", "0", ""), ("2", "1", "")]
