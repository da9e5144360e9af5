"""What the shell holds in Ray: placement groups and workers; and how each command reaches them.

What a method asks of Ray ends in one of the events that its text names. Two sources tell of a death, Ray's failed
call and the node agent's news; each becomes a `WorkerLost`, and the coordinator decides what it is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raylaunch.cluster import placement
from raylaunch.cluster.agents import Agents, AgentSeat
from raylaunch.cluster.background import Background
from raylaunch.cluster.console import Console
from raylaunch.cluster.faults import RefusedError, SeatLostError, ending_from, is_loss
from raylaunch.cluster.node_actor import Death
from raylaunch.cluster.worker_actor import WorkerActor
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.cluster.worker_words import Hello, Warm
from raylaunch.coordinator import commands as do
from raylaunch.coordinator import events as e
from raylaunch.errors import Ending, EndKind
from raylaunch.spec import RunSpec

#: At the end of a run: how long what is still going on may take, in seconds.
FINISH_SECONDS = 5.0


@dataclass(eq=False)
class Hand:
    """One worker, from the shell's side."""

    number: int
    generation: int = 0
    actor: Any = None
    node: str = ""
    process: do.Process | None = None
    exception: Any = None  # a reference to its pickled exception
    killed: bool = False  # by us
    lost: bool = False  # its process is known to be gone
    watched: bool = False  # by its node's agent


