"""A launcher's runs, one after the other on the same seats: what each leaves to the next, and what it doesn't."""

from __future__ import annotations

import pytest
from story_driver import CLOSED, FATAL, KILLED, RAISED, SIGKILL, UNREACHABLE, Story

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import Outcome
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import Ending, EndKind


def after_a_run(*, spares: bool = True, max_restarts: int = 3) -> Story:
    """A launcher of two workers whose first run is running, with spares for the next generation."""
    story = Story(2, held=True).hold("a", "b")
    story.request(max_restarts=max_restarts)
    story.join()
    if spares:
        story.warm()
    return story


# -- holding ---------------------------------------------------------------------------------------------------------


def test_a_launcher_reserves_and_warms_a_spare_in_every_seat_before_any_run():
    story = Story(2, held=True)
    (request,) = story.all(c.RequestBundles)
    assert (request.bundles, request.minimum) == (2, True)
    story.place(1, "a", "b")
    assert [start.gently for start in story.all(c.StartWorker)] == [False, False]
    story.start()
    assert story.phase is Phase.HELD
    assert story.generation == 0
    assert not story.all(c.Promote)


def test_spares_0_still_warms_the_ranks_of_the_next_run():
    story = Story(2, held=True, spares=0).hold("a", "b")
    story.request()
    story.join()
    story.succeed()
    assert len(story.new(c.StartWorker)) == 2
    story.start()
    assert story.request().after is Phase.FORMING


def test_an_elastic_launcher_takes_units_above_the_minimum_between_the_runs_though_it_may_not_grow():
    story = Story((2, 3), held=True, grow=False).hold("a", "b")
    (growth,) = [request for request in story.all(c.RequestBundles) if not request.minimum]
    story.place(growth.group, "c")
    story.start()
    story.request()
    assert story.coordinator.world_size == 3


# -- one run after the other -----------------------------------------------------------------------------------------


def test_a_run_is_formed_from_the_warm_spares_at_once_and_the_next_one_too():
    story = Story(2, held=True).hold("a", "b")
    assert story.request().after is Phase.FORMING
    first = {story.rank(0), story.rank(1)}
    story.join()
    story.warm()
    finish = story.succeed()
    assert (finish.outcome, finish.generation) == (Outcome.SUCCEEDED, 1)
    assert story.phase is Phase.HELD
    assert first <= story.killed()
    assert not story.new(c.ReleaseBundles)
    decision = story.request()
    assert decision.after is Phase.FORMING
    assert not any(isinstance(command, c.CallRoll) for command in decision.commands)
    assert first.isdisjoint({story.rank(0), story.rank(1)})
    assert story.generation == 2
    story.join()
    finish = story.succeed()
    assert (finish.outcome, finish.generation, finish.restarts, finish.recoveries) == (Outcome.SUCCEEDED, 2, 0, ())
    assert len(story.all(c.RequestBundles)) == 1


def test_a_run_that_comes_before_the_seats_are_ready_waits_for_them():
    story = Story(2, held=True)
    story.request()
    assert story.phase is Phase.RENDEZVOUS
    story.place(1, "a", "b")
    story.start()
    assert story.phase is Phase.FORMING


def test_the_processes_of_one_run_are_named_to_those_that_take_their_seats_in_the_next():
    story = after_a_run()
    old = [c.Process(1000 + story.rank(rank), 7) for rank in (0, 1)]
    story.succeed()
    story.request()
    assert [story.assignment(rank).predecessors for rank in (0, 1)] == [(old[0],), (old[1],)]


def test_a_result_of_the_last_run_that_comes_late_changes_nothing():
    story = after_a_run()
    old = story.rank(0)
    story.succeed()
    story.request()
    story.join()
    for event, args in ((e.WorkerReturned, (old, 1)), (e.ResultCollected, (old, 1)), (e.WorkerFailed, (old, 1, FATAL))):
        decision = story.send(event, *args)
        assert not decision.commands
        assert "late" in decision.reason
    assert story.phase is Phase.RUNNING


def test_a_cause_that_is_not_settled_when_its_run_has_succeeded_is_settled_between_the_runs():
    story = after_a_run()
    old = story.rank(1)
    story.fail(0, CLOSED)
    story.answer(*[w for w in story.starts if w not in story.killed()])
    story.join()
    story.succeed()
    story.lose(old, Ending(EndKind.OUT_OF_MEMORY), after=0.01)
    story.wait(5)
    assert "out of memory" in story.told()


# -- failures of one run ---------------------------------------------------------------------------------------------


