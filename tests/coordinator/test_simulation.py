"""Ten thousand schedules of faults, and proof that the simulator would see a bug if there were one."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.testing.schedules import KINDS, Fault, draw
from raylaunch.testing.simulation import SimulationFailed, simulate

CHUNK = 250
CHUNKS = range(0, 10_000, CHUNK)


def simulate_all(first: int) -> list[str]:
    """What went wrong in one chunk of seeds."""
    wrong = []
    for seed in range(first, first + CHUNK):
        try:
            simulate(seed)
        except SimulationFailed as failed:
            wrong.append(str(failed))
    return wrong


@pytest.fixture(scope="module")
def chunks() -> Iterator[dict[int, Future[list[str]]]]:
    """All chunks, spread over the cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {first: pool.submit(simulate_all, first) for first in CHUNKS}


@pytest.mark.parametrize("first", CHUNKS)
def test_no_schedule_breaks_the_coordinator(chunks: dict[int, Future[list[str]]], first: int):
    wrong = chunks[first].result()
    assert not wrong, f"{len(wrong)} of {CHUNK}, the first: {wrong[0]}"


def test_the_first_schedules_break_nothing():
    assert simulate_all(0) == []


def test_the_same_seed_gives_the_same_run():
    for seed in (3, 17, 40):
        first, second = simulate(seed), simulate(seed)
        assert first.trace == second.trace
        assert first == second


def test_a_seeds_own_faults_given_by_hand_replay_it():
    assert simulate(17, faults=draw(17).faults).trace == simulate(17).trace


def test_without_faults_nothing_is_charged():
    for seed in range(30):
        result = simulate(seed, faults=[])
        assert result.restarts == 0
        assert result.outcome in (c.Outcome.SUCCEEDED, c.Outcome.NO_ROOM)


def test_every_kind_of_fault_happens_and_every_outcome():
    fired, outcomes, phases = set(), set(), set()
    for seed in range(400):
        result = simulate(seed)
        fired |= {fault.kind for fault in result.fired}
        outcomes.add(result.outcome)
        phases |= {decision.after for _, decision in result.trace}
    assert fired == set(KINDS)
    assert outcomes == set(c.Outcome)
    assert phases == set(Phase) - {Phase.NEW}


def test_a_story_tells_every_event():
    result = simulate(3)
    story = result.story()
    assert len(story) == len(result.trace)
    assert "RunRequested" in story[0] or "HoldRequested" in story[0]
    assert any("Finish" in line for line in story)


def test_launchers_have_several_runs_and_one_that_fails_is_followed_by_one_that_succeeds():
    runs = [[finish.outcome for finish in simulate(seed).runs] for seed in range(400) if draw(seed).runs]
    pairs = {pair for outcomes in runs for pair in pairwise(outcomes)}
    assert len(runs) > 80
    assert {(c.Outcome.FAILED, c.Outcome.SUCCEEDED), (c.Outcome.SUCCEEDED, c.Outcome.SUCCEEDED)} <= pairs


# -- planted bugs ----------------------------------------------------------------------------------------------------


class Mutant(Coordinator):
    """A coordinator with a planted bug: what it decides is tampered with on the way out."""

    def handle(self, event: e.Event) -> Decision:
        decision = super().handle(event)
        return replace(decision, commands=tuple(self.tamper(decision, event)))

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        raise NotImplementedError


class NoFencing(Mutant):
    """The members of an ended generation live on."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        running = decision.before is Phase.RUNNING and decision.after is not Phase.DONE
        return [x for x in decision.commands if not (running and isinstance(x, c.KillWorkers))]


class FreeRestarts(Mutant):
    """Failures cost nothing."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        self.restarts = 0
        return list(decision.commands)


class Grudge(Mutant):
    """What one run was charged is not forgotten in the next."""

    def forget_run(self) -> None:
        restarts = getattr(self, "restarts", 0)
        super().forget_run()
        self.restarts = restarts

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return list(decision.commands)


class Hoarder(Mutant):
    """A launcher that is left goes on holding."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        left = isinstance(event, e.ReleaseRequested) and decision.before is Phase.HELD
        return [x for x in decision.commands if not (left and isinstance(x, (c.KillWorkers, c.ReleaseBundles)))]


class Survivor(Mutant):
    """A launcher's ranks outlive their run."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        ends = decision.after is Phase.HELD and any(isinstance(x, c.Finish) for x in decision.commands)
        return [x for x in decision.commands if not (ends and isinstance(x, c.KillWorkers))]


class OverdrawnBudget(Mutant):
    """One failure more than allowed is survived."""

    def handle(self, event: e.Event) -> Decision:
        if isinstance(event, e.RunRequested) and event.spec.max_restarts >= 0:
            event = replace(event, spec=replace(event.spec, max_restarts=event.spec.max_restarts + 1))
        return super().handle(event)

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return list(decision.commands)


