"""torch's rendezvous handler on Ray: one agent's part in the rendezvous, as torch's agent calls it.

Used by one thread, the agent's main thread. What the agent is and wants is in one `Report`; every change of it is sent,
and the newest answer says all that there is to know.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from raylaunch.coordinator.agent_messages import Answer, Closing, Place, Refusal, Report, Wish
from raylaunch.torchrun.backend.conf import read_conf
from raylaunch.torchrun.backend.contact import Contact, ContactLostError
from raylaunch.worker.process_group import open_store

logger = logging.getLogger("raylaunch")

#: One attempt to reach rank 0's store, in seconds: the round may be over meanwhile.
STORE_ATTEMPT_SECONDS = 10.0
#: torch's own default for a store (2.13). The agents wait for each other in it, within a round.
STORE_SECONDS = 300.0

_ERRORS = {
    Refusal.CLOSED: RendezvousClosedError,
    Refusal.DISAGREES: RendezvousStateError,
    Refusal.TIMEOUT: RendezvousTimeoutError,
}


class RayRendezvousHandler(RendezvousHandler):  # type: ignore[misc]  # torch's types are not followed
    """`--rdzv-backend=ray`. Raises ValueError for options that can't work."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._conf = read_conf(parameters)
        self._contact: Contact | None = None
        self._host = self._conf.local_addr or ""
        name = f"{socket.gethostname()}:{os.getpid()}"
        self._report = Report(agent=uuid.uuid4().hex, name=name, number=0, settings=self._conf.settings)
        self._answer: Answer | None = None  # to this report
        self._wishes = 0
        self._round = 0

    def get_backend(self) -> str:
        """See base class."""
        return "ray"

    def get_run_id(self) -> str:
        """See base class."""
        return self._conf.job

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks use the agents' store, as with torch's own backends.

        Here it is a new one in each round, so that no rank ever reads what those of an earlier round wrote, and it
        listens before anybody hears of it, so that nobody can take its port. Without it rank 0 opens a store on a port
        that was free a moment ago.
        """
        return os.getenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"

    def next_rendezvous(self) -> RendezvousInfo:
        """See base class."""
        contact = self._connect()
        while True:
            self._wishes += 1
            server, port = open_store(self._host)
            wish = Wish(self._wishes, self._round, self._host, port, self._conf.join_timeout)
            self._send(contact, wish=wish, place=None)
            place, store = self._take_place(contact, server)
            del server
            self._send(contact, wish=None, place=place)
            answer = self._wait(contact, lambda answer: answer.formed or answer.reform)
            self._round = place.round
            if not answer.reform:
                return self._info(place, store)
            logger.warning("rendezvous %s: round %d broke up: %s", self._conf.job, place.round, answer.reason)

    def is_closed(self) -> bool:
        """See base class."""
        contact = self._connect()
        if self._report.number == 0:
            self._send(contact)
        while (answer := self._newest()) is None:
            self._hear(contact, None)
        return answer.closed

    def set_closed(self) -> None:
        """See base class."""
        contact = self._connect()
        self._send(contact, closing=Closing("has closed the rendezvous", at_once=False))
        until = time.monotonic() + self._conf.close_timeout
        while self._answer is None:
            left = until - time.monotonic()
            if left <= 0:
                limit = f"close_timeout={self._conf.close_timeout:g} s"
                raise RendezvousTimeoutError(f"{self._us()}: it could not be closed within {limit}")
            self._hear(contact, left)

    def num_nodes_waiting(self) -> int:
        """1 when the agent has to re-form, also when a node is gone and none waits: it only asks whether it is 0."""
        before = self._answer
        answer = self._newest()
        if answer is None or not answer.reform:
            return 0
        if before is None or not before.reform:
            logger.warning("rendezvous %s: re-forming: %s", self._conf.job, answer.reason)
        return 1

    def shutdown(self) -> bool:
        """Leave. An agent that was in a round and has come to its end closes the rendezvous, as torch's own do.

        After a failure at once, so that the others needn't wait for it until their collectives time out.
        """
        contact, self._contact = self._contact, None
        if contact is None:
            return True
        # torch 2.13 calls this in a `finally`, and says in no other way how it ended.
        failed = sys.exc_info()[0] is not None
        how = "has failed" if failed else "has finished"
        closing = Closing(how, at_once=failed) if self._report.place is not None else None
        try:
            self._send(contact, closing=closing, leaving=how)
            self._hear(contact, self._conf.close_timeout)
        except RendezvousConnectionError as error:
            logger.warning("%s", error)
            contact.end(0.0)
            return False
        return contact.end(self._conf.close_timeout)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _connect(self) -> Contact:
        """The contact to the rendezvous, which is made when it is needed first."""
        if self._contact is None:
            contact = Contact(self._conf.address, self._conf.job)
            try:
                host = contact.connected(self._conf.join_timeout)
            except ContactLostError as error:
                self._raise_lost(error)
            self._contact, self._host = contact, self._host or host
        return self._contact

    def _send(self, contact: Contact, **changes: Any) -> None:
        self._report = replace(self._report, number=self._report.number + 1, **changes)
        self._answer = None
        try:
            contact.send(self._report)
        except ContactLostError as error:
            self._raise_lost(error)

    def _hear(self, contact: Contact, timeout: float | None) -> bool:
        """Take the next answer; whether there was one in time."""
        try:
            answer = contact.answer(timeout)
        except ContactLostError as error:
            self._raise_lost(error)
        if answer is not None and answer.number == self._report.number:
            self._answer = answer
        return answer is not None

    def _newest(self) -> Answer | None:
        """The newest answer that has come."""
        if self._contact is not None:
            while self._hear(self._contact, 0.0):
                pass
        return self._answer

    def _wait(self, contact: Contact, condition: Callable[[Answer], object]) -> Answer:
        """Wait for an answer of this kind. The rendezvous has its own timeouts, and says when they are over."""
        while True:
            answer = self._newest()
            if answer is not None and answer.refusal is not None:
                raise _ERRORS[answer.refusal](f"{self._us()}: {self._refused(answer)}")
            if answer is not None and condition(answer):
                return answer
            self._hear(contact, None)

    def _take_place(self, contact: Contact, server: dist.TCPStore) -> tuple[Place, dist.Store]:
        """Wait for a place in a round, and for its store."""
        until: float | None = None
        while True:
            place = self._wait(contact, lambda answer: answer.place).place
            assert place is not None
            if place.rank == 0:
                return place, server
            if until is None:
                until = time.monotonic() + self._conf.join_timeout
            try:
                attempt = timedelta(seconds=STORE_ATTEMPT_SECONDS)
                store = dist.TCPStore(place.host, place.port, is_master=False, timeout=attempt)
            except dist.DistError as error:
                if time.monotonic() >= until:
                    raise RendezvousConnectionError(
                        f"{self._us()}: node 0's store at {place.host}:{place.port} can't be reached, but Ray can: does"
                        f" a firewall keep the nodes apart, or has --local-addr a wrong interface? {error}"
                    ) from error
                continue  # perhaps to another place: node 0 may be gone
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
            return place, store

    def _info(self, place: Place, store: dist.Store) -> RendezvousInfo:
        logger.info("rendezvous %s: rank %d of %d in round %d", self._conf.job, place.rank, place.size, place.round)
        store = dist.PrefixStore("torchrun-agents", store)  # the ranks have the rest of it
        info = RendezvousStoreInfo(place.host, place.port)
        if not self.use_agent_store:
            info = RendezvousStoreInfo.build(place.rank, store, local_addr=place.host)
        return RendezvousInfo(store, place.rank, place.size, info)

    def _refused(self, answer: Answer) -> str:
        if answer.refusal is Refusal.TIMEOUT:
            return f"no round formed within join_timeout={self._conf.join_timeout:g} s: {answer.reason}"
        return f"it is closed: {answer.reason}" if answer.refusal is Refusal.CLOSED else answer.reason

    def _us(self) -> str:
        return f"rendezvous {self._conf.job} (this node is {self._report.name})"

    def _raise_lost(self, error: ContactLostError) -> NoReturn:
        raise RendezvousConnectionError(f"{self._us()}: no contact: {error}") from error
