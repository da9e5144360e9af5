r"""A whole run in virtual time, or a launcher with several: `simulate(seed)`.

The real coordinator, a cluster that exists only in memory, and faults at the worst moments, all drawn from one seed: a
failing run can be replayed exactly. After every event the machine's own invariants (`check`) and those that can be
seen from outside (`Witness`) must hold, nobody may wait without a deadline, and every run must end in bounded time for
a reason that can be found among the faults. A failure is made smaller before it is reported.

    result = simulate(7)
    print("\n".join(result.story()))
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import Command, Finish, Outcome, Promote, WakeAt
from raylaunch.coordinator.invariants import check
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.roster import Standing
from raylaunch.coordinator.witness import Witness
from raylaunch.testing.fake_cluster import FakeCluster
from raylaunch.testing.fake_faults import FakeFaults
from raylaunch.testing.fake_parts import CONNECTION_CLOSED, GROUP_TIMEOUT
from raylaunch.testing.schedules import Fault, Schedule, draw, time_limit

#: A run that takes more events than this does not end.
MAX_EVENTS = 20_000
#: How many of the last events a failure shows.
SHOWN = 30
#: Phases in which nobody needs to wake the coordinator: running has no limit.
_UNLIMITED = frozenset({Phase.RUNNING, Phase.HELD, Phase.DONE})

#: With these alone, and room for the minimum, a run must succeed.
_HARMLESS = frozenset({"add_node", "slow", "repeat", "stubborn", "coordinator_dies"})
#: After these a seat may stay without a ready worker while training goes on.
_SPOILS_GROWTH = frozenset({"start_fails", "start_hangs", "cannot_work"})
#: Who can't wait may take these for a lack of room.
_DOUBTS = frozenset({"slow", "cut", "freeze", "freeze_node", "lose_node", "lose_two_nodes"})
#: These hit one run and nothing else, and the next one knows nothing of it.
_OF_ONE_RUN = frozenset(
    {"kill", "raise_error", "raise_everywhere", "fatal", "exit", "return_early", "stop", "stop_now"}
)
#: After these, nodes with room are not used.
_BLOCKS = frozenset({"cannot_work", "drain"})

Step = tuple[e.Event, Decision]


class SimulationFailed(AssertionError):  # noqa: N818 - it is a verdict
    """A simulated run went wrong. The message has the call that replays it, the faults that matter, and the end."""


@dataclass(frozen=True)
class SimulationResult:
    """How a simulated run went, or a launcher's last one; `restarts` are those of all runs."""

    seed: int
    outcome: Outcome
    reason: str
    generations: int
    restarts: int
    world_size: int
    #: How each run ended.
    runs: tuple[Finish, ...]
    #: Virtual seconds from the first event to the last command.
    duration: float
    #: The faults that hit something.
    fired: tuple[Fault, ...]
    #: Every event with the decision that it led to.
    trace: tuple[Step, ...]

    def story(self) -> list[str]:
        """The run, one line per event."""
        return [tell_step(step) for step in self.trace]


def simulate(
    seed: int,
    *,
    faults: Sequence[Fault] | None = None,
    coordinator: Callable[[], Coordinator] = Coordinator,
    shrink: bool = True,
) -> SimulationResult:
    """Run the schedule of `seed`, with its own faults or the given ones. Raises `SimulationFailed`."""
    schedule = draw(seed)
    if faults is not None:
        schedule = replace(schedule, faults=tuple(faults))
    try:
        return _Run(seed, schedule, coordinator).go()
    except _BrokenError as broken:
        message = _shrunk(seed, schedule, coordinator, broken) if shrink else str(broken)
    raise SimulationFailed(message)


def tell_step(step: Step) -> str:
    """One event and its decision as a line."""
    event, decision = step
    commands = ", ".join(_short(command) for command in decision.commands) or "-"
    moved = (
        decision.after.name if decision.before is decision.after else f"{decision.before.name}>{decision.after.name}"
    )
    fields = [f"{name}={_cut(getattr(event, name))}" for name in type(event).__dataclass_fields__ if name != "at"]
    text = f"{event.at:9.3f} {moved} g{decision.generation} {type(event).__name__}({', '.join(fields)}) => {commands}"
    return f"{text}   [{decision.reason}]" if decision.reason else text


class _BrokenError(Exception):
    """What went wrong in one run, with the end of its story."""

    def __init__(self, problem: str, steps: list[Step]) -> None:
        super().__init__(problem)
        self.steps = steps


