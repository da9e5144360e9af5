"""What the coordinator costs at 10,000 seats: forming them, and one routine event. Pure Python, no Ray.

python benchmarks/coordinator_cost.py [SEATS]
"""

from __future__ import annotations

import statistics
import sys
import time

from raylaunch.coordinator import commands as do
from raylaunch.coordinator import events as e
from raylaunch.coordinator.machine import Coordinator
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import Ending, EndKind
from raylaunch.spec import make_spec

PER_NODE = 8


def main(seats: int) -> None:
    coordinator, now = Coordinator(), 0.0
    spec = make_spec(num_workers=seats, spares=PER_NODE, max_restarts=-1)

    def handle(event: e.Event) -> tuple[float, tuple[do.Command, ...]]:
        started = time.process_time()
        decision = coordinator.handle(event)
        return time.process_time() - started, decision.commands

    def warm_up(commands: tuple[do.Command, ...]) -> tuple[float, list[float], tuple[do.Command, ...]]:
        """Start and ready every worker that was asked for; seconds in all, each event's, and the last commands."""
        nonlocal now
        started: list[e.WorkerStarted] = []
        for command in commands:
            if isinstance(command, do.StartWorker):
                node = f"{command.bundle // PER_NODE:040x}"
                started.append(e.WorkerStarted(now, command.worker, node, "10.0.0.1", command.worker + 100, 1, {}))
        ready = [e.WorkerReady(now, event.worker, 1234, 10**10, 3 * 10**8) for event in started]
        costs: list[float] = []
        last: tuple[do.Command, ...] = ()
        for event in (*started, *ready):
            cost, last = handle(event)
            costs.append(cost)
        return sum(costs), costs, last

    total, commands = handle(e.RunRequested(now, spec))
    group = next(command for command in commands if isinstance(command, do.RequestBundles))
    nodes = tuple(f"{index // PER_NODE:040x}" for index in range(seats))
    cost, commands = handle(e.BundlesPlaced(now, group.group, nodes))
    total += cost
    cost, routine, commands = warm_up(commands)
    promoted = [command for command in commands if isinstance(command, do.Promote)]
    total += cost
    assert len(promoted) == seats
    assert coordinator.generation == 1
    joins = [handle(e.WorkerJoined(now, command.worker, 1))[0] for command in promoted]
    total += sum(joins)
    assert coordinator.phase is Phase.RUNNING
    routine = routine[:-1] + joins[:-1]

    # spares, then one rank is killed: the decision that promotes all of them
    now = 100.0
    _, commands = handle(e.Tick(now))
    warm_up(commands)
    recovery, commands = handle(e.WorkerLost(now, promoted[0].worker, Ending(EndKind.SIGNALED, signal=9)))
    assert sum(isinstance(command, do.Promote) for command in commands) == (seats if coordinator.generation == 2 else 0)
    print(f"seats                                  {seats}")
    print(f"forming them, all events               {total:.3f} s")
    print(f"one routine event, median              {statistics.median(routine) * 1e6:.1f} us")
    print(f"one routine event, 99 % under          {statistics.quantiles(routine, n=100)[98] * 1e6:.1f} us")
    print(f"a rank killed: deciding who follows    {recovery * 1e3:.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
