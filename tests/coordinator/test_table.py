"""What may follow what: every event in every phase. What can't be raises, and leaves the machine as it was."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from story_driver import KILLED, RAISED, Story, in_phase

from raylaunch.coordinator import events as e
from raylaunch.coordinator.machine import FACTS, TABLE, Coordinator
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import InternalError
from raylaunch.spec import make_spec

SPEC = Story(2).spec
#: The fields of each event after `at`, about worker 1 and group 1, which every run has had.
FIELDS: dict[type[e.Event], tuple[Any, ...]] = {
    e.HoldRequested: (make_spec(num_workers=2, run_id="launcher"),),
    e.RunRequested: (make_spec(num_workers=2, run_id="again", timeouts=SPEC.timeouts),),
    e.BundlesPlaced: (1, ("a", "b")),
    e.BundlesLost: (1, "it was removed"),
    e.WorkerStarted: (1, "a", "host-a", 71, 7, {}, ()),
    e.WorkerReady: (1, 20_001, 64 << 30, 1 << 30),
    e.WorkerAnswered: (1, 1),
    e.WorkerJoined: (1, 1),
    e.WorkerReturned: (1, 1),
    e.ResultCollected: (1, 1),
    e.WorkerFailed: (1, 1, RAISED),
    e.WorkerLost: (1, KILLED),
    e.NodeLost: ("a",),
    e.NodeDraining: ("a", "spot instance reclaimed"),
    e.OthersWaiting: (True,),
    e.PulseMissed: (1, 5.0),
    e.StopRequested: ("enough",),
    e.ReleaseRequested: ("the launcher was left",),
    e.Tick: (),
}


def a_run(phase: Phase) -> tuple[Coordinator, float]:
    """A machine in this phase, and its time."""
    if phase is Phase.NEW:
        return Coordinator(), 0.0
    story = in_phase(phase)
    if phase is Phase.RENDEZVOUS:  # a run without workers yet knows no worker 1
        story.place(1, "a", "b")
    return story.coordinator, story.now


def state(machine: Coordinator) -> bytes:
    """Everything that the machine remembers."""
    return pickle.dumps(machine)


def test_every_event_has_its_fields_here_and_its_fact_in_the_machine():
    assert set(FIELDS) == set(e.EVENTS.values()) == set(FACTS)
    assert set(TABLE) == set(Phase)


@pytest.mark.parametrize("event", FIELDS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
def test_an_event_is_accepted_or_refused_without_a_trace(phase: Phase, event: type[e.Event]):
    machine, now = a_run(phase)
    before = state(machine)
    fact = event(now, *FIELDS[event])
    begins = {Phase.NEW: {e.HoldRequested, e.RunRequested}, Phase.HELD: {e.RunRequested}}.get(phase, set())
    if event in begins or (phase is not Phase.NEW and event not in (e.HoldRequested, e.RunRequested)):
        assert event in TABLE[phase].accepts
        decision = machine.handle(fact)
        assert decision.before is phase
        assert decision.after in TABLE[phase].leads_to | {phase} | _further(decision.after)
    else:
        assert event not in TABLE[phase].accepts
        with pytest.raises(InternalError, match=event.__name__):
            machine.handle(fact)
        assert state(machine) == before


def _further(phase: Phase) -> frozenset[Phase]:
    """One event may lead through several phases."""
    return frozenset({phase} if any(phase in row.leads_to for row in TABLE.values()) else ())


ALIVE = [phase for phase in Phase if phase is not Phase.NEW]


@pytest.mark.parametrize("number", [0, -1, 99])
@pytest.mark.parametrize("phase", ALIVE, ids=lambda phase: phase.name)
def test_an_identity_that_was_never_given_out_is_refused_without_a_trace(phase: Phase, number: int):
    machine, now = a_run(phase)
    before = state(machine)
    for event in (
        e.WorkerLost(now, number, KILLED),
        e.WorkerFailed(now, number, 0, RAISED),
        e.WorkerReady(now, number, 1),
        e.PulseMissed(now, number, 1.0),
        e.BundlesLost(now, number, "?"),
        e.BundlesPlaced(now, number, ("a", "b")),
    ):
        with pytest.raises(InternalError, match=str(number)):
            machine.handle(event)
    assert state(machine) == before


@pytest.mark.parametrize("phase", ALIVE, ids=lambda phase: phase.name)
def test_time_that_runs_backwards_is_refused_without_a_trace(phase: Phase):
    machine, now = a_run(phase)
    machine.handle(e.Tick(now + 0.01))
    before = state(machine)
    with pytest.raises(InternalError, match="backwards"):
        machine.handle(e.Tick(now))
    assert state(machine) == before


def test_a_group_that_is_placed_with_another_size_is_refused_without_a_trace():
    story = Story(2)
    before = state(story.coordinator)
    with pytest.raises(InternalError, match="2 bundles, not 3"):
        story.coordinator.handle(e.BundlesPlaced(story.now, 1, ("a", "b", "c")))
    assert state(story.coordinator) == before


@pytest.mark.parametrize("phase", [Phase.SETTLING, Phase.STOPPING, Phase.DONE], ids=lambda phase: phase.name)
def test_the_end_is_never_left(phase: Phase):
    assert TABLE[phase].leads_to <= {Phase.HELD, Phase.DONE}


def test_only_new_runs_and_the_release_lead_out_of_being_held():
    assert TABLE[Phase.HELD].leads_to == {Phase.ROLL_CALL, Phase.RENDEZVOUS, Phase.DONE}


def test_a_run_that_asks_for_something_else_than_is_held_is_refused_without_a_trace():
    story = in_phase(Phase.HELD)
    before = state(story.coordinator)
    for spec in (make_spec(num_workers=3, timeouts=SPEC.timeouts), make_spec(num_workers=2, grow=False)):
        with pytest.raises(InternalError, match="something else than it holds"):
            story.coordinator.handle(e.RunRequested(story.now, spec))
    assert state(story.coordinator) == before


def test_every_phase_can_be_reached():
    reachable = {Phase.NEW}
    for _ in Phase:
        reachable |= {after for phase in reachable for after in TABLE[phase].leads_to}
    assert reachable == set(Phase)
