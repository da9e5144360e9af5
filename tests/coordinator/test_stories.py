"""One test per failure, named after what happens. No Ray, no clock: events by hand, commands looked at."""

from __future__ import annotations

import pytest
from story_driver import (
    CLOSED,
    FATAL,
    KILLED,
    NODE_LOST,
    OUT_OF_MEMORY,
    RAISED,
    SIGKILL,
    UNREACHABLE,
    Story,
    in_phase,
)

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import Outcome
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import Ending, EndKind

# -- the usual course ------------------------------------------------------------------------------------------------


def test_a_fixed_run_asks_forms_runs_and_collects_before_it_releases():
    story = Story(2)
    (request,) = story.all(c.RequestBundles)
    assert (request.bundles, request.minimum) == (2, True)
    story.place(1, "a", "b")
    assert len(story.all(c.StartWorker)) == 2
    story.start()
    assert story.phase is Phase.FORMING
    story.join()
    assert story.phase is Phase.RUNNING
    story.mark()
    story.send(e.WorkerReturned, story.rank(0), 1)
    assert story.new(c.CollectResult) == [c.CollectResult(story.rank(0), 1)]
    assert not story.new(c.ReleaseBundles)
    finish = story.succeed()
    assert (finish.outcome, finish.world_size, finish.generation, finish.restarts) == (Outcome.SUCCEEDED, 2, 1, 0)
    assert finish.workers == (1, 2)
    assert story.new(c.ReleaseBundles) == [c.ReleaseBundles((1,))]


def test_a_rank_that_returns_while_others_still_join_it_stays_in_the_group_until_they_have():
    story = Story(2)
    story.place(1, "a", "b")
    story.start()
    story.send(e.WorkerJoined, story.rank(0), 1)
    story.mark()
    story.send(e.WorkerReturned, story.rank(0), 1)
    assert story.new(c.CollectResult) == []
    story.send(e.WorkerJoined, story.rank(1), 1)
    assert story.phase is Phase.RUNNING
    assert story.new(c.CollectResult) == [c.CollectResult(story.rank(0), 1)]


def test_every_rank_is_told_the_endpoint_of_rank_0_in_one_message():
    story = Story(3).run("a", "b", "b")
    assert len(story.all(c.Promote)) == 3
    for rank in range(3):
        told = story.assignment(rank)
        assert (told.master_addr, told.master_port) == ("host-a", 20_000 + story.rank(0))
        assert (told.rank, told.world_size, told.restart_count, told.generation) == (rank, 3, 0, 1)


def test_bundles_whose_order_says_nothing_give_ranks_that_are_contiguous_per_node():
    story = Story(5)
    story.place(1, "b", "a", "b", "a", "b")
    story.start()
    assert story.ranks() == [("b", 0, 3, 0), ("b", 1, 3, 0), ("b", 2, 3, 0), ("a", 0, 2, 1), ("a", 1, 2, 1)]


def test_local_ranks_follow_the_gpus_of_the_node():
    story = Story(3, use_gpu=True)
    story.devices = {(1, 0): ("3",), (1, 1): ("10",), (1, 2): ("2",)}
    story.place(1, "a", "a", "a")
    story.start()
    assert [story.rank(rank) for rank in range(3)] == [3, 1, 2]
    assert [story.assignment(rank).own_devices for rank in range(3)] == [(0,), (1,), (2,)]
    assert {story.assignment(rank).devices for rank in range(3)} == {("2", "3", "10")}


def test_workers_per_node_makes_a_bundle_of_several_seats():
    story = Story((2, 4), workers_per_node=2, use_gpu=True)
    story.devices = {(1, 0): ("0", "1")}
    story.place(1, "a")
    assert len(story.all(c.StartWorker)) == 2
    growth = [request for request in story.all(c.RequestBundles) if not request.minimum]
    assert [(request.bundles, request.avoid_nodes) for request in growth] == [(1, ("a",))]
    story.devices[2, 0] = ("0", "1")
    story.place(2, "b")
    story.start()
    assert story.ranks() == [("a", 0, 2, 0), ("a", 1, 2, 0), ("b", 0, 2, 1), ("b", 1, 2, 1)]


def test_last_call_waits_for_seats_above_the_minimum_and_no_longer():
    story = Story((2, 4))
    story.place(1, "a", "b")
    story.start()
    assert story.phase is Phase.RENDEZVOUS
    story.wait(1.9)
    assert story.phase is Phase.RENDEZVOUS
    story.wait(0.2)
    assert story.phase is Phase.FORMING
    assert story.coordinator.world_size == 2


def test_all_seats_ready_needs_no_last_call():
    story = Story((2, 3))
    story.place(1, "a", "b")
    story.place(2, "c")
    story.start()
    assert story.phase is Phase.FORMING
    assert story.coordinator.world_size == 3


def test_growth_is_asked_for_only_once_the_minimum_stands():
    story = Story((2, 4))
    assert [request.minimum for request in story.all(c.RequestBundles)] == [True]
    story.place(1, "a", "b")
    assert [request.minimum for request in story.all(c.RequestBundles)] == [True, False, False]


# -- workers that die ------------------------------------------------------------------------------------------------