class Hands:
    """Carries the shell's commands to Ray, and posts what comes of them. Lives on the shell's loop."""

    def __init__(
        self,
        spec: RunSpec,
        config: WorkerConfig,
        runtime_env: Any,
        post: Callable[[e.Event], None],
        console: Console,
    ) -> None:
        self._spec = spec
        self._config = config
        self._console = console
        self._post = post
        options = {"num_cpus": 0, "max_restarts": 0, **({"runtime_env": runtime_env} if runtime_env else {})}
        self._worker_class: Any = ray.remote(WorkerActor)
        self._worker_options = options
        self._agents = Agents(config, options, self._died, console)
        self._hands: dict[int, Hand] = {}
        self._groups: dict[int, asyncio.Future[PlacementGroup]] = {}
        self._devices: dict[tuple[int, int], asyncio.Future[tuple[str, tuple[str, ...]]]] = {}
        self._background = Background()
        self._releases = Background()
        self.values: dict[int, Any] = {}
        #: What is told to those that become ranks: of the run that is going on.
        self.run: RunConfig | None = None
        #: In the end, whether commands get no time after SIGTERM.
        self.at_once = False

    def start(self) -> None:
        """Begin with what is sure to be needed."""
        self._background.start(self._start_agent())

    async def _start_agent(self) -> None:
        """Where there is only one node, its agent needn't wait for the coordinator and the placement group."""
        with contextlib.suppress(Exception):  # whatever is wrong: the workers tell
            node = await asyncio.get_running_loop().run_in_executor(None, placement.only_node)
            if node is not None:
                self._agents.ensure(node)

    # -- placement groups --------------------------------------------------------------------------------------------

    def request_bundles(self, command: do.RequestBundles) -> None:
        """Ask for a group; `BundlesPlaced` or `BundlesLost` follows, unless it is released before."""
        loop = asyncio.get_running_loop()
        self._groups[command.group] = loop.run_in_executor(None, placement.create_group, self._spec, command)
        self._background.start(self._await_group(command.group))

    async def _await_group(self, number: int) -> None:
        try:
            group = await self._groups[number]
            nodes: tuple[str, ...] = ("",)
            while "" in nodes:  # a bundle that was lost again meanwhile has no node
                await group.ready()
                nodes = await asyncio.get_running_loop().run_in_executor(None, placement.nodes_of, group)
        except Exception as error:  # refused by Ray, or removed: by us, or by somebody else
            if number in self._groups:
                self._post(e.BundlesLost(time.monotonic(), number, f"{type(error).__name__}: {error}"))
        else:
            if number in self._groups:
                for node in nodes:
                    with contextlib.suppress(Exception):  # what Ray refuses here, it refuses the workers, who tell
                        self._agents.ensure(node)  # now, so that it watches before a worker can die
                self._post(e.BundlesPlaced(time.monotonic(), number, nodes))

    def release_bundles(self, command: do.ReleaseBundles) -> None:
        """Give groups back."""
        for number in command.groups:
            self._devices = {key: found for key, found in self._devices.items() if key[0] != number}
            self._releases.start(self._release(self._groups.pop(number)))

    async def _release(self, group: asyncio.Future[PlacementGroup]) -> None:
        with contextlib.suppress(Exception):  # it was never made
            await asyncio.get_running_loop().run_in_executor(None, remove_placement_group, await group)

    def placement_groups(self) -> list[PlacementGroup]:
        """The groups that exist."""
        return [group.result() for group in self._groups.values() if group.done() and group.exception() is None]

    # -- workers -----------------------------------------------------------------------------------------------------

    def start_worker(self, command: do.StartWorker) -> None:
        """Start a worker; `WorkerStarted` and `WorkerReady` follow, or `WorkerFailed` or `WorkerLost`."""
        hand = self._hands[command.worker] = Hand(command.worker)
        self._background.start(self._start(hand, command, self._groups[command.group]))

    async def _start(self, hand: Hand, command: do.StartWorker, made: asyncio.Future[PlacementGroup]) -> None:
        try:
            group = await made
            if hand.killed:
                return self._lost(hand, Ending(EndKind.KILLED))
            probe = self._probe(command, group)
            if self._config.forked:
                hello = await self._take_seat(hand, command, group)
            else:
                hand.actor = self._start_actor(hand, command, group)
                hello = await hand.actor.hello.remote()
            if isinstance(hello, Ending):
                return self._lost(hand, hello)
            hand.node, hand.process = hello.node, hello.process
            self._watch(hand)
            devices = await self._devices_of(probe, hello.node, command, group)
            self._post(
                e.WorkerStarted(
                    time.monotonic(),
                    hand.number,
                    hello.node,
                    hello.host,
                    hello.process.pid,
                    hello.process.started,
                    hello.versions,
                    devices,
                )
            )
            if self._config.forked:
                warm: Warm | Ending = await hand.actor.warm.remote()
            else:
                warm = await hand.actor.warm.remote(self._agents.ensure(hand.node).actor, gently=command.gently)
        except Exception as error:
            return self._call_failed(hand, error)
        if isinstance(warm, Ending):
            return self._post(e.WorkerFailed(time.monotonic(), hand.number, 0, warm))
        return self._post(
            e.WorkerReady(time.monotonic(), hand.number, warm.port, warm.memory_available, warm.memory_used)
        )

    def _start_actor(self, hand: Hand, command: do.StartWorker, group: PlacementGroup) -> Any:
        """A worker that is an actor."""
        options = {**self._worker_options, "scheduling_strategy": placement.in_bundle(group, command.bundle)}
        try:
            return self._worker_class.options(**options).remote(hand.number, self._config)
        except Exception as error:  # Ray refuses it before it asks anybody: the runtime_env, for one
            raise RefusedError(f"Ray can't start workers like that: {error}") from error

    async def _take_seat(self, hand: Hand, command: do.StartWorker, group: PlacementGroup) -> Hello | Ending:
        """A worker whose seat is in its node's agent. One that has died is waited for, as long as its node is there."""
        loop = asyncio.get_running_loop()
        node = ""
        while not node:  # a bundle that was lost again meanwhile has none
            await group.ready()
            node = (await loop.run_in_executor(None, placement.nodes_of, group))[command.bundle]
        while True:
            agent = self._agents.ensure(node)
            replaced = agent.replaced
            hand.actor = AgentSeat(agent.actor, hand.number)
            try:
                hello: Hello | Ending = await hand.actor.hello.remote()
            except ray.exceptions.RayActorError as error:
                if ending_from(error).fatal:  # nothing that another could mend
                    raise
                await replaced.wait()
                if node not in self._agents:
                    raise
            else:
                return hello

    def _probe(self, command: do.StartWorker, group: PlacementGroup) -> Any:
        """The devices of a bundle, asked once for all its seats and all its workers."""
        if not self._spec.gpus_per_worker:
            return None
        key = (command.group, command.bundle)
        if key not in self._devices:
            gpus = self._spec.bundle_resources["GPU"]
            reference = placement.probe_devices(group, command.bundle, gpus)
            self._devices[key] = asyncio.wrap_future(reference.future())
        return self._devices[key]

    async def _devices_of(
        self, probe: Any, node: str, command: do.StartWorker, group: PlacementGroup
    ) -> tuple[str, ...]:
        if probe is None:
            return ()
        try:
            where, devices = await asyncio.shield(probe)
        except Exception:
            where, devices = "", ()
        if where == node:
            return tuple(devices)
        # The bundle has moved since, or the probe died with its node.
        if self._devices.get((command.group, command.bundle)) is probe:
            del self._devices[(command.group, command.bundle)]
        where, devices = await asyncio.shield(self._probe(command, group))
        return tuple(devices)

    def call_roll(self, command: do.CallRoll) -> None:
        """Ask spares whether they are there; `WorkerAnswered` follows, or `WorkerLost`, or nothing."""
        for worker in command.workers:
            self._background.start(self._answer(self._hands[worker], command.roll))

    async def _answer(self, hand: Hand, roll: int) -> None:
        try:
            await hand.actor.answer.remote()
        except Exception as error:
            return self._call_failed(hand, error)
        return self._post(e.WorkerAnswered(time.monotonic(), hand.number, roll))

    def promote(self, command: do.Promote) -> None:
        """Make a spare a rank; `WorkerJoined` and `WorkerReturned` follow, or `WorkerFailed` or `WorkerLost`."""
        hand = self._hands[command.worker]
        hand.generation = command.assignment.generation
        if command.assignment.rank == 0:
            self._forget_before(hand.generation - 1)
            self.values.clear()
        # Both calls at once: nothing stands between joining and train_fn.
        joined = hand.actor.join.remote(command.assignment, self.run)
        outcome, hand.exception = hand.actor.run.remote()
        self._background.start(self._follow(hand, command.assignment, joined, outcome))

    def _forget_before(self, generation: int) -> None:
        """Forget the workers that are gone, but for the last generation's: one of them may be the culprit."""
        self._hands = {n: h for n, h in self._hands.items() if not h.lost or h.generation >= generation}

    async def _follow(self, hand: Hand, assignment: do.Assignment, joined: Any, outcome: Any) -> None:
        generation = assignment.generation
        try:
            failed: Ending | None = await joined
            if failed is not None:
                return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, failed))
            self._post(e.WorkerJoined(time.monotonic(), hand.number, generation))
            if self.run is not None:
                self._agents.show(hand.node, self.run.run_id, self._console.sources(assignment))
            ending: Ending | None = await outcome
        except Exception as error:
            return self._call_failed(hand, error)
        if ending is None:
            return self._call_failed(hand, SeatLostError())
        if ending.kind is EndKind.RETURNED:
            return self._post(e.WorkerReturned(time.monotonic(), hand.number, generation))
        return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, ending))

    def collect(self, command: do.CollectResult) -> None:
        """Fetch a value; `ResultCollected` follows, or `WorkerFailed` or `WorkerLost`."""
        self._background.start(self._collect(self._hands[command.worker], command.generation))

    async def _collect(self, hand: Hand, generation: int) -> None:
        try:
            collected: tuple[Any] | Ending = await hand.actor.collect.remote()
        except Exception as error:
            if is_loss(error):
                return self._call_failed(hand, error)
            # It doesn't pickle there, or doesn't load here: that will be so again.
            reason = getattr(error, "cause", None) or error
            message = f"its return value can't be sent to the driver: {reason!r}"
            ending = Ending(EndKind.CANNOT_WORK, message=message, traceback=str(error), fatal=True)
            return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, ending))
        if isinstance(collected, Ending):
            return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, collected))
        (self.values[hand.number],) = collected
        return self._post(e.ResultCollected(time.monotonic(), hand.number, generation))

    def stop_workers(self, command: do.StopWorkers) -> None:
        """SIGTERM to workers, by their node's agent."""
        for node, workers in self._by_node(command.workers).items():
            self._agents.ask_to_stop(node, workers)

    def kill_workers(self, command: do.KillWorkers) -> None:
        """End workers at once; `WorkerLost` follows when they are known to be gone."""
        for worker in command.workers:
            if worker in self._hands:
                self._hands[worker].killed = True
        by_node = self._by_node(command.workers)
        watched = {worker for workers in by_node.values() for worker in workers}
        for node, workers in by_node.items():
            self._background.start(self._kill_watched(node, workers, ask=command.ask))
        self._kill_by_ray([worker for worker in command.workers if worker not in watched])

    async def _kill_watched(self, node: str, workers: list[int], *, ask: bool) -> None:
        """The agent kills first: its SIGKILL reaches a stopped process too, and it sees who was dead before."""
        await self._agents.kill(node, workers, ask=ask)
        self._kill_by_ray(workers)

    def _kill_by_ray(self, workers: list[int]) -> None:
        for worker in workers:
            hand = self._hands.get(worker)
            if hand is not None and hand.actor is not None and not self._config.forked:
                ray.kill(hand.actor)

    async def exception_of(self, worker: int, seconds: float) -> bytes | None:
        """The pickled exception of a worker that raised, if there is one."""
        hand = self._hands.get(worker)
        if hand is None or hand.exception is None:
            return None
        with contextlib.suppress(Exception):  # it went with its node
            pickled: bytes | None = await asyncio.wait_for(asyncio.wrap_future(hand.exception.future()), seconds)
            return pickled
        return None

    def _call_failed(self, hand: Hand, error: Exception) -> None:
        """A worker is gone, or it looks like that."""
        if hand.watched and isinstance(error, SeatLostError):
            return None  # the agent, which has said so, watches it, too, and says how it ended
        ending = ending_from(error)
        if self._config.forked and ending.kind is EndKind.KILLED and isinstance(error, ray.exceptions.RayActorError):
            ending = replace(ending, message="the agent of its node, which holds its seat, is gone")
        return self._lost(hand, ending)

    def _lost(self, hand: Hand, ending: Ending) -> None:
        """Ray says that a worker is gone. Its process may not be; where an agent watches it, the agent will say so."""
        node_may_be_gone = ending.kind in (EndKind.UNREACHABLE, EndKind.NODE_LOST)
        certain = node_may_be_gone or not (hand.watched and hand.node in self._agents)
        hand.lost = hand.lost or (certain and ending.kind is not EndKind.UNREACHABLE)
        self._post(e.WorkerLost(time.monotonic(), hand.number, ending, certain=certain))

    # -- node agents -------------------------------------------------------------------------------------------------

    def _by_node(self, workers: tuple[int, ...]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for worker in workers:
            hand = self._hands.get(worker)
            if hand is not None and hand.node in self._agents:
                found.setdefault(hand.node, []).append(worker)
        return found

    def _watch(self, hand: Hand) -> None:
        self._background.start(self._be_watched(hand))

    async def _be_watched(self, hand: Hand) -> None:
        assert hand.process is not None
        hand.watched = await self._agents.watch(hand.node, hand.number, hand.process)

    def _died(self, death: Death) -> None:
        """An agent's news."""
        hand = self._hands.get(death.worker)
        if hand is not None:
            hand.lost = True
            self._agents.forget(hand.node, hand.number)
            self._post(e.WorkerLost(time.monotonic(), hand.number, death.ending, killed=death.killed))

    # -- the end -----------------------------------------------------------------------------------------------------

    async def let_go(self) -> None:
        """End what is left of the run, everywhere, and see that it is gone; bounded."""
        self.kill_workers(do.KillWorkers(tuple(hand.number for hand in self._hands.values() if not hand.lost)))
        await self._agents.end(at_once=self.at_once)
        self.release_bundles(do.ReleaseBundles(tuple(self._groups)))
        self._background.cancel()
        await self._background.finish(FINISH_SECONDS)
        await self._releases.finish(FINISH_SECONDS)
        await self._agents.let_go()
