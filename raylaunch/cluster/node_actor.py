"""The node agent: one small actor on every node of a run, which sees how processes end and makes sure that they do.

Ray tells that a worker is gone, but not how, and nothing at all of an idle spare. The agent holds a pidfd of each
worker on its node: it hears of a death at once, asks the kernel how it was (Linux 6.15 and later; else the worker's
last words), and ends what Ray's own kill doesn't reach: a stopped process, children in sessions of their own.
It speaks for its workers to the coordinator, and has their seats where ranks are forked (`node_seats.py`). It imports
neither torch nor the user's code, and decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from raylaunch.cluster.folders import last_words_directory, log_root, rank_folder
from raylaunch.cluster.node_seats import NodeSeats
from raylaunch.cluster.pulse import NodePulse
from raylaunch.cluster.worker_config import WorkerConfig
from raylaunch.coordinator.commands import Process
from raylaunch.errors import Ending, EndKind
from raylaunch.worker.forker_keeper import ForkerKeeper, Settings
from raylaunch.worker.logs import Followers, Output, Source
from raylaunch.worker.processes import (
    REPLACED,
    Watch,
    ask_for_last_words,
    end_process,
    ending_from_status,
    forget_last_words,
    leave_last_words,
    read_last_words,
    start_time,
    strays,
)
from raylaunch.worker.sweeper import start_sweeper

#: How long the kernel is asked how a process ended, in seconds.
EXPLAIN_SECONDS = 1.0
#: How long a worker may take to say why it ends before it is killed, in seconds: it needs the GIL for a moment.
ANSWER_SECONDS = 0.1
#: How long a child of a dead worker may take to be gone after its SIGKILL, in seconds.
CHILD_SECONDS = 3.0
#: How often the agent looks for new output of the ranks that are shown, in seconds.
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Death:
    """A worker's process is gone. Told a second time when the kernel has said how."""

    worker: int
    ending: Ending
    #: Whether it was our doing: this agent had been asked to kill it and found it alive then, or it was replaced.
    killed: bool