def test_a_worker_killed_while_running_starts_the_next_generation_from_its_spares():
    story = Story(2).run("a", "b").warm()
    spares = [story.spare_of(0), story.spare_of(1)]
    old = {story.rank(0), story.rank(1)}
    story.lose(story.rank(1))
    assert story.generation == 2
    assert story.phase is Phase.FORMING
    assert story.killed() == old
    assert [story.rank(0), story.rank(1)] == spares
    assert story.assignment(0).restart_count == 1
    story.join()
    assert "rank 1" in story.told()
    assert "SIGKILL" in story.told()
    finish = story.succeed()
    assert finish.restarts == 1
    assert [(r.generation, r.world_size) for r in finish.recoveries] == [(2, 2)]


def test_without_spares_the_seats_are_manned_anew():
    story = Story(2, spares=0).run("a", "b")
    story.wait(5)
    assert not story.new(c.StartWorker)
    story.lose(story.rank(0))
    assert story.phase is Phase.RENDEZVOUS
    assert len(story.new(c.StartWorker)) == 2
    story.start()
    assert (story.phase, story.generation) == (Phase.FORMING, 2)


def test_a_worker_that_dies_while_forming_starts_another_generation():
    story = Story(2)
    story.place(1, "a", "b")
    story.start()
    story.send(e.WorkerJoined, story.rank(0), 1)
    story.lose(story.rank(1))
    assert story.phase is Phase.RENDEZVOUS
    story.start()
    story.join()
    assert (story.phase, story.generation) == (Phase.RUNNING, 2)
    assert story.assignment(0).restart_count == 1


def test_a_second_failure_right_after_a_recovery_is_handled_like_the_first():
    story = Story(2).run("a", "b").warm()
    story.lose(story.rank(0))
    story.join()
    story.lose(story.rank(0), after=0.1)
    assert story.phase is Phase.RENDEZVOUS
    story.start()
    story.join()
    assert (story.phase, story.generation) == (Phase.RUNNING, 3)
    finish = story.succeed()
    assert finish.restarts == 2
    assert len(finish.recoveries) == 2


def test_one_failure_with_all_its_consequences_costs_one_restart():
    story = Story(3, max_restarts=1).run("a", "b", "c").warm()
    old = [story.rank(rank) for rank in range(3)]
    story.lose(old[1])
    for worker in (old[0], old[2]):
        story.send(e.WorkerFailed, worker, 1, CLOSED, after=0.02)
        story.lose(worker, KILLED, after=0.01)
    story.join()
    assert story.succeed().restarts == 1


def test_the_same_exception_on_every_rank_costs_one_restart():
    story = Story(3, max_restarts=1).run("a", "b", "c").warm()
    old = [story.rank(rank) for rank in range(3)]
    for worker in old:
        story.send(e.WorkerFailed, worker, 1, RAISED, after=0.001)
    story.join()
    assert story.succeed().restarts == 1


def test_a_spare_that_dies_while_running_is_replaced_and_nothing_else_happens():
    story = Story(2).run("a", "b").warm()
    story.lose(story.spare_of(0))
    story.wait(1)
    (start,) = story.new(c.StartWorker)
    assert (start.group, start.bundle, start.gently) == (1, 0, True)
    assert (story.phase, story.generation, story.coordinator.restarts) == (Phase.RUNNING, 1, 0)


def test_a_worker_that_dies_before_it_is_ready_is_started_again():
    story = Story(2)
    story.place(1, "a", "b")
    story.start(1)
    story.start(2, get_ready=False)
    story.lose(2)
    story.wait(0.5)
    story.start(3)
    assert story.phase is Phase.FORMING
    assert story.assignment(1).restart_count == 1


def test_workers_that_hang_while_they_start_are_replaced_and_charged_and_end_the_run_when_nothing_is_left():
    story = Story(2, timeouts={"start": 20}, max_restarts=1)
    story.place(1, "a", "b")
    story.start(1)
    story.start(2, get_ready=False)
    story.wait(19.5)
    assert story.phase is Phase.RENDEZVOUS
    story.wait(1)
    assert story.phase is Phase.RENDEZVOUS
    assert story.coordinator.restarts == 1
    story.wait(25)
    assert story.finish.outcome is Outcome.FAILED
    assert "timeouts.start" in story.finish.reason
    assert "node b" in story.finish.reason
    assert story.finish.root_cause.phase == "starting"


def test_the_pause_before_everything_is_asked_for_anew_is_no_lack_of_room():
    story = Story(2, spares=0, timeouts={"placement": 4}).run("a", "b")
    story.send(e.NodeLost, "b")
    story.start()
    while not story.new(c.RequestBundles):
        story.wait(0.1)
    assert story.new(c.ReleaseBundles)
    story.wait(1.8)
    assert story.phase is Phase.RENDEZVOUS
    story.wait(0.4)
    assert story.finish.outcome is Outcome.NO_ROOM


def test_a_process_group_that_never_forms_is_given_up_and_tried_again():
    story = Story(2, timeouts={"start": 10, "process_group": 20})
    story.place(1, "a", "b")
    story.start()
    story.send(e.WorkerJoined, story.rank(0), 1)
    story.wait(31)
    assert "rank 1" in story.told()
    story.start()
    assert (story.phase, story.generation) == (Phase.FORMING, 2)