class _Run:
    """One run of one schedule."""

    def __init__(self, seed: int, schedule: Schedule, factory: Callable[[], Coordinator]) -> None:
        self.seed = seed
        self.schedule = schedule
        self.factory = factory
        self.cluster = FakeCluster(schedule, random.Random(seed ^ 0x5EED))  # noqa: S311 - reproducible, not secret
        self.faults = FakeFaults(self.cluster, schedule.faults)
        self.coordinator = factory()
        self.witness = Witness()
        self.hung_starts = 0
        self.steps: list[Step] = []
        self.limit = time_limit(schedule)
        self.ended_at = 0.0
        #: Since when there is room to grow, and for which generation.
        self.could_grow_since: tuple[float, int] | None = None
        #: How many faults had hit something when the newest generation was formed.
        self.fired_before = 0
        #: How the runs so far ended.
        self.finishes: list[Finish] = []
        #: How many faults had hit something when the newest run was requested.
        self.fired_when_requested = 0

    def go(self) -> SimulationResult:
        """To the end, and a little further: what arrives after the end must change nothing."""
        try:
            self._run()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise _BrokenError(problem, self.steps) from error
        last = self.finishes[-1] if self.finishes else Finish(Outcome.STOPPED, "the launcher was left before any run")
        return SimulationResult(
            self.seed,
            last.outcome,
            last.reason,
            last.generation,
            sum(finish.restarts for finish in self.finishes),
            last.world_size,
            tuple(self.finishes),
            self.ended_at,
            tuple(self.faults.fired),
            tuple(self.steps),
        )

    def _run(self) -> None:
        clock, cluster = self.cluster.clock, self.cluster
        if self.schedule.runs:
            self._handle(e.HoldRequested(0.0, self.schedule.spec))
            self._go_on()
        else:
            self._handle(e.RunRequested(0.0, self.schedule.spec))
        while self.coordinator.phase is not Phase.DONE:
            if cluster.wake is not None and (not clock.queue or cluster.wake <= clock.queue[0][0]):
                clock.now, cluster.wake = cluster.wake, None
                self._handle(e.Tick(clock.now))
            elif clock.queue:
                self._next()
            else:
                raise AssertionError(f"nothing is under way and nobody will wake the coordinator; {self._waiting()}")
            if clock.now > self.limit:
                raise AssertionError(f"the run should have ended by {self.limit:.0f} s; {self._waiting()}")
            if len(self.steps) > MAX_EVENTS:
                raise AssertionError(f"no end after {MAX_EVENTS} events; {self._waiting()}")
        self.ended_at = clock.now
        while clock.queue and clock.now < self.ended_at + 10:
            self._next()

    def _go_on(self) -> None:
        """Have the launcher's next run requested, or the launcher left after the last one."""
        number, runs = len(self.finishes), self.schedule.runs
        if number < len(runs):
            self.cluster.clock.after(runs[number].pause, self._request, number)
        else:
            self.cluster.clock.after(1.0, self.faults.leave)

    def _request(self, number: int) -> None:
        if self.faults.left:
            return
        machine, bounds = self.coordinator, self.schedule.spec.bounds
        self.fired_when_requested = len(self.faults.fired)
        warm = machine.roster.standings[Standing.USABLE] == bounds.max_units and not machine.roll_owed
        allowed = self.schedule.runs[number].max_restarts
        spec = replace(self.schedule.spec, run_id=f"simulated-{number + 1}", max_restarts=allowed)
        self._handle(e.RunRequested(self.cluster.clock.now, spec))
        assert not warm or self.coordinator.phase is Phase.FORMING, "every seat is warm, and the run waits"

    def _next(self) -> None:
        clock = self.cluster.clock
        at, _, event, function, args = clock.pop()
        clock.now = at
        if event is not None:
            self._handle(event(at, *args))
        elif function is not None:
            function(*args)
        if self.faults.coordinator_died:
            self.faults.coordinator_died = False
            self._replay()

    def _check_spread(self, decision: Decision) -> None:
        """With workers_per_node, no generation has two units on a node, wherever Ray brings lost bundles back."""
        spec, workers = self.schedule.spec, self.cluster.workers
        promoted = [command.worker for command in decision.commands if isinstance(command, Promote)]
        sizes = Counter(workers[worker].node for worker in promoted)
        alone = spec.placement_strategy != "STRICT_SPREAD" or set(sizes.values()) <= {spec.bounds.unit}
        assert alone, f"more than one unit on a node: {dict(sizes)}"

    def _handle(self, event: e.Event) -> None:
        before = self.coordinator.generation
        decision = self.coordinator.handle(event)
        self.steps.append((event, decision))
        for command in decision.commands:
            self.cluster.carry_out(command)
        self.witness.observe(event, decision)
        check(self.coordinator)
        self._check_spread(decision)
        phase = self.coordinator.phase
        assert self.cluster.wake is not None or phase in _UNLIMITED, f"phase {phase.name} waits without a WakeAt"
        for command in decision.commands:
            if isinstance(command, Finish):
                self._judge(command)
                self.finishes.append(command)
                if phase is Phase.HELD:
                    self._go_on()
        # A start that hangs is charged each time it is tried, and a frozen node makes them all hang.
        self.hung_starts += "timeouts.start" in decision.reason
        explained = self.faults.harm + self.hung_starts
        charged = sum(finish.restarts for finish in self.finishes)  # no failure is charged to two runs
        charged += self.coordinator.restarts if self.witness.running else 0
        assert charged <= explained, f"{charged} restarts were charged, but the faults so far explain {explained}"
        self._watch_growth()
        if decision.generation > before:
            self._judge_growth()
        self.faults.on_phase(phase.name)

    def _watch_growth(self) -> None:
        """While a run is smaller than allowed and there is room, it must grow before long."""
        machine, spec, now = self.coordinator, self.schedule.spec, self.cluster.clock.now
        wanting = machine.phase is Phase.RUNNING and spec.grow and machine.world_size < spec.bounds.max_workers
        # Ray brings lost bundles of the minimum back all or none, and growth waits for them.
        wanting = wanting and not machine.roster.minimum_pending
        placement = self.cluster.placement
        if not wanting or placement.others_told or placement.units() <= machine.world_size // spec.bounds.unit:
            self.could_grow_since = None
        elif self.could_grow_since is None or self.could_grow_since[1] != machine.generation:
            self.could_grow_since = now, machine.generation
        elif not any(fault.kind in _SPOILS_GROWTH for fault in self.faults.fired):
            patience = spec.timeouts.min_generation_age + spec.timeouts.start + 2 * spec.timeouts.unresponsive + 10
            seconds = now - self.could_grow_since[0]
            assert seconds <= patience, f"there has been room to grow for {seconds:.0f} s; {self._waiting()}"

    def _judge_growth(self) -> None:
        """What was ended in order to grow has grown, unless something has happened meanwhile."""
        outgrown, self.witness.outgrown = self.witness.outgrown, 0
        silent = any(w.alive and (w.frozen or w.cut) for w in self.cluster.workers.values())
        happened = len(self.faults.fired) + self.hung_starts
        count, self.fired_before = self.fired_before, happened
        if outgrown and not silent and count == happened:
            world = self.coordinator.world_size
            # One unit a node: Ray may have brought a lost bundle back where growth was, which it then replaces.
            replaced = self.schedule.spec.placement_strategy == "STRICT_SPREAD" and world == outgrown
            assert world > outgrown or replaced, f"a generation of {outgrown} was ended in order to grow to {world}"

    def _replay(self) -> None:
        """Another coordinator reads the journal: it must decide as the first one did, and goes on from there."""
        successor = self.factory()
        for event, decision in self.steps:
            assert successor.handle(event) == decision, f"replayed, {type(event).__name__} leads elsewhere"
        self.coordinator = successor

    def _judge(self, finish: Finish) -> None:
        """The outcome must have a reason among the faults."""
        kinds = {fault.kind for fault in self.faults.fired}
        if "slow" not in kinds:
            self._judge_causes(finish)
        if finish.outcome is Outcome.STOPPED:
            assert kinds & {"stop", "stop_now", "release"}, "stopped, but nobody asked for it"
        if finish.outcome is Outcome.FAILED:
            assert self.faults.harm, "failed, but nothing had happened"
        impatient = self.schedule.spec.timeouts.placement < 2 and kinds & _DOUBTS
        if finish.outcome is Outcome.NO_ROOM and not kinds & _BLOCKS and not impatient:
            quiet = self.cluster.clock.now - self.cluster.placement.changed_at
            patience = 3 + self.schedule.spec.timeouts.placement / 2
            room = self.cluster.placement.has_room(self.schedule.spec.bounds.min_units)
            assert not room or quiet < patience, f"there has been room for {quiet:.0f} s, but: {finish.reason}"
        if kinds <= _HARMLESS and self._has_room():
            assert finish.outcome is Outcome.SUCCEEDED, f"nothing went wrong, but: {finish.reason}"
        nothing_new = self.fired_when_requested == len(self.faults.fired)
        if nothing_new and kinds <= _HARMLESS | _OF_ONE_RUN and self._has_room():
            # A stop may be under way when its run ends by itself; the shell would not send it to the next one.
            ended_well = finish.outcome in (Outcome.SUCCEEDED, Outcome.STOPPED)
            assert ended_well, f"the last run's failure fails this one: {finish.reason}"
            assert not finish.restarts, f"{finish.restarts} restarts for the last run's failures"

    def _judge_causes(self, finish: Finish) -> None:
        """Nobody may be told a consequence where the cause could be known, nor our own doing."""
        ended = [(recovery.generation - 1, recovery.cause) for recovery in finish.recoveries]
        if finish.root_cause is not None:
            ended.append((finish.root_cause.generation, finish.root_cause.describe()))
        for number, told in ended:
            generation = self.cluster.generations.get(number)
            if generation is not None and not generation.deaths and "without a rank" not in told:
                assert "SIGKILL" not in told, f"nobody died in generation {number} but by our own hands: {told!r}"
            if generation is not None and generation.cause is not None:
                blamed = CONNECTION_CLOSED.message in told or GROUP_TIMEOUT.message in told
                truth = generation.cause.describe()
                assert not blamed, f"generation {number} ended because somebody {truth}, but {told!r} was told"

    def _has_room(self) -> bool:
        """Whether the minimum fits into the cluster as it was at the start."""
        bounds, units = self.schedule.spec.bounds, [n // self.schedule.spec.bounds.unit for n in self.schedule.nodes]
        if self.schedule.spec.placement_strategy == "STRICT_SPREAD":
            return sum(1 for n in units if n) >= bounds.min_units
        together = max(units) if self.schedule.spec.placement_strategy == "STRICT_PACK" else sum(units)
        return together >= bounds.min_units and self.schedule.spec.timeouts.placement > 1

    def _waiting(self) -> str:
        """Who waits for what, for a run that does not end."""
        workers = [
            f"{w.id}: {w.state}{' frozen' * w.frozen}{' cut' * w.cut}{'' if w.alive else ' (no process)'}"
            for w in self.cluster.workers.values()
            if w.alive or w.state == "queued"
        ]
        groups = [f"{g.id}: {g.nodes}" for g in self.cluster.placement.groups.values()]
        machine = self.coordinator
        state = f"phase {machine.phase.name}, generation {machine.generation}, members {machine.members}"
        return f"{state}; workers {{{', '.join(workers)}}}; groups {{{', '.join(groups)}}}"


def _shrunk(seed: int, schedule: Schedule, factory: Callable[[], Coordinator], broken: _BrokenError) -> str:
    """The report of a failure, with as few faults as still make it fail."""
    faults, tried = list(schedule.faults), 0
    index = len(faults) - 1
    while index >= 0:  # from the last to the first; when one could be left out, all the others again
        fewer = faults[:index] + faults[index + 1 :]
        tried += 1
        try:
            _Run(seed, replace(schedule, faults=tuple(fewer)), factory).go()
            index -= 1
        except _BrokenError as smaller:
            faults, broken = fewer, smaller
            index = len(faults) - 1
    listed = ", ".join(repr(fault) for fault in faults)
    lines = [
        f"seed {seed}: {broken}",
        f"replay: simulate({seed}, faults=[{listed}])",
        f"needed: {len(faults)} of {len(schedule.faults)} faults, found in {tried} runs; all of them: simulate({seed})",
        f"spec: {schedule.spec}",
        f"nodes: {schedule.nodes}",
        f"the last {min(SHOWN, len(broken.steps))} of {len(broken.steps)} events:",
        *(tell_step(step) for step in broken.steps[-SHOWN:]),
    ]
    return "\n".join(lines)


def _short(command: Command) -> str:
    if isinstance(command, WakeAt):
        return f"WakeAt({command.at:.3f})"
    values = [_cut(getattr(command, name)) for name in type(command).__dataclass_fields__]
    return f"{type(command).__name__}({', '.join(values)})"


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
