"""How many workers a node gets is asked of the cluster's nodes, never of the launcher's machine."""

from __future__ import annotations

import pytest

from raylaunch.errors import ConfigError
from raylaunch.torchrun.sizing import Size, Wish, size_for

GPU_NODES = [{"CPU": 16, "GPU": 8}, {"CPU": 16, "GPU": 8}, {"CPU": 16, "GPU": 4}, {"CPU": 4}]
CPU_NODES = [{"CPU": 4}, {"CPU": 2}]


def wish(per_node, *, use_gpu=None, min_nodes=1, **resources) -> Wish:
    return Wish(per_node, use_gpu, resources, min_nodes)


@pytest.mark.parametrize(
    ("asked", "nodes", "size"),
    [
        (wish("gpu", use_gpu=True), GPU_NODES, Size(8, use_gpu=True)),
        (wish("gpu", use_gpu=True, min_nodes=2), GPU_NODES, Size(8, use_gpu=True)),
        (wish("gpu", use_gpu=True, min_nodes=3), GPU_NODES, Size(4, use_gpu=True)),
        (wish("gpu", use_gpu=True, min_nodes=9), GPU_NODES, Size(4, use_gpu=True)),  # it will wait for more nodes
        (wish("auto"), GPU_NODES, Size(8, use_gpu=True)),
        (wish("auto"), CPU_NODES, Size(4, use_gpu=False)),
        (wish("auto", use_gpu=False), GPU_NODES, Size(16, use_gpu=False)),
        (wish("cpu", use_gpu=False), GPU_NODES, Size(16, use_gpu=False)),
        (wish("cpu", use_gpu=False, min_nodes=2), CPU_NODES, Size(2, use_gpu=False)),
        (wish("cpu", use_gpu=False, CPU=2), CPU_NODES, Size(2, use_gpu=False)),
        (wish("gpu", use_gpu=True, CPU=4), GPU_NODES, Size(4, use_gpu=True)),  # the CPUs are what runs out
        (wish("gpu", use_gpu=True, GPU=0.5), GPU_NODES, Size(16, use_gpu=True)),
        (wish(4), GPU_NODES, Size(4, use_gpu=True)),
        (wish(4), CPU_NODES, Size(4, use_gpu=False)),
        (wish(None), GPU_NODES, Size(None, use_gpu=True)),
        (wish(None), CPU_NODES, Size(None, use_gpu=False)),
        (wish(4, use_gpu=True), CPU_NODES, Size(4, use_gpu=True)),  # it will wait for them
    ],
)
def test_size(asked, nodes, size):
    assert size_for(asked, nodes) == size


def test_gpus_that_are_too_few_are_not_used_and_that_is_said():
    size = size_for(wish(16), GPU_NODES)
    assert not size.use_gpu
    assert "no node has 16 GPUs (the most is 8)" in size.note


@pytest.mark.parametrize(("asked", "nodes"), [(wish("gpu", use_gpu=True), CPU_NODES), (wish("cpu", CPU=9), CPU_NODES)])
def test_nothing_to_count_is_refused(asked, nodes):
    with pytest.raises(ConfigError, match="no node of the cluster has"):
        size_for(asked, nodes)