def test_a_worker_that_may_still_live_is_named_to_the_one_that_takes_its_seat():
    story = Story(2, use_gpu=True)
    story.devices = {(1, 0): ("0",), (1, 1): ("0",)}
    story.run("a", "b").warm()
    lost = story.rank(1)
    story.lose(lost, UNREACHABLE)
    story.answer(story.spare_of(0), story.spare_of(1))
    assert story.phase is Phase.FORMING
    assert c.Process(1000 + lost, 7) in story.assignment(1).predecessors


# -- what started it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending",
    [Ending(EndKind.SIGNALED, signal=11), Ending(EndKind.EXITED, exit_code=7), Ending(EndKind.OUT_OF_MEMORY)],
    ids=lambda ending: ending.kind.value,
)
def test_the_true_cause_is_named_although_a_collateral_error_came_first(ending: Ending):
    story = Story(2, max_restarts=0).run("a", "b")
    story.fail(0, CLOSED)
    story.lose(2, ending, after=0.002)  # under way when the kill was decided
    story.wait(5)
    finish = story.finish
    assert finish.outcome is Outcome.FAILED
    assert finish.root_cause is not None
    assert (finish.root_cause.rank, finish.root_cause.ending) == (1, ending)
    assert finish.culprit == 2
    assert len(finish.failures) == 2


def test_an_exhausted_budget_fails_the_run_with_cause_and_count():
    story = Story(2, max_restarts=1).run("a", "b").warm()
    story.fail(0)
    story.join()
    story.mark()
    story.wait(1)
    story.fail(1)
    assert story.phase is Phase.SETTLING
    assert not story.new(c.ReleaseBundles)  # Ray would kill whoever has still something to say
    story.wait(5)
    assert story.new(c.ReleaseBundles)
    finish = story.finish
    assert (finish.outcome, finish.restarts) == (Outcome.FAILED, 1)
    assert "rank 1" in finish.reason
    assert "ValueError: no such column" in finish.reason
    assert "restart is used up" in finish.reason


def test_a_fatal_exception_is_not_tried_again():
    story = Story(2, max_restarts=-1).run("a", "b").warm()
    story.fail(1, FATAL)
    story.wait(5)
    finish = story.finish
    assert (finish.outcome, finish.generation, finish.restarts) == (Outcome.FAILED, 1, 0)
    assert finish.root_cause is not None
    assert finish.root_cause.ending.error_type == "KeyError"


def test_a_fatal_exception_that_a_collateral_error_overtook_still_ends_the_run():
    story = Story(2, max_restarts=-1).run("a", "b").warm()
    first, second = story.rank(0), story.rank(1)
    story.fail(0, CLOSED)
    story.send(e.WorkerFailed, second, 1, FATAL, after=0.05)
    story.wait(5)
    assert story.finish.outcome is Outcome.FAILED
    assert story.finish.culprit == second
    assert story.killed() >= {first, second}


@pytest.mark.parametrize("what", ["python", "torch", "ray", "raylaunch"])
def test_wrong_versions_end_the_run_and_name_both(what: str):
    story = Story(2, versions={what: "2.13.0"})
    story.place(1, "a", "b")
    story.send(e.WorkerStarted, 1, "a", "host-a", 71, 7, {what: "2.12.0"}, ())
    story.wait(5)
    finish = story.finish
    assert finish.outcome is Outcome.FAILED
    assert f"{what} 2.12.0 where the driver has 2.13.0" in finish.reason


def test_a_rank_that_returned_early_is_named_when_its_peers_fail():
    story = Story(2, max_restarts=0).run("a", "b")
    story.send(e.WorkerReturned, story.rank(0), 1)
    story.fail(1, CLOSED, after=2)
    story.wait(5)
    assert story.finish.outcome is Outcome.FAILED
    assert "rank 0 had already returned" in story.finish.reason


def test_how_a_worker_really_ended_may_be_learnt_afterwards():
    story = Story(2, max_restarts=0).run("a", "b")
    story.lose(story.rank(1), KILLED)
    story.lose(story.rank(1), Ending(EndKind.OUT_OF_MEMORY), after=0.02)
    story.wait(5)
    assert "out of memory" in story.finish.reason


@pytest.mark.parametrize(
    ("lost", "cause"),
    [
        ((SIGKILL, False), "rank 0 (node a, pid 1001) killed by SIGKILL"),  # the agent found it dying
        ((KILLED, False), "rank 0 (node a, pid 1001) died"),  # ... on a kernel that can't say how
        ((OUT_OF_MEMORY, None), "rank 0 (node a, pid 1001) killed: the node ran out of memory"),  # only Ray knows that
        ((SIGKILL, True), "rank 1"),  # the agent found it alive
        ((KILLED, None), "rank 1"),  # Ray says so of whatever we kill
        ((Ending(EndKind.SIGNALED, signal=15), False), "rank 1"),  # Ray's own way of killing
    ],
)
def test_how_a_killed_worker_ended_counts_only_if_it_had_ended_by_itself(lost: tuple[Ending, bool | None], cause: str):
    story = Story(2, max_restarts=0).run("a", "b")
    peer = story.rank(0)
    story.fail(1, CLOSED)
    story.send(e.WorkerLost, peer, *lost, after=0.01)
    story.wait(5)
    assert cause in story.finish.reason