class NodeAgent:
    """One node's agent. Every public method is called remotely, by the shell."""

    def __init__(self, config: WorkerConfig) -> None:
        self._token = config.token
        self._pulse = NodePulse(config.coordinator)
        self._directory = last_words_directory(config.name)
        self._watches: dict[int, Watch] = {}
        self._processes: dict[int, Process] = {}
        self._killed: set[int] = set()
        self._deaths: list[Death] = []
        self._log_dir = config.log_dir
        self._followers = Followers()
        self._is_over = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        raylet = Process(os.getppid(), start_time(os.getppid()) or 0)
        self._forker = _keep_forker(config, self._directory, raylet) if config.forked else None
        self._seats = NodeSeats(config, self._directory, self._pulse, self._end_worker) if config.forked else None
        own = Process(os.getpid(), start_time(os.getpid()) or 0)
        start_sweeper(config.token, self._directory, raylet=raylet, agent=own, lease=config.lease)
        threading.Thread(target=_go_with, args=(raylet,), name="raylaunch-raylet", daemon=True).start()

    async def seat(self, worker: int, method: str, *args: Any) -> Any:
        """What a worker actor answers to the method of this name: for a worker whose ranks are forked."""
        assert self._seats is not None, "ranks are forked"
        return await self._seats.call(worker, method, *args)

    async def watch(self, worker: int, process: Process) -> bool:
        """Hold on to a worker's process; False where this node doesn't let us (no descriptors left, no pidfds)."""
        try:
            watch = Watch(process)
        except OSError:
            return False
        self._watches[worker], self._processes[worker] = watch, process
        if watch.fileno() < 0:
            self._note(worker)
        else:
            asyncio.get_running_loop().add_reader(watch.fileno(), self._note, worker)
        return True

    async def next_deaths(self) -> list[Death]:
        """Wait until some watched process is gone."""
        await self._changed.wait()
        self._changed.clear()
        deaths, self._deaths = self._deaths, []
        return deaths

    async def pulse(self, worker: int) -> bool:
        """A worker is alive; answered when the coordinator has been told. Whether the worker has been replaced."""
        return await self._pulse.beat(worker)

    async def ask_to_stop(self, workers: list[int]) -> None:
        """SIGTERM to workers' processes."""
        for worker in workers:
            if self._seats is not None:
                self._seats.stop(worker)
            elif worker in self._watches:
                self._watches[worker].kill(signal.SIGTERM)

    async def kill(self, workers: list[int], *, ask: bool) -> None:
        """SIGKILL to workers' processes, stopped ones too. One that was dying already dies of something else.

        `ask`: before that each may say why it ends, in a moment.
        """
        if ask:
            asked = [w for w in workers if w in self._watches and not self._watches[w].doomed()]
            await self._gone([w for w in asked if ask_for_last_words(self._directory, self._processes[w])])
        for worker in workers:
            watch = self._watches.get(worker)
            if watch is not None and not watch.doomed():
                self._killed.add(worker)
                watch.kill(signal.SIGKILL)

    async def follow(self, run_id: str, sources: list[tuple[Source, int]]) -> None:
        """Follow what ranks on this node write, each from this offset on."""
        for source, offset in sources:
            folder = rank_folder(self._log_dir or log_root(), run_id, source.generation, source.rank)
            self._followers.follow(source, os.path.join(folder, f"{source.stream}.log"), offset)

    async def next_output(self) -> Output | None:
        """Wait until there is something new in the files that are followed; None when there never will be."""
        while True:
            ended = self._is_over  # before the files are read for the last time
            output = self._followers.read(ended=ended)
            if output or ended:
                return output or None
            # Not every file system tells of what is written: torchrun looks as well, every 0.1 s.
            await asyncio.sleep(LOOK_SECONDS)

    async def end(self, seconds: float, *, at_once: bool) -> list[int]:
        """End everything of the run on this node, bounded; returns the pids that would not go.

        What is left of a command has its time after SIGTERM, unless it is to go `at_once` as everything else.
        """
        loop = asyncio.get_running_loop()
        if self._seats is not None:
            self._seats.close()  # those that are still starting, too
        stubborn = await self._end_processes(list(self._processes.values()), seconds)
        if self._forker is not None:
            await loop.run_in_executor(None, self._forker.end, at_once)
        found = await loop.run_in_executor(None, strays, self._token, self._directory)
        stubborn += await self._end_processes([process for process, _ in found], seconds)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._is_over = True
        return stubborn

    async def _end_processes(self, processes: list[Process], seconds: float) -> list[int]:
        loop = asyncio.get_running_loop()
        ended = await asyncio.gather(*(loop.run_in_executor(None, end_process, one, seconds) for one in processes))
        return [process.pid for process, gone in zip(processes, ended, strict=True) if not gone]

    async def _gone(self, workers: list[int]) -> None:
        """Wait until these are gone, or have had their moment."""
        loop = asyncio.get_running_loop()
        until = loop.time() + ANSWER_SECONDS
        while any(worker in self._watches for worker in workers) and loop.time() < until:
            self._ended.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), until - loop.time())

    def _note(self, worker: int) -> None:
        """A watched process is gone: say so at once, and how as soon as the kernel tells."""
        watch, process = self._watches.pop(worker), self._processes.pop(worker)
        self._ended.set()
        if self._seats is not None:
            self._seats.gone(worker)
        if watch.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(watch.fileno())
        for work in (self._explain(worker, watch, process), self._end_strays(process)):
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_strays(self, worker: Process) -> None:
        """End what a worker has left behind: Ray 2.60 reaches its children only in its own process group."""
        loop = asyncio.get_running_loop()
        for process, parent in await loop.run_in_executor(None, strays, self._token, self._directory):
            if parent == worker and (self._forker is None or not self._forker.ends(process)):
                await loop.run_in_executor(None, end_process, process, CHILD_SECONDS)

    async def _explain(self, worker: int, watch: Watch, process: Process) -> None:
        ending = read_last_words(self._directory, process)
        status = watch.exit_status()
        if ending is None and self._forker is not None and not self._forker.lives():
            ending = Ending(EndKind.KILLED, message="the process that forks its node's ranks is gone")
        if ending is None and status is None:
            self._tell(worker, Ending(EndKind.KILLED))
            # Linux tells the status once the parent, Ray's raylet, has reaped the process: some milliseconds later.
            until = time.monotonic() + EXPLAIN_SECONDS
            while status is None and time.monotonic() < until and watch.fileno() >= 0:
                await asyncio.sleep(0.005)
                status = watch.exit_status()
        watch.close()
        if ending is None and status is not None:
            ending = ending_from_status(status)
            if ending.kind is not EndKind.SIGNALED:
                # train_fn's own ways to leave are noted by the worker. This was Ray, or a library's exit().
                code = os.waitstatus_to_exitcode(status)
                ending = Ending(EndKind.KILLED, message=f"its process left with code {code}, which nobody asked for")
        if ending is not None:
            self._tell(worker, ending)
        forget_last_words(self._directory, process)

    def _end_worker(self, worker: int, reason: str) -> None:
        """End a worker that has no process to say why it ends."""
        if worker in self._watches:
            with contextlib.suppress(OSError):  # a full disk must not keep it from ending
                leave_last_words(self._directory, self._processes[worker], reason)
            self._watches[worker].kill()

    def _tell(self, worker: int, ending: Ending) -> None:
        killed = worker in self._killed or ending.message == REPLACED
        self._deaths.append(Death(worker, ending, killed))
        self._changed.set()


def _keep_forker(config: WorkerConfig, directory: str, raylet: Process) -> ForkerKeeper:
    environ = config.command_env(os.environ, ray.util.get_node_ip_address())
    if config.use_gpu:
        # A preloaded module that asks whether there is a GPU would initialise CUDA, and no fork could use it.
        environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # torch.distributed: the stores need it, whatever the commands want.
    preload = tuple(dict.fromkeys((*config.preload, "torch.distributed")))
    return ForkerKeeper(Settings(directory, raylet, config.stop_seconds, config.lease, preload), environ)


def _go_with(raylet: Process) -> None:
    """End this process when the raylet is gone, as Ray 2.60 does not for an actor with asyncio. The sweeper goes on."""
    with Watch(raylet) as watch:
        while not watch.wait(3600):
            pass
    os._exit(1)
