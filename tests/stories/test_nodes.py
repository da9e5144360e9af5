"""Nodes go and come: the run shrinks at once to what is left, grows when there is room, and waits below the minimum."""

from __future__ import annotations

import time

import pytest
from harness import eventually, journal_lines
from steps import step_until

import raylaunch
from raylaunch import Timeouts

#: One worker fills a node.
WHOLE_NODE = {"CPU": 2}


def node_ids(status) -> list[str]:
    return [status.members[rank].node for rank in sorted(status.members)]


def other_node(cluster):
    """A node that is not the driver's."""
    return cluster.nodes[-1]


def test_a_lost_node_shrinks_the_run_at_once_and_a_new_one_lets_it_grow(two_nodes, start, gate):
    run = start(
        step_until,
        args=(gate("enough"),),
        num_workers=(1, 2),
        resources_per_worker=WHOLE_NODE,
        spares="auto",
        timeouts=Timeouts(min_generation_age=0),
    )
    full = run.running(spares=2)
    assert len(set(node_ids(full))) == 2
    two_nodes.kill_node(other_node(two_nodes))
    shrunk = run.running(generation=2)
    assert len(shrunk.members) == 1
    assert set(node_ids(shrunk)) == {two_nodes.nodes[0].node_id}
    two_nodes.add_node()
    grown = run.running(generation=3)
    assert len(grown.members) == 2
    assert len(set(node_ids(grown))) == 2
    gate("enough").touch()
    result = run.result()
    assert [rank for rank, _, _ in result] == [0, 1]
    (recovery,) = result.recoveries
    assert recovery.world_size == 1
    assert "node" in recovery.cause
    assert "lost with rank" in recovery.cause
    assert result.restarts == 1  # the lost node is one failure; growth is free


