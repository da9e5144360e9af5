"""Tells a story to the coordinator by hand: events in, commands out, no cluster, no clock.

`Story` plays the shell and keeps just enough to be short to write: which worker sits where, what has been asked for.
Nothing happens by itself; after every event the invariants and the witness must agree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from raylaunch.coordinator import commands as c
from raylaunch.coordinator import events as e
from raylaunch.coordinator.invariants import check
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.coordinator.witness import Witness
from raylaunch.errors import Ending, EndKind
from raylaunch.spec import Timeouts, make_spec

C = TypeVar("C", bound=c.Command)

SIGKILL = Ending(EndKind.SIGNALED, signal=9)
KILLED = Ending(EndKind.KILLED)
OUT_OF_MEMORY = Ending(EndKind.OUT_OF_MEMORY)
UNREACHABLE = Ending(EndKind.UNREACHABLE)
NODE_LOST = Ending(EndKind.NODE_LOST)
CLOSED = Ending(EndKind.RAISED, error_type="RuntimeError", message="Connection closed by peer", collateral=True)
RAISED = Ending(EndKind.RAISED, error_type="ValueError", message="no such column")
FATAL = Ending(EndKind.RAISED, error_type="KeyError", message="'model'", fatal=True)


class Story:
    """One run, or the runs of a launcher (`held`), told by hand. Times are seconds since the first event."""

    def __init__(self, num_workers: int | tuple[int, int] = 2, *, held: bool = False, **spec: Any) -> None:
        timeouts = Timeouts(**{"last_call": 2.0, "min_generation_age": 10.0, **spec.pop("timeouts", {})})
        self.coordinator = Coordinator()
        self.witness = Witness()
        self.now = 0.0
        self.decisions: list[Decision] = []
        self.since = 0  # what `new` looks at
        self.wake: float | None = None
        #: (group, bundle) -> node.
        self.where: dict[tuple[int, int], str] = {}
        self.starts: dict[int, c.StartWorker] = {}
        self.started: set[int] = set()
        self.ready: set[int] = set()
        self.devices: dict[tuple[int, int], tuple[str, ...]] = {}
        self.spec = make_spec(num_workers=num_workers, run_id="story", timeouts=timeouts, **spec)
        self.runs = 0
        self.send(e.HoldRequested if held else e.RunRequested, self.spec)

    # -- events ------------------------------------------------------------------------------------------------------

    def send(self, event: type[e.Event], *args: Any, after: float = 0.0) -> Decision:
        """One event, `after` so many seconds."""
        self.now += after
        fact = event(self.now, *args)
        decision = self.coordinator.handle(fact)
        self.decisions.append(decision)
        for command in decision.commands:
            if isinstance(command, c.StartWorker):
                self.starts[command.worker] = command
            elif isinstance(command, c.WakeAt):
                self.wake = command.at
        self.witness.observe(fact, decision)
        check(self.coordinator)
        return decision

    def request(self, *, max_restarts: int = 3, after: float = 0.0) -> Decision:
        """The launcher's next run."""
        self.runs += 1
        self.mark()
        spec = replace(self.spec, run_id=f"story-{self.runs}", max_restarts=max_restarts)
        return self.send(e.RunRequested, spec, after=after)

    def wait(self, seconds: float) -> None:
        """Time passes; whoever asked to be woken is."""
        until = self.now + seconds
        for _ in range(1000):
            if self.wake is None or self.wake > until:
                break
            self.now, self.wake = max(self.now, self.wake), None
            self.send(e.Tick)
        else:
            raise AssertionError("the coordinator wakes itself for ever")
        self.now = until

    def place(self, group: int, *nodes: str) -> Decision:
        """Ray places a group."""
        for index, node in enumerate(nodes):
            self.where[group, index] = node
        return self.send(e.BundlesPlaced, group, nodes)

    def move(self, group: int, bundle: int, node: str) -> None:
        """Ray has brought a lost bundle back on another node: whoever is queued in it can start there."""
        self.where[group, bundle] = node

    def start(self, *workers: int, get_ready: bool = True) -> Decision:
        """These workers start (all that are due, if none is named), and become ready."""
        for worker in workers or self.due():
            command = self.starts[worker]
            place = (command.group, command.bundle)
            node, devices = self.where[place], self.devices.get(place, ())
            self.send(e.WorkerStarted, worker, node, f"host-{node}", 1000 + worker, 7, {}, devices)
            self.started.add(worker)
        if get_ready:
            self.get_ready(*workers)
        return self.decisions[-1]

    def get_ready(self, *workers: int) -> None:
        """These workers (or all that have started) are warm spares now."""
        for worker in workers or sorted(self.started - self.ready):
            if not self._ended(worker):
                self.send(e.WorkerReady, worker, 20_000 + worker, 64 << 30, 1 << 30)
            self.ready.add(worker)

    def due(self) -> list[int]:
        """Workers that have been asked for, have not started, and whose bundle is there."""
        waiting = [w for w in self.starts if w not in self.started and not self._ended(w)]
        return [w for w in waiting if (self.starts[w].group, self.starts[w].bundle) in self.where]

    def _ended(self, worker: int) -> bool:
        seen = self.witness.workers[worker]
        return seen.killed or seen.lost

    def join(self) -> Decision:
        """All ranks of the newest generation join."""
        for rank in range(self.coordinator.world_size):
            self.send(e.WorkerJoined, self.rank(rank), self.generation)
        return self.decisions[-1]

    def run(self, *nodes: str) -> Story:
        """Up to the first generation running, the minimum on these nodes."""
        self.place(1, *nodes)
        self.start()
        if self.phase is Phase.RENDEZVOUS:
            self.wait(self.spec.timeouts.last_call + 1)
        self.join()
        assert self.phase is Phase.RUNNING
        self.mark()
        return self

    def warm(self) -> Story:
        """The spares for the next failure are ready."""
        self.wait(1.5)
        self.start()
        self.mark()
        return self

    def hold(self, *nodes: str) -> Story:
        """Up to a spare ready in every seat of the minimum, for the first run."""
        self.place(1, *nodes)
        self.start()
        assert self.phase is Phase.HELD
        self.mark()
        return self

    def succeed(self) -> c.Finish:
        """Every rank returns."""
        for rank in range(self.coordinator.world_size):
            worker, generation = self.rank(rank), self.generation
            self.send(e.WorkerReturned, worker, generation)
            self.send(e.ResultCollected, worker, generation)
        return self.finish

    def lose(self, worker: int, ending: Ending = SIGKILL, after: float = 0.0) -> Decision:
        """A worker's process is gone, or can't be reached."""
        return self.send(e.WorkerLost, worker, ending, after=after)

    def fail(self, rank: int, ending: Ending = RAISED, after: float = 0.0) -> Decision:
        """A rank of the newest generation tells how it failed."""
        return self.send(e.WorkerFailed, self.rank(rank), self.generation, ending, after=after)

    def answer(self, *workers: int) -> Decision:
        """These workers answer the newest roll call."""
        call = self.all(c.CallRoll)[-1]
        for worker in workers:
            self.send(e.WorkerAnswered, worker, call.roll, after=0.01)
        return self.decisions[-1]

    # -- what came of it ---------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self.coordinator.phase

    @property
    def generation(self) -> int:
        return self.coordinator.generation

    @property
    def finish(self) -> c.Finish:
        """How the run, or the launcher's last one, ended."""
        finishes = self.all(c.Finish)
        assert len(finishes) == max(1, self.runs)
        return finishes[-1]

    def mark(self) -> None:
        """Let `new` look at what comes from here on."""
        self.since = len(self.decisions)

    def all(self, kind: type[C]) -> list[C]:
        """Every command of a kind so far."""
        return [x for decision in self.decisions for x in decision.commands if isinstance(x, kind)]

    def new(self, kind: type[C]) -> list[C]:
        """The commands of a kind since the last `mark`."""
        return [x for decision in self.decisions[self.since :] for x in decision.commands if isinstance(x, kind)]

    def killed(self) -> set[int]:
        """Workers killed since the last `mark`."""
        return {worker for command in self.new(c.KillWorkers) for worker in command.workers}

    def told(self) -> str:
        """Everything that the user was told."""
        return "\n".join(command.text for command in self.all(c.Tell))

    def rank(self, rank: int) -> int:
        """The worker that holds a rank of the newest generation."""
        return self.witness.members[rank]

    def ranks(self) -> list[tuple[str, int, int, int]]:
        """(node, local rank, local world size, node rank) of each rank of the newest generation."""
        found = []
        for rank in sorted(self.witness.members):
            seen = self.witness.workers[self.witness.members[rank]]
            assert seen.promoted is not None
            a = seen.promoted
            found.append((seen.node, a.local_rank, a.local_world_size, a.node_rank))
        return found

    def assignment(self, rank: int) -> c.Assignment:
        """What a rank of the newest generation was told."""
        promoted = self.witness.workers[self.rank(rank)].promoted
        assert promoted is not None
        return promoted

    def spare_of(self, rank: int) -> int:
        """The newest worker in the bundle of a rank that isn't the rank itself."""
        seen = self.witness.workers[self.rank(rank)]
        place = (seen.group, seen.bundle)
        return max(w for w, s in self.starts.items() if (s.group, s.bundle) == place and w != self.rank(rank))


def in_phase(phase: Phase) -> Story:
    """A run that is in a given phase."""
    if phase is Phase.RENDEZVOUS:
        return Story(2)
    if phase is Phase.HELD:
        story = Story(2, held=True).hold("a", "b")
        story.request()
        story.join()
        story.succeed()
        assert story.phase is phase
        return story
    if phase is Phase.FORMING:
        story = Story(2)
        story.place(1, "a", "b")
        story.start()
        return story
    story = Story(2, max_restarts=0 if phase is Phase.SETTLING else 3).run("a", "b")
    if phase is Phase.ROLL_CALL:
        story.warm()
        story.fail(0, CLOSED)
    elif phase is Phase.SETTLING:
        story.fail(0, CLOSED)
    elif phase is Phase.STOPPING:
        story.send(e.StopRequested, "enough")
    elif phase is Phase.DONE:
        story.succeed()
    assert story.phase is phase
    return story