@pytest.mark.parametrize(("first", "ask"), [(CLOSED, True), (RAISED, False)])
def test_the_others_are_asked_only_while_nobody_knows_why(first: Ending, ask: bool):
    story = Story(2).run("a", "b")
    story.fail(1, first)
    (kill,) = story.new(c.KillWorkers)
    assert kill.ask is ask


@pytest.mark.parametrize("fatal", [True, False])
def test_a_rank_that_says_what_it_fails_with_when_it_is_ended_is_the_cause(fatal: bool):
    story = Story(2, max_restarts=3).run("a", "b").warm()
    peer = story.rank(0)
    spares = (story.spare_of(0), story.spare_of(1))
    story.fail(1, CLOSED)
    story.lose(peer, FATAL if fatal else RAISED, after=0.02)
    if fatal:
        story.wait(5)
        assert story.finish.culprit == peer
    else:
        story.answer(*spares)
        story.join()
        (recovery,) = story.succeed().recoveries
        assert RAISED.message in recovery.cause


def test_a_sigterm_from_outside_that_is_explained_late_is_a_cause():
    story = Story(2, max_restarts=0).run("a", "b")
    story.lose(story.rank(1), KILLED)
    story.send(e.WorkerLost, story.rank(1), Ending(EndKind.SIGNALED, signal=15), False, after=0.02)
    story.wait(5)
    assert "killed by SIGTERM" in story.finish.reason


@pytest.mark.parametrize("certain", [True, False])
def test_a_process_that_only_ray_calls_dead_is_waited_for_by_its_successor(certain: bool):
    story = Story(2).run("a", "b").warm()
    old = story.rank(1)
    story.send(e.WorkerLost, old, KILLED, None, certain)
    assert story.phase is Phase.FORMING
    assert (c.Process(1000 + old, 7) in story.assignment(1).predecessors) is not certain


# -- nodes -----------------------------------------------------------------------------------------------------------


def test_two_nodes_lost_at_once_are_one_recovery():
    story = Story((1, 3), grow=False)
    story.place(1, "a")
    story.place(2, "b")
    story.place(3, "c")
    story.start()
    story.join()
    story.warm()
    keeper = story.spare_of(0)
    lost = [story.rank(1), story.rank(2)]
    story.lose(lost[0], UNREACHABLE)
    story.lose(lost[1], UNREACHABLE, after=0.05)
    story.answer(keeper)
    story.wait(0.5)
    story.send(e.NodeLost, "b")
    story.send(e.NodeLost, "c", after=0.01)
    assert story.generation == 2
    story.join()
    assert story.ranks() == [("a", 0, 1, 0)]
    assert story.succeed().restarts == 1


def test_a_lost_node_shrinks_an_elastic_run_at_once_and_is_named():
    story = Story((2, 3))
    story.place(1, "a", "b")
    story.place(2, "c")
    story.start()
    story.join()
    story.warm()
    survivors = [story.spare_of(0), story.spare_of(1)]
    before = story.now
    story.fail(0, CLOSED, after=0.4)
    assert story.phase is Phase.ROLL_CALL
    story.answer(*survivors)
    story.wait(0.2)
    assert story.phase is Phase.FORMING
    assert story.now - before < 0.7
    assert story.coordinator.world_size == 2
    story.join()
    story.lose(3, UNREACHABLE, after=1.0)
    story.wait(5)
    assert "node c lost" in story.told()
    assert story.succeed().restarts == 1


def test_the_roll_call_leaves_silent_spares_out():
    story = Story((2, 3))
    story.place(1, "a", "b")
    story.place(2, "c")
    story.start()
    story.join()
    story.warm()
    story.fail(0, CLOSED)
    (call,) = story.new(c.CallRoll)
    assert len(call.workers) == 3
    story.answer(story.spare_of(0), story.spare_of(2))
    story.wait(0.2)
    assert [node for node, *_ in story.ranks()] == ["a", "c"]


def test_a_spare_that_answers_late_is_taken_in_by_growth():
    story = Story((2, 3))
    story.place(1, "a", "b")
    story.place(2, "c")
    story.start()
    story.join()
    story.warm()
    late = story.spare_of(2)
    story.fail(0, CLOSED)
    story.answer(story.spare_of(0), story.spare_of(1))
    story.wait(0.2)
    assert story.coordinator.world_size == 2
    story.join()
    story.answer(late)
    for _ in range(4):
        story.wait(5)
        story.start()
    assert story.coordinator.world_size == 3
    assert story.generation == 3


