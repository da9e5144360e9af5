"""The coordinator's side of the pulse: who is silent, and how often to speak. Time is given, nothing waits."""

from __future__ import annotations

import pytest

from raylaunch.cluster.pulse import Pulses
from raylaunch.coordinator.roster import Bundle, Group, Seat, Worker, WorkerState
from raylaunch.spec import Timeouts


def workers(**states: WorkerState) -> dict[int, Worker]:
    seat = Seat(Bundle(Group(1, True, 0.0), 0), 0)
    return {n: Worker(n, seat, 0.0, False, state) for n, state in enumerate(states.values(), 1)}


def test_a_silent_worker_is_told_at_its_lease_and_at_its_limit_once_each_and_anew_after_it_was_heard():
    pulses = Pulses(Timeouts(lease=10, unresponsive=60))
    present = workers(one=WorkerState.RUNNING, other=WorkerState.RUNNING)
    pulses.heard([1, 2], 0.0)
    assert pulses.silent(present, 9.0) == []
    pulses.heard([2], 9.0)
    assert pulses.silent(present, 11.0) == [(1, 11.0)]
    assert pulses.silent(present, 12.0) == []
    pulses.heard([2], 50.0)
    assert pulses.silent(present, 60.0) == [(1, 60.0), (2, 10.0)]
    pulses.heard([1, 2], 61.0)
    assert pulses.silent(present, 70.0) == []
    assert pulses.silent(present, 71.0) == [(1, 10.0), (2, 10.0)]


def test_the_clock_of_a_worker_that_was_never_heard_begins_when_it_has_started():
    pulses = Pulses(Timeouts(lease=10, unresponsive=60))
    assert pulses.silent(workers(one=WorkerState.STARTING), 0.0) == []
    assert pulses.silent(workers(one=WorkerState.WARMING), 100.0) == []
    assert pulses.silent(workers(one=WorkerState.WARMING), 110.0) == [(1, 10.0)]


def test_what_is_being_ended_is_not_missed():
    pulses = Pulses(Timeouts(lease=10, unresponsive=60))
    pulses.heard([1], 0.0)
    assert pulses.silent(workers(one=WorkerState.DYING), 100.0) == []


@pytest.mark.parametrize(
    ("nodes", "lease", "seconds"), [(0, 30, 1.0), (1, 30, 1.0), (128, 30, 2.56), (10_000, 30, 7.5), (1, 2, 0.5)]
)
def test_large_runs_speak_less_often_but_several_times_in_a_lease(nodes: int, lease: float, seconds: float):
    assert Pulses(Timeouts(lease=lease)).interval(nodes) == pytest.approx(seconds)
