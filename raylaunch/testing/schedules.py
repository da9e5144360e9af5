"""What a simulated run is made of: a specification, a cluster, and the faults that will hit it, all drawn from a seed.

The faults stand in a list before the run starts. So a failing run can be made smaller by taking faults out of the list,
and what remains can be replayed: `simulate(seed, faults=[...])`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from raylaunch.spec import Bounds, RunSpec, Timeouts

#: No fault begins later than this, in virtual seconds; so every run must end. Most begin much earlier.
FAULTS_END = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong (or right: a node joins).

    With `phase` it waits, from `at` on, until the coordinator is in that phase: most phases last milliseconds, and a
    fault at a random time would hardly ever meet them. `target` picks the victim among those that there are, `amount`
    is a duration or a size, where the kind has one.
    """

    at: float
    kind: str
    target: int = 0
    amount: float = 0.0
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: how often it is drawn, the range of its amount, and how many restarts it may cost at most."""

    weight: float
    least: float = 0.0
    most: float = 0.0
    harm: int = 1


#: Every kind of fault. `FakeFaults` has a method of the same name that says what happens.
KINDS: dict[str, Kind] = {
    "kill": Kind(6),
    "kill_spare": Kind(2),
    "kill_starting": Kind(1),
    "lose_node": Kind(2.5, 0, 15),
    "lose_two_nodes": Kind(1, 0, 15, harm=2),
    "add_node": Kind(3, 1, 4, harm=0),
    "drain": Kind(2, 0.5, 30),
    "freeze": Kind(2, 0.2, 90),
    "freeze_node": Kind(1, 0.2, 60, harm=2),
    "cut": Kind(2, 0.1, 20, harm=2),
    "others": Kind(1.5, 1, 20, harm=0),
    "stop": Kind(0.3, harm=0),
    "stop_now": Kind(0.2, harm=0),
    "release": Kind(0.2, harm=0),
    "raise_error": Kind(3),
    "raise_everywhere": Kind(1),
    "fatal": Kind(0.25),
    "exit": Kind(1),
    "return_early": Kind(1),
    "remove_group": Kind(0.7),
    "start_fails": Kind(1, 1, 6, harm=8),
    "start_hangs": Kind(0.7, 1, 3, harm=4),
    "cannot_work": Kind(0.25),
    "join_hangs": Kind(0.7, 1, 3, harm=3),
    "slow": Kind(1, 1, 10, harm=0),
    "repeat": Kind(2, 1, 20, harm=0),
    "stubborn": Kind(0.5, harm=0),
    "crash_loop": Kind(0.4, 1, 15, harm=10_000),
    "coordinator_dies": Kind(1, harm=0),
}
#: The phases that a fault may wait for, with how often each is chosen.
PHASES = {"RENDEZVOUS": 2, "ROLL_CALL": 3, "FORMING": 4, "RUNNING": 2, "SETTLING": 1, "STOPPING": 1}

#: Of every ten schedules, so many have a launcher with several runs; and of its faults, so many wait until it is held.
LAUNCHERS, BETWEEN_RUNS = 3, 2

_NAMES = list(KINDS)
_WEIGHTS = [kind.weight for kind in KINDS.values()]


@dataclass(frozen=True, slots=True)
class HeldRun:
    """One of a launcher's runs: requested so long after the end of the one before, in virtual seconds."""

    pause: float
    max_restarts: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything about a simulated run that is fixed before it starts."""

    spec: RunSpec
    #: Slots of the nodes that are there at the start.
    nodes: tuple[int, ...]
    faults: tuple[Fault, ...] = field(default=())
    #: A launcher's runs; empty: a single run, without a launcher.
    runs: tuple[HeldRun, ...] = ()


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    spec = _spec(rng)
    nodes = _nodes(rng, spec)
    count = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 20))
    faults = sorted((_fault(rng) for _ in range(count)), key=lambda fault: fault.at)
    if rng.randrange(10) >= LAUNCHERS:
        return Schedule(spec, nodes, tuple(faults))
    faults = [replace(fault, phase="HELD") if rng.randrange(10) < BETWEEN_RUNS else fault for fault in faults]
    return Schedule(spec, nodes, tuple(faults), tuple(_held_run(rng) for _ in range(rng.randint(1, 4))))


def _nodes(rng: random.Random, spec: RunSpec) -> tuple[int, ...]:
    """Mostly enough for the minimum, often more, sometimes too little."""
    unit, units = spec.bounds.unit, spec.bounds.min_units + rng.choice((-1, 0, 0, 1, 2, 2, 3, 4, 5))
    if spec.placement_strategy == "STRICT_SPREAD":
        return tuple(unit * rng.choice((1, 1, 2)) for _ in range(max(1, units)))
    if spec.placement_strategy == "STRICT_PACK":
        return tuple(max(1, units + rng.randint(-1, 1)) for _ in range(rng.randint(1, 3)))
    nodes: list[int] = []
    while sum(nodes) < units:
        nodes.append(rng.randint(1, 4))
    return tuple(nodes) or (1,)


def _spec(rng: random.Random) -> RunSpec:
    unit = rng.choice((1, 1, 1, 1, 2, 3))
    most = 6 if unit == 1 else 3
    low = rng.randint(1, most)
    high = rng.choice((low, min(low + rng.randint(0, 3), most + 1)))
    gpus = rng.choice((0.0, 0.0, 1.0, 1.0, 0.5))
    return RunSpec(
        run_id="simulated",
        bounds=Bounds(low * unit, high * unit, unit),
        resources_per_worker={"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0},
        placement_strategy="STRICT_SPREAD" if unit > 1 else rng.choice(("PACK", "PACK", "SPREAD", "STRICT_PACK")),
        max_restarts=rng.choice((0, 1, 3, 5, 8, 8, -1, -1, -1)),
        grow=rng.random() < 0.75,
        spares=rng.choice((-1, -1, 0, 1, 2)),
        timeouts=Timeouts(
            placement=rng.choice((0.0, 10.0, 20.0, 40.0, 60.0, 60.0)),
            start=rng.choice((8.0, 20.0)),
            process_group=rng.choice((3.0, 15.0)),
            last_call=rng.choice((0.0, 0.5, 2.0)),
            stop=rng.choice((0.0, 1.0, 5.0)),
            lease=rng.choice((5.0, 20.0)),
            unresponsive=rng.choice((4.0, 15.0)),
            min_generation_age=rng.choice((0.0, 2.0, 8.0)),
        ),
        versions={"torch": "2.13"},
    )


def _held_run(rng: random.Random) -> HeldRun:
    pause = rng.choice((0.0, 0.01, rng.uniform(0, 2), rng.uniform(2, 20)))
    return HeldRun(round(pause, 3), rng.choice((0, 1, 3, -1)))


def _fault(rng: random.Random) -> Fault:
    name = rng.choices(_NAMES, _WEIGHTS)[0]
    kind = KINDS[name]
    at = round(rng.choice((rng.uniform(0, 4), rng.uniform(2, 12), rng.uniform(2, 30))), 3)
    phase = rng.choices(list(PHASES), list(PHASES.values()))[0] if rng.random() < 0.4 else ""
    amount = round(rng.uniform(kind.least, kind.most), 2)
    return Fault(at, name, rng.randrange(64), amount, phase)


def time_limit(schedule: Schedule) -> float:
    """The virtual time by which all must have ended, whatever happens: nobody waits forever."""
    times = schedule.spec.timeouts
    one_round = 2 * (times.placement + times.start) + times.process_group + times.last_call + times.stop
    one_round += 3 * times.unresponsive + times.lease + times.min_generation_age + 90
    return 2 * FAULTS_END + (3 + len(schedule.faults) + 4 * len(schedule.runs)) * one_round