def test_rank_0_stays_on_its_node_while_that_lives():
    story = Story((1, 3), spares=0, timeouts={"min_generation_age": 0})
    story.place(1, "b")
    story.start()
    story.wait(2.5)
    story.join()
    story.place(2, "a")
    story.start()
    story.start()
    story.wait(3)
    assert story.coordinator.world_size == 2
    assert [node for node, *_ in story.ranks()] == ["b", "a"]
    story.join()
    story.lose(story.rank(1))
    story.start()
    assert [node for node, *_ in story.ranks()] == ["b", "a"]
    story.join()
    story.lose(story.rank(0), NODE_LOST)
    story.send(e.NodeLost, "b")
    story.move(1, 0, "c")
    story.wait(1)
    story.start()
    story.wait(3)
    assert [node for node, *_ in story.ranks()] == ["a", "c"]


def test_below_the_minimum_a_run_waits_and_goes_on_when_room_is_back():
    story = Story(2, timeouts={"placement": 100}).run("a", "b").warm()
    story.lose(story.rank(1), UNREACHABLE)
    story.answer(story.spare_of(0))
    story.send(e.NodeLost, "b", after=1)
    del story.where[1, 1]
    story.wait(20)
    assert story.phase is Phase.RENDEZVOUS
    assert "waiting for room" in story.told()
    story.move(1, 1, "c")
    story.start()
    story.join()
    assert story.phase is Phase.RUNNING
    assert [node for node, *_ in story.ranks()] == ["a", "c"]
    assert story.succeed().restarts == 1


def test_below_the_minimum_half_of_the_patience_releases_everything_and_asks_anew_once():
    story = Story(2, timeouts={"placement": 40}).run("a", "b").warm()
    story.lose(story.rank(1), NODE_LOST)
    story.answer(story.spare_of(0))
    story.send(e.NodeLost, "b", after=0.1)
    del story.where[1, 1]
    story.mark()
    story.wait(18)
    assert not story.new(c.ReleaseBundles)
    story.wait(5)
    assert story.new(c.ReleaseBundles) == [c.ReleaseBundles((1,))]
    assert [(r.bundles, r.minimum) for r in story.new(c.RequestBundles)] == [(2, True)]
    story.mark()
    story.wait(100)
    assert not story.new(c.RequestBundles)
    finish = story.finish
    assert finish.outcome is Outcome.NO_ROOM
    assert "timeouts.placement" in finish.reason
    assert "node b lost" in finish.reason
    assert finish.root_cause is not None


def test_a_cluster_that_never_has_room_ends_the_run_and_says_what_was_wanted():
    story = Story(4, timeouts={"placement": 30})
    story.wait(29)
    assert story.phase is Phase.RENDEZVOUS
    story.wait(10)
    assert story.finish.outcome is Outcome.NO_ROOM
    assert "4 workers" in story.finish.reason
    assert story.finish.root_cause is None


def test_a_minimum_group_that_somebody_removes_is_asked_for_again():
    story = Story(2).run("a", "b")
    story.send(e.BundlesLost, 1, "it was removed")
    story.wait(3)
    assert [(r.bundles, r.minimum) for r in story.new(c.RequestBundles)] == [(2, True)]
    story.place(2, "a", "b")
    story.start()
    story.join()
    assert (story.phase, story.generation) == (Phase.RUNNING, 2)


def test_a_minimum_group_that_is_removed_while_growth_stands_is_replaced_within_the_maximum():
    story = Story((2, 4)).run("a", "b")
    growth = [request.group for request in story.all(c.RequestBundles) if not request.minimum]
    story.place(growth[0], "c")
    story.send(e.BundlesLost, 1, "it was removed")
    story.wait(3)  # the witness counts what is asked for
    assert any(request.minimum for request in story.new(c.RequestBundles))


def test_a_lost_unit_of_growth_is_given_back_and_asked_for_again():
    story = Story((1, 2))
    story.place(1, "a")
    story.place(2, "b")
    story.start()
    story.join()
    story.mark()
    story.lose(story.rank(1), NODE_LOST)
    story.send(e.NodeLost, "b", after=0.05)
    assert c.ReleaseBundles((2,)) in story.new(c.ReleaseBundles)
    story.start()
    story.wait(3)
    story.join()
    assert story.coordinator.world_size == 1
    assert [r.minimum for r in story.new(c.RequestBundles)] == [False]


def test_a_worker_that_was_queued_before_the_loss_was_known_is_asked_for_again():
    story = Story(2, spares=0).run("a", "b")
    story.lose(story.rank(1), UNREACHABLE)
    doomed = max(story.starts)
    story.send(e.NodeLost, "b", after=2)
    story.lose(doomed, NODE_LOST, after=0.01)
    story.move(1, 1, "c")
    story.wait(2)
    story.start()
    assert (story.phase, story.generation) == (Phase.FORMING, 2)
    assert {node for node, *_ in story.ranks()} == {"a", "c"}


# -- growth and drains -----------------------------------------------------------------------------------------------


def grown(story: Story, node: str = "z") -> None:
    """A unit of growth is placed, and whoever is asked for gets ready."""
    growth = [r.group for r in story.all(c.RequestBundles) if not r.minimum and (r.group, 0) not in story.where]
    story.place(growth[0], node)
    story.start()


