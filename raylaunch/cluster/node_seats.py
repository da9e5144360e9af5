"""The seats of a node whose ranks are forked: they live in the node's agent, which speaks for them to the coordinator.

Called by way of the agent, as worker actors are called directly. Ranks ask it over a socket whether they are current,
and tell it that they have returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.exceptions

from raylaunch.cluster.faults import SeatLostError
from raylaunch.cluster.forked_seat import ForkedSeat
from raylaunch.cluster.pulse import ANSWER_SECONDS, NodePulse
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.cluster.worker_words import Hello
from raylaunch.context import AGENT_SOCKET, RETURNED
from raylaunch.coordinator.commands import Assignment
from raylaunch.worker.processes import REPLACED

#: How long to wait for a coordinator that is being restarted before it is asked again, in seconds: Ray has no event.
RESTART_SECONDS = 0.2


class NodeSeats:
    """The seats by their workers' numbers. Lives on the agent's loop.

    `end` ends a worker's process, which leaves a reason as its last words.
    """

    def __init__(self, config: WorkerConfig, directory: str, pulse: NodePulse, end: Callable[[int, str], None]) -> None:
        self._config = config
        self._directory = directory
        self._pulse = pulse
        self._end = end
        self._seats: dict[int, ForkedSeat] = {}
        self._threads: dict[int, ThreadPoolExecutor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = _listen(directory)
        self._server: asyncio.Task[None] | None = None
        self._joined: dict[int, asyncio.Event] = {}
        #: Set when what a worker has returned is asked for: so the coordinator knows that it has.
        self._collected: dict[int, asyncio.Event] = {}
        #: The file with what the run calls.
        self._call = ""
        self._writing = asyncio.Lock()

    async def call(self, worker: int, method: str, *args: Any) -> Any:
        """What a worker actor answers to the method of this name.

        Of a worker that has been ended, `run` is (None, None); anything else raises `SeatLostError`.
        """
        if method == "hello":
            return await self._hello(worker)
        if method == "join":
            assignment, run = args
            return await self._join(worker, assignment, run)
        if method == "run":
            return await self._run(worker)
        if method == "collect" and worker in self._collected:
            self._collected[worker].set()
        return await self._do(worker, method)

    def stop(self, worker: int) -> None:
        """Ask a worker's rank to end."""
        if worker in self._seats:
            self._seats[worker].stop()

    def gone(self, worker: int) -> None:
        """A worker's process has ended."""
        seat = self._seats.pop(worker, None)
        if seat is not None:
            self._joined.pop(worker).set()
            self._collected.pop(worker).set()
            seat.hang_up()  # its thread may wait for an answer
            thread = self._threads.pop(worker)
            thread.submit(seat.close)
            thread.shutdown(wait=False)

    def close(self) -> None:
        """End what is left of all workers."""
        for worker in list(self._seats):
            self.gone(worker)

    async def _hello(self, worker: int) -> Any:
        if self._server is None:
            self._server = asyncio.get_running_loop().create_task(self._serve())
        self._joined[worker], self._collected[worker] = asyncio.Event(), asyncio.Event()
        self._seats[worker] = ForkedSeat(worker, self._config, self._directory)
        self._threads[worker] = ThreadPoolExecutor(1, f"raylaunch-seat-{worker}")
        hello = None
        try:
            hello = await self._do(worker, "hello")
        finally:
            if not isinstance(hello, Hello):  # nobody will call again
                self.gone(worker)
        if worker in self._seats:
            task = asyncio.get_running_loop().create_task(self._live(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return hello

    async def _join(self, worker: int, assignment: Assignment, run: RunConfig) -> Any:
        path = ""
        if run.payload is not None:
            path = os.path.join(self._directory, f"call-{run.run_id}.pickle")
            async with self._writing:
                if path != self._call:  # one for all seats of the node
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._call)  # of a launcher's run before this one
                    data, _ = await run.payload
                    await asyncio.get_running_loop().run_in_executor(None, Path(path).write_bytes, data)
                    self._call = path
        try:
            return await self._do(worker, "join", assignment, run, path)
        finally:
            if worker in self._joined:
                self._joined[worker].set()

    async def _run(self, worker: int) -> Any:
        if worker in self._joined:  # calls of an actor with asyncio overtake one another (Ray 2.60)
            await self._joined[worker].wait()
        try:
            return await self._do(worker, "run")
        except SeatLostError:
            return None, None  # Ray 2.60 would print an error that nobody asks for: the exception's half of it

    async def _do(self, worker: int, method: str, *args: Any) -> Any:
        seat = self._seats.get(worker)
        if seat is None:
            raise SeatLostError(f"worker {worker} has been ended")
        call = getattr(seat, method)
        return await asyncio.get_running_loop().run_in_executor(self._threads[worker], call, *args)

    async def _live(self, worker: int) -> None:
        """Keep up a worker's pulse; end what has been replaced, or whose lease is over.

        A node that was stopped makes the lease look over: so one more try first.
        """
        while worker in self._seats:
            for seconds in (self._config.lease, ANSWER_SECONDS):
                with contextlib.suppress(asyncio.TimeoutError):
                    if await asyncio.wait_for(self._pulse.beat(worker), seconds):
                        self._end(worker, REPLACED)  # once it is watched
                    break
            else:
                lease = self._config.lease
                self._end(worker, f"its lease of {lease:g} s without contact to the coordinator is over")

    # -- ranks that ask ----------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        server = await asyncio.start_unix_server(self._answer, sock=self._listener)
        await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            question, _, number = (await reader.readline()).decode().partition(" ")
            yes = await (self._returned if question == RETURNED else self._is_current)(int(number))
            writer.write(b"yes\n" if yes else b"no\n")
            await writer.drain()
        writer.close()

    async def _returned(self, worker: int) -> bool:
        """A worker's function has returned. Answered when the coordinator knows; whether the worker is still there."""
        seat = self._seats.get(worker)
        if seat is not None:
            seat.returned()
            await self._collected[worker].wait()
        return worker in self._seats

    async def _is_current(self, generation: int) -> bool:
        """Ask the coordinator, through its restart, for as long as the lease allows."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.lease
        while (left := until - loop.time()) > 0:
            try:
                answer = self._config.coordinator.is_current.remote(generation)
                return bool(await asyncio.wait_for(asyncio.wrap_future(answer.future()), left))
            except asyncio.TimeoutError:
                return False
            except ray.exceptions.RayActorError:
                await asyncio.sleep(RESTART_SECONDS)
        return False


def _listen(directory: str) -> socket.socket:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(directory, os.O_PATH)
    try:
        with contextlib.suppress(FileNotFoundError):  # of an agent before this one
            os.unlink(AGENT_SOCKET, dir_fd=folder)
        listener.bind(f"/proc/self/fd/{folder}/{AGENT_SOCKET}")  # a socket's path may have no more than 107 bytes
    finally:
        os.close(folder)
    listener.listen()
    return listener
