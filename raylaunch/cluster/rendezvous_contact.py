"""The process between an agent of torchrun and the rendezvous actor: the agent's own driver in Ray.

The agent starts it and never imports Ray itself, for three reasons (Ray 2.60). Ray ends a driver that has lost its
cluster, and an agent that ends like that leaves its ranks behind. Ray takes SIGTERM over and aborts a driver 3 s after
one, while torchrun gives its ranks 30 s. And this process survives its agent: when that is killed, the others hear of
it at once.

Reports come through a pipe; back go `Connected` at first, then answers, or `Lost` at last. It ends with its agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from raylaunch.cluster.coordinator_actor import NAMESPACE
from raylaunch.cluster.rendezvous_actor import find_rendezvous
from raylaunch.coordinator.agent_messages import Answer, Connected, Lost, Report

#: A pause before a call that has failed is made again, in seconds: Ray restarts an actor in 1.7.
RETRY_SECONDS = 0.3
#: How long an agent's last report may take, in seconds.
PARTING_SECONDS = 5.0
#: How long a cluster may take to come up when its nodes start together with the agents, in seconds.
LISTENER_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Contact:
    """One agent's contact. Made inside the loop that runs `keep`."""

    def __init__(self, connection: Connection, agent_pid: int, job: str) -> None:
        self._connection = connection
        self._job = job
        self._report: Report | None = None
        self._news = asyncio.Event()
        self._known: Answer | None = None  # what the agent was told last
        self._actor: Any = None
        self._trouble = ""
        self._heard = time.monotonic()
        self._parting_until = float("inf")
        loop = asyncio.get_running_loop()
        loop.add_reader(connection.fileno(), self._read)
        # A fork of the agent may hold the pipe open when the agent is gone.
        self._agent = os.pidfd_open(agent_pid)
        loop.add_reader(self._agent, self._agent_gone)

    async def keep(self) -> None:
        """Report and answer until the agent leaves or is gone, or Ray is."""
        await self._news.wait()
        while self._report is not None:
            report = self._report
            self._news.clear()
            if report.leaving:
                self._parting_until = min(self._parting_until, time.monotonic() + PARTING_SECONDS)
            answer = await self._ask(report)
            if answer is not None:
                self._heard, self._trouble = time.monotonic(), ""
                if answer != self._known:
                    self._known = answer
                    self._tell(answer)
            if report.leaving and (answer is not None or time.monotonic() >= self._parting_until):
                return
            lost = "" if report.leaving else self._lost(report)
            if lost:
                self._tell(Lost(lost))
                return

    async def _ask(self, report: Report) -> Answer | None:
        """The rendezvous's answer; None: it has none in time, or the agent has another report meanwhile."""
        calling = asyncio.ensure_future(self._call(report))
        news = asyncio.ensure_future(self._news.wait())
        limit = PARTING_SECONDS if report.leaving else report.settings.keep_alive + report.settings.silence
        await asyncio.wait({calling, news}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
        if calling.done():
            return calling.result()
        calling.cancel()
        return None

    async def _call(self, report: Report) -> Answer | None:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(find_rendezvous, self._job, start=not report.leaving)
            answer: Answer = await self._actor.contact.remote(report, self._known)
        except Exception as error:  # Ray's of many kinds: the actor is gone, or being restarted, or was never made
            self._actor = None
            self._trouble = str(error).strip()
            if isinstance(error, ActorDiedError) and "creation task" in self._trouble:
                self._heard = float("-inf")  # no other attempt can do better
            await asyncio.sleep(RETRY_SECONDS)
            return None
        return answer

    def _lost(self, report: Report) -> str:
        """Why there is no contact any more; empty while there is, or may be.

        As long as the rendezvous takes to give an agent up. Before the first answer: as long as the agent's wish lasts.
        """
        first_wish = report.wish if self._known is None else None
        limit = first_wish.timeout if first_wish else report.settings.silence + report.settings.keep_alive
        silent = time.monotonic() - self._heard
        if silent < limit:
            return ""
        return f"the rendezvous actor of job {self._job!r} does not answer: {self._trouble or f'for {limit:g} s'}"

    def _tell(self, message: Answer | Lost) -> None:
        with contextlib.suppress(OSError):  # the agent is gone: it is heard of in another way
            self._connection.send(message)

    def _read(self) -> None:
        try:
            self._report = self._connection.recv()
        except (EOFError, OSError):
            self._agent_gone()
        else:
            self._news.set()

    def _agent_gone(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection.fileno())
        loop.remove_reader(self._agent)
        report = self._report
        if report is not None and report.leaving:
            return  # it has said so, and that is on its way
        if report is not None:
            self._report = replace(report, number=report.number + 1, leaving="its torchrun agent has ended")
        self._news.set()


def main() -> None:
    """Arguments: the pipe's file descriptor, the agent's pid, Ray's address, the job."""
    connection, agent_pid, address, job = Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    _die_with_parent(signal.SIGKILL)
    if os.getppid() != agent_pid:
        return
    try:
        _await_listener(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        connection.send(Lost(f"can't connect to Ray at {address!r}: {error}"))
        return
    # What is sent to all processes of a job step (Slurm's scancel, Ctrl-C) is for the agent, and ends this one with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection.send(Connected(ray.util.get_node_ip_address()))

    async def keep() -> None:
        contact = Contact(connection, agent_pid, job)
        _die_with_parent(0)  # from here on it sees the agent's end, and tells the others
        await contact.keep()

    asyncio.run(keep())


def _await_listener(address: str) -> None:
    """Raises ConnectionError when nothing listens there: Ray 2.60 itself would try for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto", or what Ray refuses at once
    until = time.monotonic() + LISTENER_SECONDS
    while True:
        try:
            with socket.create_connection((host, int(port)), LISTENER_SECONDS):
                return
        except OSError as error:
            if time.monotonic() >= until:
                raise ConnectionError(f"nothing has answered there for {LISTENER_SECONDS:g} s ({error})") from error
        time.sleep(RETRY_SECONDS)


def _die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends; 0: none."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