def test_a_node_that_joins_is_taken_in_and_nothing_is_charged():
    story = Story((2, 3)).run("a", "b").warm()
    story.wait(20)
    grown(story)
    story.wait(3)
    assert (story.generation, story.coordinator.world_size) == (2, 3)
    story.join()
    finish = story.succeed()
    assert (finish.restarts, finish.recoveries) == (0, ())


def test_growth_warms_a_spare_in_every_seat_first_and_then_costs_only_a_promotion():
    story = Story((2, 3)).run("a", "b")
    grown(story)
    story.wait(20)
    assert story.generation == 1
    story.start()
    story.wait(3)
    assert story.phase is Phase.FORMING
    assert story.coordinator.world_size == 3


def test_growth_without_spares_waits_for_the_seats_that_it_has_emptied():
    story = Story((2, 4), spares=0, timeouts={"last_call": 0, "min_generation_age": 0}).run("a", "b")
    growth = [r.group for r in story.all(c.RequestBundles) if not r.minimum]
    story.place(growth[0], "c")
    story.place(growth[1], "d")
    story.start()
    story.wait(1)
    story.start()
    story.wait(3)
    assert (story.generation, story.coordinator.world_size) == (2, 4)


def two_units_placed(story: Story) -> tuple[int, int]:
    """Two new nodes have room; returns the workers that start there."""
    first, second = [r.group for r in story.all(c.RequestBundles) if not r.minimum]
    story.wait(20)
    story.place(first, "y")
    story.place(second, "z")
    one, other = sorted(story.due())
    return one, other


def test_nodes_that_join_together_are_taken_in_together():
    story = Story((2, 4)).run("a", "b").warm()
    one, other = two_units_placed(story)
    story.start(one)
    story.wait(1.9)
    assert (story.phase, story.generation) == (Phase.RUNNING, 1)
    story.start(other)
    assert (story.phase, story.generation, story.coordinator.world_size) == (Phase.FORMING, 2, 4)


@pytest.mark.parametrize("last_call", [0.0, 1.0])
def test_a_new_node_that_is_slow_keeps_a_warm_group_down_no_longer_than_a_last_call(last_call: float):
    story = Story((2, 4), timeouts={"last_call": last_call}).run("a", "b").warm()
    one, slow = two_units_placed(story)
    story.start(one)
    story.start(slow, get_ready=False)
    story.wait(1.99)
    assert (story.phase, story.generation) == (Phase.RUNNING, 1)
    story.wait(0.02 + last_call)
    assert (story.phase, story.generation, story.coordinator.world_size) == (Phase.FORMING, 2, 3)


def test_growth_waits_until_the_generation_is_old_enough():
    story = Story((2, 3), timeouts={"min_generation_age": 10}).run("a", "b")
    grown(story)
    story.wait(1.5)
    story.start()
    story.wait(7)
    assert story.generation == 1
    story.wait(5)
    assert story.generation == 2


def test_growth_is_withdrawn_while_somebody_else_waits_and_asked_for_again_afterwards():
    story = Story((2, 4)).run("a", "b")
    pending = {request.group for request in story.all(c.RequestBundles) if not request.minimum}
    story.send(e.OthersWaiting, True)
    assert {group for release in story.new(c.ReleaseBundles) for group in release.groups} == pending
    story.mark()
    story.wait(30)
    assert not story.new(c.RequestBundles)
    story.send(e.OthersWaiting, False)
    assert [request.minimum for request in story.new(c.RequestBundles)] == [False, False]


def test_a_run_that_must_not_grow_keeps_its_size():
    story = Story((2, 4), grow=False).run("a", "b")
    story.send(e.OthersWaiting, True)
    story.send(e.OthersWaiting, False)
    story.wait(60)
    assert (story.generation, story.coordinator.world_size) == (1, 2)
    assert not story.new(c.RequestBundles)


def test_a_unit_of_growth_that_fails_before_it_is_taken_in_disturbs_nobody():
    story = Story((2, 3)).run("a", "b")
    growth = [r.group for r in story.all(c.RequestBundles) if not r.minimum]
    story.place(growth[0], "z")
    worker = max(story.starts)
    story.start(worker, get_ready=False)
    story.lose(worker)
    story.wait(30)
    assert (story.phase, story.generation, story.coordinator.restarts) == (Phase.RUNNING, 1, 0)


def test_a_draining_node_is_left_early_and_nothing_is_charged():
    story = Story((2, 3))
    story.place(1, "a", "b")
    story.place(2, "c")
    story.start()
    story.join()
    story.warm()
    story.send(e.NodeDraining, "c", "spot instance reclaimed")
    story.wait(3)
    assert [node for node, *_ in story.ranks()] == ["a", "b"]
    story.join()
    assert "spot instance reclaimed" in story.told()
    assert story.succeed().restarts == 0


def test_a_draining_node_without_which_the_minimum_fails_is_used_to_the_end_and_costs_nothing():
    story = Story(2, max_restarts=0).run("a", "b").warm()
    story.send(e.NodeDraining, "b")
    story.wait(20)
    assert story.generation == 1
    story.lose(story.rank(1), NODE_LOST)
    story.send(e.NodeLost, "b", after=0.02)
    story.answer(story.spare_of(0))
    story.move(1, 1, "c")
    story.wait(2)
    story.start()
    story.join()
    finish = story.succeed()
    assert (finish.outcome, finish.restarts) == (Outcome.SUCCEEDED, 0)


