"""What the shell holds in Ray: placement groups, worker actors, node agents; and how each command reaches them.

What a method asks of Ray ends in one of the events that its text names. Two sources tell of a death, Ray's failed
call and the node agent's news; each becomes a `WorkerLost`, and the coordinator decides what it is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylaunch.cluster import placement
from raylaunch.cluster.background import Background
from raylaunch.cluster.console import Console
from raylaunch.cluster.faults import ending_from, is_loss
from raylaunch.cluster.node_actor import Death, NodeAgent
from raylaunch.cluster.worker_actor import Hello, Warm, WorkerActor
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.coordinator import commands as do
from raylaunch.coordinator import events as e
from raylaunch.errors import Ending, EndKind, short_id
from raylaunch.spec import RunSpec
from raylaunch.worker.logs import Source

logger = logging.getLogger("raylaunch")

#: At the end of a run: how long processes may take to be gone after SIGKILL, and how long an agent may take to say so.
END_SECONDS = 3.0
AGENT_SECONDS = 5.0
#: How long an agent may take to kill workers before Ray is asked to, in seconds.
AGENT_KILL_SECONDS = 0.5
#: A node agent that died is started again after this pause, in seconds, and this often.
AGENT_RESTART_SECONDS = 1.0
AGENT_RESTARTS = 5


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


@dataclass(eq=False)
class Agent:
    """One node's agent, from the shell's side."""

    actor: Any
    restarts: int = 0
    #: What of the ranks there the console shows, and the task that takes it.
    sources: list[Source] = field(default_factory=list)
    output: asyncio.Task[None] | None = None


class Hands:
    """Carries the shell's commands to Ray, and posts what comes of them. Lives on the shell's loop."""

    def __init__(
        self,
        spec: RunSpec,
        config: WorkerConfig,
        runtime_env: Any,
        post: Callable[[e.Event], None],
        console: Console | None,
    ) -> None:
        self._spec = spec
        self._config = config
        self._console = console
        self._writer = ThreadPoolExecutor(1, "raylaunch-console")
        self._post = post
        options = {"num_cpus": 0, "max_restarts": 0, **({"runtime_env": runtime_env} if runtime_env else {})}
        self._worker_class: Any = ray.remote(WorkerActor)
        self._agent_class: Any = ray.remote(NodeAgent)
        self._worker_options, self._agent_options = options, {**options, "max_concurrency": 1000}
        self._hands: dict[int, Hand] = {}
        self._agents: dict[str, Agent] = {}
        self._groups: dict[int, asyncio.Future[PlacementGroup]] = {}
        self._devices: dict[tuple[int, int], asyncio.Future[tuple[str, tuple[str, ...]]]] = {}
        self._background = Background()
        self._releases = Background()
        self.values: dict[int, Any] = {}
        #: What is told to those that become ranks: of the run that is going on.
        self.run: RunConfig | None = None
        #: In the end, whether commands get no time after SIGTERM.
        self.at_once = False
        self._closing = False

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
                        self._ensure_agent(node)  # now, so that it watches before a worker can die
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
            where = placement.in_bundle(group, command.bundle)
            options = {**self._worker_options, "scheduling_strategy": where}
            try:
                hand.actor = self._worker_class.options(**options).remote(hand.number, self._config)
            except Exception as error:  # Ray refuses it before it asks anybody: the runtime_env, for one
                message = f"Ray can't start workers like that: {error}"
                return self._lost(hand, Ending(EndKind.CANNOT_WORK, message=message, fatal=True))
            probe = self._probe(command, group)
            hello: Hello = await hand.actor.hello.remote()
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
            agent = self._agents.get(hand.node)
            warm: Warm | Ending = await hand.actor.warm.remote(agent and agent.actor, gently=command.gently)
        except Exception as error:
            return self._lost(hand, ending_from(error))
        if isinstance(warm, Ending):
            return self._post(e.WorkerFailed(time.monotonic(), hand.number, 0, warm))
        return self._post(
            e.WorkerReady(time.monotonic(), hand.number, warm.port, warm.memory_available, warm.memory_used)
        )

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
            return self._lost(hand, ending_from(error))
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
            if self._console is not None:
                self._show(self._agents.get(hand.node), self._console.sources(assignment))
            ending: Ending = await outcome
        except Exception as error:
            return self._lost(hand, ending_from(error))
        if ending.kind is EndKind.RETURNED:
            return self._post(e.WorkerReturned(time.monotonic(), hand.number, generation))
        return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, ending))

    def collect(self, command: do.CollectResult) -> None:
        """Fetch a value; `ResultCollected` follows, or a failure."""
        self._background.start(self._collect(self._hands[command.worker], command.generation))

    async def _collect(self, hand: Hand, generation: int) -> None:
        try:
            (self.values[hand.number],) = await hand.actor.collect.remote()
        except Exception as error:
            if is_loss(error):
                return self._lost(hand, ending_from(error))
            # It doesn't pickle there, or doesn't load here: that will be so again.
            reason = getattr(error, "cause", None) or error
            message = f"its return value can't be sent to the driver: {reason!r}"
            ending = Ending(EndKind.CANNOT_WORK, message=message, traceback=str(error), fatal=True)
            return self._post(e.WorkerFailed(time.monotonic(), hand.number, generation, ending))
        return self._post(e.ResultCollected(time.monotonic(), hand.number, generation))

    def stop_workers(self, command: do.StopWorkers) -> None:
        """SIGTERM to workers, by their node's agent."""
        for node, workers in self._by_node(command.workers).items():
            self._agents[node].actor.ask_to_stop.remote(workers)

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
        answer = self._agents[node].actor.kill.remote(workers, ask=ask)
        with contextlib.suppress(Exception):  # the node may be gone
            await asyncio.wait_for(asyncio.wrap_future(answer.future()), AGENT_KILL_SECONDS)
        self._kill_by_ray(workers)

    def _kill_by_ray(self, workers: list[int]) -> None:
        for worker in workers:
            hand = self._hands.get(worker)
            if hand is not None and hand.actor is not None:
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
        self._ensure_agent(hand.node)
        self._background.start(self._be_watched(hand, self._agents[hand.node]))

    async def _be_watched(self, hand: Hand, agent: Agent) -> None:
        with contextlib.suppress(Exception):  # the agent is being restarted, and then asked again; or its node is gone
            hand.watched = await agent.actor.watch.remote(hand.number, hand.process)

    def _ensure_agent(self, node: str) -> None:
        if node not in self._agents:
            self._agents[node] = Agent(self._new_agent(node))
            self._background.start(self._listen(node))

    def _show(self, agent: Agent | None, sources: list[Source]) -> None:
        """Have a node send what these write to the console."""
        if agent is None or not sources or self._console is None or self.run is None:
            return
        agent.sources += sources
        agent.actor.follow.remote(self.run.run_id, [(source, self._console.shown[source]) for source in sources])
        if agent.output is None:
            agent.output = asyncio.get_running_loop().create_task(self._take_output(agent, self._console))

    async def _take_output(self, agent: Agent, console: Console) -> None:
        """Show what a node sends, for as long as its agent is there: the next is asked for when all has been shown."""
        with contextlib.suppress(ray.exceptions.RayError):
            while (output := await agent.actor.next_output.remote()) is not None:
                await asyncio.get_running_loop().run_in_executor(self._writer, console.show, output)

    def _new_agent(self, node: str) -> Any:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._agent_class.options(**self._agent_options, scheduling_strategy=where).remote(self._config)

    async def _listen(self, node: str) -> None:
        """Take a node agent's news, for as long as the node is there."""
        agent = self._agents[node]
        try:
            await self._take_news(node, agent)
        finally:
            if self._agents.get(node) is agent and not self._closing:  # in the end each is killed, not left to Ray
                del self._agents[node]

    async def _take_news(self, node: str, agent: Agent) -> None:
        while ray.is_initialized() and not self._closing:
            try:
                for death in await agent.actor.next_deaths.remote():
                    self._died(death)
                agent.restarts = 0
            except (ray.exceptions.ActorUnschedulableError, ray.exceptions.RuntimeEnvSetupError):
                return  # its node is gone, or nothing can run there: the workers tell
            except ray.exceptions.RayActorError:
                agent.restarts += 1
                if agent.restarts > AGENT_RESTARTS:
                    return
                await asyncio.sleep(AGENT_RESTART_SECONDS)
                if not ray.is_initialized():  # or Ray 2.60 would start a new session for the call
                    return
                agent.actor = self._new_agent(node)
                sources, agent.sources, agent.output = agent.sources, [], None
                self._show(agent, sources)
                for hand in self._hands.values():
                    if hand.node == node and not hand.lost:
                        self._background.start(self._be_watched(hand, agent))

    def _died(self, death: Death) -> None:
        """An agent's news."""
        hand = self._hands.get(death.worker)
        if hand is not None:
            hand.lost = True
            self._post(e.WorkerLost(time.monotonic(), hand.number, death.ending, killed=death.killed))

    # -- the end -----------------------------------------------------------------------------------------------------

    async def let_go(self) -> None:
        """End what is left of the run, everywhere, and see that it is gone; bounded."""
        self._closing = True
        self.kill_workers(do.KillWorkers(tuple(hand.number for hand in self._hands.values() if not hand.lost)))
        await asyncio.gather(*(self._end_node(node, agent) for node, agent in self._agents.items()))
        self.release_bundles(do.ReleaseBundles(tuple(self._groups)))
        self._background.cancel()
        await self._background.finish(AGENT_SECONDS)
        await self._releases.finish(AGENT_SECONDS)
        for agent in self._agents.values():
            ray.kill(agent.actor)
            if agent.output is not None:
                agent.output.cancel()
        self._writer.shutdown(wait=False, cancel_futures=True)  # a console may never take what it was given
        if self._console is not None:
            self._console.close()

    async def _end_node(self, node: str, agent: Agent) -> None:
        try:
            answer = agent.actor.end.remote(END_SECONDS, at_once=self.at_once)
            patient = self._config.command is not None and not self.at_once
            seconds = AGENT_SECONDS + (self._config.stop_seconds if patient else 0.0)
            stubborn = await asyncio.wait_for(asyncio.wrap_future(answer.future()), seconds)
        except Exception as error:
            logger.info(
                "node %s can't say whether all its processes are gone: %s", short_id(node), type(error).__name__
            )
        else:
            if stubborn:
                logger.warning("node %s: processes %s would not go", short_id(node), stubborn)
            if agent.output is not None:
                await agent.output  # the rest: for as long as the console takes it