class DoublePromotion(Mutant):
    """One rank is given to two workers."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        promoted = [x for x in decision.commands if isinstance(x, c.Promote)]
        if len(promoted) < 2:
            return list(decision.commands)
        twin = replace(promoted[1], assignment=promoted[0].assignment)
        return [twin if x is promoted[1] else x for x in decision.commands]


class WrongEndpoint(Mutant):
    """The master endpoint is that of the last generation's rank 0."""

    first: ClassVar[tuple[str, int] | None] = None

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        commands: list[c.Command] = []
        for x in decision.commands:
            if isinstance(x, c.Promote) and x.assignment.generation > 1:
                a = replace(x.assignment, master_port=x.assignment.master_port - 1)
                commands.append(replace(x, assignment=a))
            else:
                commands.append(x)
        return commands


class ScatteredRanks(Mutant):
    """The ranks of a node are not contiguous."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        promoted = [x for x in decision.commands if isinstance(x, c.Promote)]
        if len(promoted) < 3:
            return list(decision.commands)
        ranks = [x.assignment.rank for x in promoted]
        turned = ranks[1:] + ranks[:1]
        new = {
            id(x): replace(x, assignment=replace(x.assignment, rank=r)) for x, r in zip(promoted, turned, strict=True)
        }
        return [new.get(id(x), x) for x in decision.commands]


class Sleeper(Mutant):
    """Nobody wakes it."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return [x for x in decision.commands if not isinstance(x, c.WakeAt)]


class Leak(Mutant):
    """A group of growth is never given back."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return [replace(x, groups=x.groups[:1]) if isinstance(x, c.ReleaseBundles) else x for x in decision.commands]


class Greedy(Mutant):
    """It asks for one unit more than allowed."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return [replace(x, bundles=x.bundles + 1) if isinstance(x, c.RequestBundles) else x for x in decision.commands]


class Forgetful(Mutant):
    """One result is never fetched."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return [x for x in decision.commands if not (isinstance(x, c.CollectResult) and x.worker % 4 == 0)]


class Credulous(Mutant):
    """What an old generation's worker says ends the new one."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        late = isinstance(event, e.WorkerFailed) and 0 < event.generation < self.generation
        live = tuple(self.members.values()) if late and decision.after is Phase.RUNNING else ()
        return [*decision.commands, *([c.KillWorkers(live)] if live else [])]


class Talkative(Mutant):
    """It goes on after the end."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        over = decision.before is Phase.DONE
        return [*decision.commands, *([c.Tell("still here")] if over else [])]


class Moody(Mutant):
    """What it decides depends on more than the events."""

    lives: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.lives[0] += 1
        self.mood = str(self.lives[0])

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        return [replace(x, text=x.text + self.mood) if isinstance(x, c.Tell) else x for x in decision.commands]


class Crash(Mutant):
    """It breaks when a node drains."""

    def tamper(self, decision: Decision, event: e.Event) -> list[c.Command]:
        if isinstance(event, e.NodeDraining):
            raise KeyError("drain")
        return list(decision.commands)


MUTANTS = [
    NoFencing,
    FreeRestarts,
    Grudge,
    Hoarder,
    Survivor,
    OverdrawnBudget,
    DoublePromotion,
    WrongEndpoint,
    ScatteredRanks,
    Sleeper,
    Leak,
    Greedy,
    Forgetful,
    Credulous,
    Talkative,
    Moody,
    Crash,
]


def first_failure(mutant: Callable[[], Coordinator], seeds: range = range(400)) -> tuple[int, str]:
    """The first seed that finds a bug, and what is said about it."""
    for seed in seeds:
        try:
            simulate(seed, coordinator=mutant, shrink=False)
        except SimulationFailed:
            try:
                simulate(seed, coordinator=mutant)
            except SimulationFailed as failed:
                return seed, str(failed)
            raise AssertionError(f"seed {seed} fails, and does not") from None
    raise AssertionError("the simulator did not see it")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_bug_is_found(mutant: type[Mutant]):
    seed, report = first_failure(mutant)
    assert f"simulate({seed}, faults=[" in report


def test_a_failure_is_shrunk_to_the_faults_that_matter_and_can_be_replayed():
    seed, report = first_failure(Crash)
    call = re.search(r"^replay: simulate\((\d+), faults=(\[.*\])\)$", report, re.MULTILINE)
    assert call is not None
    faults = eval(call[2], {"Fault": Fault})
    assert [fault.kind for fault in faults] == ["drain"]
    assert len(draw(seed).faults) > 1
    with pytest.raises(SimulationFailed, match="KeyError: 'drain'"):
        simulate(seed, faults=faults, coordinator=Crash)


def test_a_run_that_hangs_says_who_waits_for_what():
    _, report = first_failure(Forgetful)
    assert "nobody will wake the coordinator" in report or "should have ended" in report
    assert "returned" in report