# -- silence ---------------------------------------------------------------------------------------------------------


def test_missed_pulses_are_told_and_fatal_only_after_the_timeout():
    story = Story(2, timeouts={"unresponsive": 60}).run("a", "b").warm()
    story.send(e.PulseMissed, story.rank(1), 10.0)
    assert story.phase is Phase.RUNNING
    assert "rank 1" in story.told()
    spares = story.spare_of(0), story.spare_of(1)
    story.send(e.PulseMissed, story.rank(1), 61.0, after=50)
    assert story.phase is Phase.ROLL_CALL
    story.answer(*spares)
    assert "unresponsive" in story.told()
    assert story.generation == 2


def test_a_frozen_rank_0_is_replaced_and_what_it_reports_later_changes_nothing():
    story = Story(2, spares=0, timeouts={"unresponsive": 60}).run("a", "b")
    frozen = story.rank(0)
    story.send(e.PulseMissed, frozen, 61.0)
    story.wait(0.2)
    story.start()
    story.join()
    assert (story.phase, story.generation) == (Phase.RUNNING, 2)
    assert frozen not in story.witness.members.values()
    decisions = [
        story.send(e.WorkerReturned, frozen, 1),
        story.send(e.ResultCollected, frozen, 1),
        story.send(e.WorkerFailed, frozen, 1, CLOSED),
        story.send(e.WorkerJoined, frozen, 1),
    ]
    assert not any(decision.commands for decision in decisions)
    assert not story.coordinator.is_current(1)
    assert story.coordinator.is_current(2)
    assert story.succeed().restarts == 1


@pytest.mark.parametrize("ending", [CLOSED, RAISED, FATAL])
def test_messages_of_an_old_generation_are_ignored(ending: Ending):
    story = Story(2).run("a", "b").warm()
    old = story.rank(0)
    story.fail(1)
    story.join()
    story.wait(10)
    decision = story.send(e.WorkerFailed, old, 1, ending)
    assert not decision.commands
    assert story.phase is Phase.RUNNING


def test_an_unreachable_worker_is_fenced_and_its_seat_used_only_by_a_spare_that_answers():
    story = Story((1, 2))
    story.place(1, "a")
    story.place(2, "b")
    story.start()
    story.join()
    story.warm()
    keeper = story.spare_of(0)
    story.lose(story.rank(1), UNREACHABLE)
    assert story.phase is Phase.ROLL_CALL
    assert not story.coordinator.members
    story.answer(keeper)
    story.wait(0.2)
    assert [story.rank(rank) for rank in range(story.coordinator.world_size)] == [keeper]


def test_a_return_that_overtakes_its_own_joining_is_not_lost():
    story = Story(2)
    story.place(1, "a", "b")
    story.start()
    story.send(e.WorkerJoined, story.rank(0), 1)
    story.send(e.WorkerReturned, story.rank(1), 1)
    story.send(e.WorkerJoined, story.rank(1), 1)
    story.send(e.ResultCollected, story.rank(1), 1)
    story.send(e.WorkerReturned, story.rank(0), 1)
    story.send(e.ResultCollected, story.rank(0), 1)
    assert story.finish.outcome is Outcome.SUCCEEDED


def test_a_worker_whose_readiness_overtakes_its_start_is_ready():
    story = Story(1)
    story.place(1, "a")
    story.send(e.WorkerReady, 1, 20_001, 64 << 30, 1 << 30)
    story.send(e.WorkerStarted, 1, "a", "host-a", 71, 7, {}, ())
    assert story.phase is Phase.FORMING


def test_spares_that_die_during_the_roll_call_are_not_waited_for():
    story = Story(2).run("a", "b").warm()
    spare = story.spare_of(1)
    story.send(e.NodeLost, "b")
    story.lose(spare, NODE_LOST, after=0.01)
    story.wait(1)
    assert story.phase is Phase.RENDEZVOUS


def test_a_lost_bundle_that_comes_back_where_growth_is_leaves_one_unit_a_node():
    story = Story((1, 2), workers_per_node=1, timeouts={"min_generation_age": 0})
    story.run("a")
    (growth,) = story.all(c.RequestBundles)[1:]
    story.place(growth.group, "b")
    story.start()
    story.wait(3)
    story.start()
    story.join()
    assert story.coordinator.world_size == 2
    story.warm()
    spare = story.spare_of(1)
    story.send(e.NodeLost, "a")
    story.answer(spare)
    story.join()
    assert [place[0] for place in story.ranks()] == ["b"]
    story.move(1, 0, "b")  # Ray 2.60 doesn't know that the two groups must not share a node
    story.mark()
    story.wait(1)
    story.start()
    story.wait(3)
    story.start()
    story.join()
    assert story.coordinator.world_size == 1
    assert [release.groups for release in story.new(c.ReleaseBundles)] == [(growth.group,)]
    (again,) = story.new(c.RequestBundles)
    assert again.avoid_nodes == ("b",)
    story.place(again.group, "c")
    story.start()
    story.wait(3)
    story.start()
    story.join()
    assert sorted(place[0] for place in story.ranks()) == ["b", "c"]


