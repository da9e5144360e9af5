"""The node agents, from the shell's side: one on each node of a run. What they tell, and what they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylaunch.cluster.background import Background
from raylaunch.cluster.console import Console
from raylaunch.cluster.faults import RefusedError
from raylaunch.cluster.node_actor import Death, NodeAgent
from raylaunch.cluster.worker_config import WorkerConfig
from raylaunch.coordinator.commands import Process
from raylaunch.errors import short_id
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
class Agent:
    """One node's agent."""

    actor: Any
    restarts: int = 0
    #: Becomes true when `actor` is another, or there will be none any more.
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    #: What it watches.
    workers: dict[int, Process] = field(default_factory=dict)
    #: What of the ranks there the console shows, of which run, and the task that takes it.
    run_id: str = ""
    sources: list[Source] = field(default_factory=list)
    output: asyncio.Task[None] | None = None


class Agents:
    """The agents by node. Lives on the shell's loop."""

    def __init__(
        self, config: WorkerConfig, options: dict[str, Any], died: Callable[[Death], None], console: Console
    ) -> None:
        self._config = config
        self._options = {**options, "max_concurrency": 1000}
        self._class: Any = ray.remote(NodeAgent)
        self._died = died
        self._console = console
        self._writer = ThreadPoolExecutor(1, "raylaunch-console")
        self._agents: dict[str, Agent] = {}
        self._background = Background()
        self._closing = False

    def __contains__(self, node: object) -> bool:
        return node in self._agents

    def ensure(self, node: str) -> Agent:
        """A node's agent, which is started if there is none."""
        if node not in self._agents:
            self._agents[node] = Agent(self._new(node))
            self._background.start(self._listen(node))
        return self._agents[node]

    async def watch(self, node: str, worker: int, process: Process) -> bool:
        """Have a worker's process watched; whether it is."""
        agent = self.ensure(node)
        agent.workers[worker] = process
        return await self._be_watched(agent, worker, process)

    def forget(self, node: str, worker: int) -> None:
        """A worker's process is gone."""
        if node in self._agents:
            self._agents[node].workers.pop(worker, None)

    def ask_to_stop(self, node: str, workers: list[int]) -> None:
        """SIGTERM to workers."""
        self._agents[node].actor.ask_to_stop.remote(workers)

    async def kill(self, node: str, workers: list[int], *, ask: bool) -> None:
        """Have workers killed; returns when they have been, or the agent has had its time."""
        answer = self._agents[node].actor.kill.remote(workers, ask=ask)
        with contextlib.suppress(Exception):  # the node may be gone
            await asyncio.wait_for(asyncio.wrap_future(answer.future()), AGENT_KILL_SECONDS)

    def show(self, node: str, run_id: str, sources: list[Source]) -> None:
        """Have a node send what these write to the console."""
        if node not in self._agents or not sources:
            return
        agent, console = self._agents[node], self._console
        agent.run_id = run_id
        agent.sources += sources
        agent.actor.follow.remote(run_id, [(source, console.shown[source]) for source in sources])
        if agent.output is None:
            agent.output = asyncio.get_running_loop().create_task(self._take_output(agent, console))

    async def end(self, *, at_once: bool) -> None:
        """See that all of the run is gone from all nodes, bounded."""
        self._closing = True
        await asyncio.gather(*(self._end_node(node, agent, at_once) for node, agent in self._agents.items()))

    async def let_go(self) -> None:
        """End the agents themselves. Each is killed, and not left to Ray."""
        self._background.cancel()
        await self._background.finish(AGENT_SECONDS)
        for agent in self._agents.values():
            ray.kill(agent.actor)
            if agent.output is not None:
                agent.output.cancel()
        self._writer.shutdown(wait=False, cancel_futures=True)  # a console may never take what it was given
        self._console.close()

    def _new(self, node: str) -> Any:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        try:
            return self._class.options(**self._options, scheduling_strategy=where).remote(self._config)
        except Exception as error:
            raise RefusedError(f"Ray can't start workers like that: {error}") from error

    async def _be_watched(self, agent: Agent, worker: int, process: Process) -> bool:
        with contextlib.suppress(Exception):  # the agent is being restarted, and then asked again; or its node is gone
            return bool(await agent.actor.watch.remote(worker, process))
        return False

    async def _listen(self, node: str) -> None:
        """Take a node agent's news, for as long as the node is there."""
        agent = self._agents[node]
        try:
            await self._take_news(node, agent)
        finally:
            agent.replaced.set()
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
                agent.actor = self._new(node)
                agent.replaced.set()
                agent.replaced = asyncio.Event()
                if agent.output is not None:
                    agent.output.cancel()
                    agent.output = None
                sources, agent.sources = agent.sources, []
                self.show(node, agent.run_id, sources)
                for worker, process in agent.workers.items():
                    self._background.start(self._watch_again(agent, worker, process))

    async def _watch_again(self, agent: Agent, worker: int, process: Process) -> None:
        await self._be_watched(agent, worker, process)

    async def _take_output(self, agent: Agent, console: Console) -> None:
        """Show what a node sends, for as long as its agent is there: the next is asked for when all has been shown."""
        with contextlib.suppress(ray.exceptions.RayError):
            while (output := await agent.actor.next_output.remote()) is not None:
                await asyncio.get_running_loop().run_in_executor(self._writer, console.show, output)

    async def _end_node(self, node: str, agent: Agent, at_once: bool) -> None:
        try:
            answer = agent.actor.end.remote(END_SECONDS, at_once=at_once)
            patient = self._config.forked and not at_once
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


@dataclass(frozen=True)
class _Call:
    seat: AgentSeat
    method: str

    def remote(self, *args: Any) -> Any:
        """As an actor's method."""
        call = self.seat.agent.seat
        if self.method == "run":
            call = call.options(num_returns=2)
        return call.remote(self.seat.worker, self.method, *args)


@dataclass(frozen=True)
class AgentSeat:
    """A worker whose seat is in its node's agent, called as if it were an actor."""

    agent: Any
    worker: int

    def __getattr__(self, method: str) -> _Call:
        return _Call(self, method)