def test_a_run_whose_budget_is_used_up_leaves_the_next_one_a_full_budget():
    story = after_a_run(max_restarts=1)
    story.lose(story.rank(0))
    story.join()
    story.warm()
    story.lose(story.rank(0), after=5)
    story.wait(5)
    finish = story.finish
    assert (finish.outcome, finish.restarts) == (Outcome.FAILED, 1)
    assert story.phase is Phase.HELD
    assert not story.all(c.ReleaseBundles)
    story.request(max_restarts=1)
    assert story.phase is Phase.FORMING
    assert story.assignment(0).restart_count == 0
    story.join()
    story.warm()
    story.lose(story.rank(1))
    story.join()
    finish = story.succeed()
    assert (finish.outcome, finish.restarts, len(finish.recoveries)) == (Outcome.SUCCEEDED, 1, 1)


@pytest.mark.parametrize("ending", [RAISED, FATAL, SIGKILL], ids=lambda ending: f"{ending.kind.value}{ending.fatal}")
def test_a_run_that_fails_keeps_the_spares_and_the_next_one_forms_at_once(ending: Ending):
    story = after_a_run(max_restarts=0)
    spares = {story.spare_of(0), story.spare_of(1)}
    old = {story.rank(0), story.rank(1)}
    if ending is SIGKILL:
        story.lose(story.rank(1), ending)
    else:
        story.fail(1, ending)
    assert story.phase is Phase.SETTLING
    assert story.killed() == old
    story.wait(5)
    assert story.finish.outcome is Outcome.FAILED
    assert story.request(max_restarts=0).after is Phase.FORMING
    assert {story.rank(0), story.rank(1)} == spares
    story.join()
    assert story.succeed().root_cause is None


def test_the_roll_is_called_before_the_next_run_when_a_node_may_have_gone_with_the_last():
    story = after_a_run(max_restarts=0)
    here, gone = story.spare_of(0), story.spare_of(1)
    story.fail(0, CLOSED)  # all that is heard of it; nothing is known of node b
    story.wait(5)
    assert story.finish.outcome is Outcome.FAILED
    assert story.request(max_restarts=0).after is Phase.ROLL_CALL
    story.answer(here)
    story.wait(0.2)
    assert story.phase is Phase.RENDEZVOUS
    story.send(e.NodeLost, "b")
    assert gone not in story.witness.members.values()
    story.move(1, 1, "c")
    story.wait(0.5)
    story.start()
    story.join()
    assert story.succeed().restarts == 0


def test_what_a_run_that_failed_fatally_still_says_does_not_fail_the_next_one():
    story = after_a_run(max_restarts=0)
    old = story.rank(1)
    story.fail(0, RAISED)
    story.wait(1)
    story.request()
    story.join()
    story.send(e.WorkerFailed, old, 1, FATAL)
    story.lose(old, FATAL)
    assert story.phase is Phase.RUNNING


def test_a_run_without_room_gives_back_what_it_has_and_the_next_one_asks_anew():
    story = Story(2, held=True, timeouts={"placement": 10})
    story.request()
    story.wait(11)
    assert story.finish.outcome is Outcome.NO_ROOM
    assert story.phase is Phase.HELD
    assert story.all(c.ReleaseBundles) == [c.ReleaseBundles((1,))]
    story.wait(60)
    assert len(story.all(c.RequestBundles)) == 1
    story.request()
    assert len(story.new(c.RequestBundles)) == 1
    story.place(2, "a", "b")
    story.start()
    story.join()
    assert story.succeed().outcome is Outcome.SUCCEEDED


# -- what goes wrong between the runs --------------------------------------------------------------------------------


def test_a_spare_that_dies_between_the_runs_is_replaced_and_charged_to_nobody():
    story = Story(2, held=True).hold("a", "b")
    story.lose(1)
    story.wait(1)
    (start,) = story.new(c.StartWorker)
    assert (start.group, start.bundle, start.gently) == (1, 0, False)
    story.start()
    assert story.request(max_restarts=0).after is Phase.FORMING
    story.join()
    assert story.succeed().restarts == 0


def test_a_spare_that_falls_silent_between_the_runs_is_replaced():
    story = Story(2, held=True, timeouts={"lease": 5}).hold("a", "b")
    story.send(e.PulseMissed, 2, 5.1)
    assert story.killed() == {2}
    story.wait(1)
    story.start()
    assert story.request().after is Phase.FORMING


def test_a_node_lost_between_the_runs_is_awaited_and_the_next_run_goes_elsewhere():
    story = Story(2, held=True).hold("a", "b")
    story.send(e.NodeLost, "b")
    story.wait(1)
    (start,) = story.new(c.StartWorker)
    story.move(1, 1, "c")
    story.start(start.worker)
    assert story.request(max_restarts=0).after is Phase.FORMING
    assert [node for node, *_ in story.ranks()] == ["a", "c"]


