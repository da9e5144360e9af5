"""Devices of an ElasticLauncher on nodes with four GPUs, which are numbers that Ray believes: hence gloo."""

from __future__ import annotations

import os
import time

import pytest
from launches import QUICK

from raylaunch import ConfigError, ElasticLauncher, RunFailedError, Timeouts


@pytest.fixture(scope="module")
def gpu_nodes(clusters):
    """Two nodes with four GPUs each."""
    yield clusters.take({"nodes": 2, "cpus": 4, "gpus": 4})
    clusters.give_back()


def what_it_gets(launcher):
    visible = [int(index) for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    return launcher.local_rank, str(launcher.assigned_device), [str(device) for device in launcher.devices], visible


def once_there_are_two(launcher):
    while launcher.world_size < 2 and launcher.between_steps():
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture
def on_gpus(gpu_nodes, tmp_path):
    """What each rank gets: its local rank, its device, its node's devices, the GPUs that it sees."""

    def launch(devices, **parameters):
        given = {"dist_backend": "gloo", "log_dir": str(tmp_path), "run_options": QUICK, **parameters}
        launcher = ElasticLauncher(devices, **given)
        return launcher(what_it_gets, launcher)

    return launch


def free_gpus():
    import ray

    return ray.available_resources().get("GPU", 0)


@pytest.mark.slow
def test_all_gpus_of_a_node(on_gpus):
    values = on_gpus("cuda:*")
    devices = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert values == [(rank, f"cuda:{rank}", devices, [0, 1, 2, 3]) for rank in range(4)]


@pytest.mark.slow
def test_auto_is_cuda_where_there_are_gpus_and_alone_it_is_one(on_gpus):
    ((local_rank, device, devices, visible),) = on_gpus("auto")
    assert (local_rank, device, devices, len(visible)) == (0, "cuda:0", ["cuda:0"], 1)


def test_chosen_gpus_on_both_nodes_and_the_others_stay_free_for_others(on_gpus, gpu_nodes):
    from harness import eventually

    values = on_gpus("cuda:1,3", nnodes=2)
    assert [visible for *_, visible in values] == [[1, 3]] * 4
    assert [device for _, device, _, _ in values] == ["cuda:0", "cuda:1"] * 2
    eventually(lambda: free_gpus() == 8, "nothing is held")


@pytest.fixture
def taken(gpu_nodes):
    """GPUs 0 and 1 of the first node are somebody else's."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    node = gpu_nodes.nodes[0].node_id
    group = placement_group([{"GPU": 2}], bundle_label_selector=[{"ray.io/node-id": node}])
    ray.get(group.ready(), timeout=60)
    yield node
    remove_placement_group(group)


@pytest.mark.slow
def test_chosen_gpus_that_are_somebody_elses_are_refused_with_the_reason(on_gpus, taken):
    with pytest.raises(ConfigError, match=rf"node {taken[:8]}: Ray has given GPU 1 to somebody else; free: 2, 3"):
        on_gpus("cuda:1-2", nnodes=2)
    assert [visible for *_, visible in on_gpus("cuda:1-2")] == [[1, 2]] * 2  # on the other node they are free
    assert [visible for *_, visible in on_gpus("cuda:2-3", nnodes=2)] == [[2, 3]] * 4


@pytest.mark.slow
def test_gpus_on_a_second_node_are_held_until_the_launch_has_grown_into_it(gpu_nodes, tmp_path):
    """The minimum is one node; a group of one is re-formed when the other is there."""
    timeouts = Timeouts(last_call=0, min_generation_age=0)
    launcher = ElasticLauncher("cuda:3", "gloo", "1:2", log_dir=str(tmp_path))
    launcher.update_params(run_options={**QUICK, "timeouts": timeouts})
    assert launcher(once_there_are_two, launcher) == ["3", "3"]


@pytest.mark.slow
def test_no_gpu_that_is_free_at_all_is_refused_too(on_gpus, gpu_nodes):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"GPU": 4}, {"GPU": 4}])
    ray.get(group.ready(), timeout=60)
    try:
        with pytest.raises(ConfigError, match=r"not free on 1 node\. node .* GPU 0 to somebody else; free: none; node"):
            on_gpus("cuda:0")
    finally:
        remove_placement_group(group)
    label = {"ray.io/node-id": gpu_nodes.nodes[0].node_id}
    with pytest.raises(ConfigError, match="the nodes are chosen by what is free there"):
        on_gpus("cuda:0", run_options={**QUICK, "label_selector": label})


@pytest.mark.slow
def test_gpus_that_are_given_twice_are_shared_with_gloo(on_gpus):
    values = on_gpus("cuda:2,2", dist_backend="auto")
    assert values == [(0, "cuda:0", ["cuda:0", "cuda:0"], [2]), (1, "cuda:0", ["cuda:0", "cuda:0"], [2])]


@pytest.mark.parametrize(
    ("devices", "parameters", "words"),
    [
        ("cuda:0,0", {"dist_backend": "nccl"}, "dist_backend='nccl': devices='cuda:0,0' gives a GPU to 2 processes"),
        ("cuda:4", {}, "no node is there with a GPU of index 4: the most that a node has is 4. Devices are 'auto'"),
        ("cuda:*", {"nnodes": 3}, "there are no 3 nodes with a GPU"),
    ],
)
def test_what_the_nodes_cannot_give_is_refused(on_gpus, devices, parameters, words):
    with pytest.raises(ConfigError, match=words):
        on_gpus(devices, **parameters)


@pytest.mark.slow
def test_a_rank_that_ray_gives_other_gpus_than_those_chosen_says_so(on_gpus, monkeypatch):
    """Somebody took one in between: what the driver does to prevent that is left out here."""
    import contextlib

    from raylaunch.cluster import talking

    monkeypatch.setattr(talking, "chosen_gpus", lambda spec, _indices: contextlib.nullcontext(spec))
    with pytest.raises(RunFailedError, match="given GPU 0: Ray has given the others to somebody else") as caught:
        on_gpus("cuda:3", max_restarts=5)
    assert isinstance(caught.value, ConfigError)


def test_the_driver_knows_what_a_nodes_ranks_will_get(gpu_nodes):
    assert [str(device) for device in ElasticLauncher("cuda:1,3").devices] == ["cuda:1", "cuda:3"]
    assert len(ElasticLauncher("auto:*", nnodes=2).devices) == 4
    assert ElasticLauncher("cuda:*").dist_backend == "nccl"
    assert ElasticLauncher("cuda:*,*").dist_backend == "gloo"
    assert ElasticLauncher("cpu").dist_backend == "gloo"
    assert str(ElasticLauncher("cpu").assigned_device) == "cpu"