def test_two_nodes_that_get_free_are_taken_in_by_one_re_formation_within_five_seconds(
    two_nodes, start, gate, tmp_path, record_property
):
    """From Ray's word that there is room to the first step of all four. A slow hour may take longer, but never longer
    than two launches: the new workers' start and import is what there is to wait for.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    added = [two_nodes.add_node(resources={"new": 1}), two_nodes.add_node(resources={"new": 1})]
    somebody_s = placement_group([{"new": 1, **WHOLE_NODE}] * 2, strategy="STRICT_SPREAD")
    ray.get(somebody_s.ready())
    (tmp_path / "steps").mkdir()
    run = start(
        step_until,
        args=(gate("enough"), tmp_path / "steps"),
        num_workers=(1, 4),
        resources_per_worker=WHOLE_NODE,
        spares="auto",
        timeouts=Timeouts(min_generation_age=0),
    )
    assert len(run.running(spares=2).members) == 2
    remove_placement_group(somebody_s)  # both are free in the same moment
    grown = run.running(generation=2)
    assert sorted(node_ids(grown)) == sorted(node.node_id for node in two_nodes.nodes)
    steps = [tmp_path / "steps" / f"2-{rank}" for rank in range(4)]
    run.wait_until(lambda: all(step.exists() and "\n" in step.read_text() for step in steps), "a step of all four")
    gate("enough").touch()
    result = run.result()
    assert (len(result), result.restarts, result.recoveries) == (4, 0, ())
    free = run.events("BundlesPlaced")[-1]["at"]
    first_steps = [float(step.read_text().split()[3]) for step in steps]
    launch = run.events("WorkerJoined")[1]["at"] - run.events("BundlesPlaced")[0]["at"]
    record_property("seconds", round(max(first_steps) - free, 2))
    assert max(first_steps) - free < max(5.0, 2 * launch)
    two_nodes.kill_nodes(added)


def length_of(data: bytes) -> int:
    return len(data)


def test_what_happened_to_the_cluster_before_the_run_comes_after_its_request(two_nodes, start):
    """With 200 MB of arguments to put away first, the look at the nodes is done before the run is requested."""
    import ray

    lost = two_nodes.add_node()
    two_nodes.kill_node(lost)
    eventually(
        lambda: any(node["NodeID"] == lost.node_id and not node["Alive"] for node in ray.nodes()), "Ray knows that"
    )
    run = start(length_of, args=(bytes(200_000_000),), num_workers=2)
    assert list(run.result()) == [200_000_000] * 2
    events = [line["event"] for line in journal_lines(run.journal) if "event" in line]
    assert events[0] == "RunRequested"
    assert "NodeLost" in events
    assert "InternalError" not in run.journal.read_text()


@pytest.mark.slow
def test_without_spares_a_lost_node_shrinks_the_run_too(two_nodes, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=(1, 2), resources_per_worker=WHOLE_NODE, grow=False)
    run.running()
    two_nodes.kill_node(other_node(two_nodes))
    shrunk = run.running(generation=2)
    assert len(shrunk.members) == 1
    two_nodes.add_node()
    gate("enough").touch()
    assert len(run.result()) == 1


@pytest.mark.slow
def test_a_fixed_run_waits_for_room_and_goes_on_when_a_node_has_come(two_nodes, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=2, resources_per_worker=WHOLE_NODE)
    run.running()
    two_nodes.kill_node(other_node(two_nodes))
    run.wait_for_event("NodeLost")
    two_nodes.add_node()
    again = run.running(generation=2)
    assert len(again.members) == 2
    gate("enough").touch()
    result = run.result()
    assert "lost with rank" in result.recoveries[0].cause


@pytest.mark.slow
def test_below_the_minimum_the_run_fails_with_a_reason_when_no_room_comes(two_nodes, start, gate):
    run = start(
        step_until,
        args=(gate("enough"),),
        num_workers=2,
        resources_per_worker=WHOLE_NODE,
        timeouts=Timeouts(placement=6),
    )
    run.running()
    two_nodes.kill_node(other_node(two_nodes))
    error = run.error()
    two_nodes.add_node()
    assert isinstance(error, raylaunch.PlacementTimeout)
    text = str(error)
    assert "timeouts.placement" in text
    assert "wanted: 2 x {CPU: 2}" in text
    assert two_nodes.nodes[0].node_id[:8] in text
    assert "lost with rank" in text


@pytest.mark.slow
def test_growth_waits_while_another_jobs_group_waits(two_nodes, start, gate):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    blocker = placement_group([{"CPU": 1}], strategy="PACK", name="somebody-s")
    ray.get(blocker.ready())
    gang = None
    try:
        run = start(
            step_until, args=(gate("enough"),), num_workers=(2, 4), timeouts=Timeouts(min_generation_age=0, last_call=0)
        )
        assert len(run.running().members) == 3
        gang = placement_group([{"CPU": 1}] * 2, name="somebody-s-gang")  # needs more than the one that gets free
        run.wait_for_event("OthersWaiting")
        remove_placement_group(blocker)
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(gang.ready(), timeout=2)
        assert len(run.running().members) == 3  # the freed CPU was left alone
    finally:
        if gang is not None:
            remove_placement_group(gang)
    assert len(run.running(generation=2).members) == 4
    gate("enough").touch()
    assert run.result().restarts == 0


def test_a_drained_node_is_left_without_a_charge(two_nodes, start, gate):
    run = start(
        step_until,
        args=(gate("enough"),),
        num_workers=(1, 2),
        resources_per_worker=WHOLE_NODE,
        spares="auto",
        grow=False,
    )
    run.running()
    drained = other_node(two_nodes)
    two_nodes.drain_node(drained, seconds=60)
    moved = run.running(generation=2)
    assert drained.node_id not in node_ids(moved)
    gate("enough").touch()
    result = run.result()
    assert result.restarts == 0
    assert not result.recoveries
    two_nodes.kill_node(drained)
    two_nodes.add_node()


def test_workers_per_node_spreads_the_units_over_different_nodes(two_nodes, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=2, workers_per_node=1)
    assert len(set(node_ids(run.running()))) == 2
    gate("enough").touch()
    assert len(run.result()) == 2


@pytest.mark.slow
def test_a_generation_younger_than_its_least_age_is_not_ended_in_order_to_grow(two_nodes, start, gate):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    blocker = placement_group([WHOLE_NODE], name="somebody-s")
    ray.get(blocker.ready())
    age = 6.0
    run = start(
        step_until,
        args=(gate("enough"),),
        num_workers=(1, 2),
        resources_per_worker=WHOLE_NODE,
        timeouts=Timeouts(min_generation_age=age, last_call=0),
    )
    run.running()
    formed = time.monotonic()
    remove_placement_group(blocker)
    run.running(generation=2)
    assert time.monotonic() - formed > age - 1.0
    gate("enough").touch()
    assert len(run.result()) == 2