def test_a_group_that_is_removed_between_the_runs_is_asked_for_again():
    story = Story(2, held=True).hold("a", "b")
    story.send(e.BundlesLost, 1, "somebody removed it")
    assert story.killed() == {1, 2}
    story.wait(2)
    (request,) = story.new(c.RequestBundles)
    story.place(request.group, "a", "b")
    story.start()
    assert story.request().after is Phase.FORMING


def test_spares_that_can_never_start_end_the_first_run_that_needs_them_with_their_reason():
    story = Story(2, held=True, versions={"torch": "2.13.0"})
    story.place(1, "a", "b")
    for worker in (1, 2):
        story.send(e.WorkerStarted, worker, "a", "host-a", 70 + worker, 7, {"torch": "2.12.0"}, ())
    story.wait(60)
    assert len(story.all(c.StartWorker)) == 2  # not again and again
    story.request()
    assert len(story.new(c.StartWorker)) == 2
    story.send(e.WorkerStarted, 3, "a", "host-a", 73, 7, {"torch": "2.12.0"}, ())
    story.wait(5)
    assert story.finish.outcome is Outcome.FAILED
    assert "torch 2.12.0 where the driver has 2.13.0" in story.finish.reason


def test_starts_that_fail_between_the_runs_are_given_up_until_the_next_one():
    story = Story(1, held=True, max_restarts=3)
    story.place(1, "a")
    for _ in range(5):
        story.start(story.coordinator.roster.last_worker, get_ready=False)
        story.lose(story.coordinator.roster.last_worker, KILLED)
        story.wait(10)
    assert story.coordinator.roster.last_worker == 5
    story.wait(60)
    assert story.coordinator.roster.last_worker == 5
    story.request()
    story.start()
    assert story.phase is Phase.FORMING


# -- stopping and leaving --------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_keeps_the_spares_for_the_next():
    story = after_a_run()
    spares = {story.spare_of(0), story.spare_of(1)}
    ranks = [story.rank(0), story.rank(1)]
    story.send(e.StopRequested, "Ctrl-C")
    assert story.phase is Phase.STOPPING
    assert not story.killed()
    for worker in ranks:
        story.lose(worker)
    assert story.finish.outcome is Outcome.STOPPED
    assert story.phase is Phase.HELD
    story.request()
    assert {story.rank(0), story.rank(1)} == spares


def test_a_run_that_is_stopped_while_it_waits_leaves_the_launcher_waiting():
    story = Story(2, held=True)
    story.request()
    story.send(e.StopRequested, "Ctrl-C")
    assert story.finish.outcome is Outcome.STOPPED
    assert story.phase is Phase.HELD
    assert not story.all(c.ReleaseBundles)
    story.place(1, "a", "b")
    story.start()
    assert story.request().after is Phase.FORMING


def test_a_stop_that_comes_after_the_run_stops_nothing():
    story = after_a_run()
    story.succeed()
    assert not story.send(e.StopRequested, "Ctrl-C").commands
    assert story.request().after is Phase.FORMING
    story.join()
    assert story.succeed().outcome is Outcome.SUCCEEDED


def test_leaving_between_the_runs_releases_everything():
    story = after_a_run()
    story.succeed()
    story.mark()
    decision = story.send(e.ReleaseRequested, "the launcher was left")
    assert decision.after is Phase.DONE
    assert story.new(c.ReleaseBundles) == [c.ReleaseBundles((1,))]
    assert not story.new(c.Finish)


def test_leaving_while_a_run_goes_on_stops_it_first():
    story = after_a_run()
    ranks = [story.rank(0), story.rank(1)]
    spares = {story.spare_of(0), story.spare_of(1)}
    story.send(e.ReleaseRequested, "the launcher was left")
    assert story.phase is Phase.STOPPING
    assert story.killed() == spares
    for worker in ranks:
        story.lose(worker)
    assert story.finish.outcome is Outcome.STOPPED
    assert story.phase is Phase.DONE


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.SETTLING], ids=lambda phase: phase.name)
def test_leaving_while_a_run_ends_lets_it_end_and_keeps_nothing(phase: Phase):
    story = after_a_run(max_restarts=0)
    if phase is Phase.STOPPING:
        story.send(e.StopRequested, "Ctrl-C")
    else:
        story.fail(0, CLOSED)
    story.send(e.ReleaseRequested, "the launcher was left")
    assert story.phase is phase
    story.wait(20)
    assert story.phase is Phase.DONE
    assert story.finish.outcome is (Outcome.STOPPED if phase is Phase.STOPPING else Outcome.FAILED)


def test_suspicion_of_a_node_does_not_outlive_the_word_of_those_who_are_there():
    story = after_a_run(max_restarts=0)
    spares = (story.spare_of(0), story.spare_of(1))
    story.lose(story.rank(1), UNREACHABLE)
    story.wait(5)
    story.request()
    assert story.phase is Phase.ROLL_CALL
    story.answer(*spares)
    assert story.phase is Phase.FORMING