# -- stopping --------------------------------------------------------------------------------------------------------


LIVE = [p for p in Phase if p not in (Phase.NEW, Phase.HELD, Phase.DONE)]


@pytest.mark.parametrize("phase", LIVE)
def test_a_stop_ends_the_run_in_every_phase(phase: Phase):
    story = in_phase(phase)
    story.send(e.StopRequested, "Ctrl-C")
    story.wait(story.spec.timeouts.stop + 1)
    expected = Outcome.FAILED if phase is Phase.SETTLING else Outcome.STOPPED
    assert story.finish.outcome is expected
    assert not story.send(e.StopRequested, "again").commands


def test_a_stop_gives_the_ranks_time_and_takes_their_returning():
    story = Story(2, timeouts={"stop": 10}).run("a", "b").warm()
    spares = {story.spare_of(0), story.spare_of(1)}
    story.send(e.StopRequested, "ray.cancel")
    assert story.phase is Phase.STOPPING
    assert story.new(c.StopWorkers) == [c.StopWorkers((story.rank(0), story.rank(1)))]
    assert story.killed() == spares
    story.send(e.WorkerReturned, story.rank(0), 1, after=1)
    assert story.phase is Phase.STOPPING
    story.fail(1, Ending(EndKind.SIGNALED, signal=15), after=1)
    assert story.finish.outcome is Outcome.STOPPED
    assert "ray.cancel" in story.finish.reason


def test_who_does_not_listen_is_killed_when_the_time_is_over():
    story = Story(2, timeouts={"stop": 10}).run("a", "b")
    story.send(e.StopRequested, "enough")
    story.wait(9)
    assert not story.killed()
    story.wait(2)
    assert story.killed() == {story.rank(0), story.rank(1)}
    assert story.finish.outcome is Outcome.STOPPED


def test_a_second_stop_does_not_wait():
    story = Story(2).run("a", "b")
    story.send(e.StopRequested, "enough")
    story.send(e.StopRequested, "now!")
    assert story.finish.outcome is Outcome.STOPPED


def test_failures_while_stopping_restart_nothing():
    story = Story(3).run("a", "b", "c")
    story.send(e.StopRequested, "enough")
    story.lose(story.rank(0))
    story.send(e.NodeLost, "b", after=0.1)
    assert story.phase is Phase.STOPPING
    assert not story.new(c.StartWorker)
    assert not story.new(c.Promote)
    story.wait(20)
    assert (story.finish.outcome, story.finish.restarts) == (Outcome.STOPPED, 0)


def test_what_arrives_after_the_end_is_accepted_and_changes_nothing():
    story = Story(2).run("a", "b").warm()
    spare = story.spare_of(0)
    story.succeed()
    for late in (
        story.lose(1, KILLED),
        story.lose(spare, KILLED),
        story.send(e.WorkerReturned, 2, 1),
        story.send(e.NodeLost, "a"),
        story.send(e.BundlesPlaced, 1, ("a", "b")),
        story.send(e.Tick),
    ):
        assert not late.commands
        assert late.after is Phase.DONE


def test_a_rank_that_joins_while_the_run_is_being_stopped_is_asked_to_stop_too():
    story = Story(2)
    story.place(1, "a", "b")
    story.start()
    story.send(e.WorkerJoined, story.rank(0), 1)
    story.send(e.StopRequested, "Ctrl-C")
    late = story.rank(1)
    story.mark()
    story.send(e.WorkerJoined, late, 1)
    assert story.new(c.StopWorkers) == [c.StopWorkers((late,))]


def test_a_spare_that_dies_again_and_again_is_given_up_until_the_next_generation():
    story = Story(1, spares=1).run("a")
    for _ in range(50):
        story.wait(6)
        story.start()
        spares = [w for w in story.ready if w != story.rank(0) and not story._ended(w)]
        for spare in spares:
            story.lose(spare)
    assert len(story.all(c.StartWorker)) < 10
    assert story.coordinator.restarts == 0


def test_workers_that_share_gpus_are_spread_over_the_bundles_gpus():
    story = Story(4, workers_per_node=4, use_gpu=True, backend="gloo", resources_per_worker={"GPU": 0.5}, spares=0)
    story.devices[1, 0] = ("0", "1")
    story.place(1, "a")
    story.start()
    own = [command.assignment.own_devices for command in story.all(c.Promote)]
    assert own == [(0,), (0,), (1,), (1,)]


def test_a_failed_start_after_the_first_generation_is_tried_again_whatever_it_says():
    story = Story(2, spares=1).run("a", "b").warm()
    preload = Ending(EndKind.CANNOT_WORK, error_type="", message="preload can't be imported there", fatal=True)
    story.lose(story.rank(0))
    story.join()
    story.wait(1.5)
    first = story.due()[0]
    story.start(first, get_ready=False)
    story.send(e.WorkerFailed, first, 0, preload)
    story.mark()
    story.wait(10)
    assert story.new(c.StartWorker)
    assert story.phase is Phase.RUNNING
