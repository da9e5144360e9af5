"""The forker: a plain process on each node of a run of commands. It has imported torch once, and forks the ranks.

N ranks on a node then cost one import. It has no Ray, no CUDA, and no threads when it forks: forks are clean. The
node's agent starts it (`forker_keeper.py`), and talks to it over a socket in the run's directory there: one connection
for each worker, with one message a line, as JSON (`forker_client.py` is its side):

    {"do": "store", "host": ...}     -> {"port": ..., "pid": ..., "started": ...}: a fork that holds a TCPStore for as
                                     long as the connection. It stands for the worker: the connection ends with it, too
    {"do": "run", "order": {...}}    -> {"pid": ...}, and when it has ended {"exit_code": ...} or {"signal": ...}
    {"do": "stop"}                   ends the rank's session as the end of the connection does

What can't be done is answered by {"failed": ...}. A connection that ends takes its rank's session with it: SIGTERM, and
SIGKILL after the run's `timeouts.stop`; what has left the session is the agent's to end. No rank of a generation starts
here before the sessions of the older ones are gone, those of a forker before this one too. The forker goes when the
agent and all ranks have gone; when the raylet has, at once, with everything.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from raylaunch.command import Entry
from raylaunch.worker.forked import Order, become
from raylaunch.worker.forker_keeper import SOCKET, Settings
from raylaunch.worker.later_import import LaterImport
from raylaunch.worker.process_group import open_store
from raylaunch.worker.processes import Watch, sign_in, start_time
from raylaunch.worker.sessions import Session, Sessions

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass
class Store:
    """The fork that holds a worker's store."""

    pid: int
    pidfd: int
    #: On which it says the port; -1: it has.
    pipe: int


@dataclass(eq=False)
class Client:
    """A worker's connection."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    store: Store | None = None
    waiting: Order | None = None
    session: Session | None = None


class _Forked(BaseException):
    """Raised in a fork: what it is to do, once the forker's own stack is gone."""

    def __init__(self, job: Callable[[], None]) -> None:
        super().__init__()
        self.job = job


class Forker:
    """The loop of the forker's process. Single-threaded: everything is a descriptor that gets readable."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._lock = os.open(os.path.join(settings.directory, "forker.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._clients: set[Client] = set()
        self._sessions = Sessions(self._selector, self._start_waiting)
        self._agent_lives = True
        self._raylet = Watch(settings.raylet)
        self._listener = listener
        self._failed = ""
        self._later = LaterImport()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._agent_gone)
        if self._raylet.fileno() >= 0:
            self._selector.register(self._raylet, selectors.EVENT_READ, self._raylet_gone)

    def preload(self) -> None:
        """Import what the ranks will need. What can't be imported is told to whoever asks for something."""
        try:
            for name in self._settings.preload:
                importlib.import_module(name)
        except BaseException as error:  # a module may do anything, SystemExit included
            traceback.print_exc()
            wanted = list(self._settings.preload)
            self._failed = f"preload={wanted!r} can't be imported there: {type(error).__name__}: {error}"
        gc.collect()
        gc.freeze()  # the collector of a fork would copy every page

    def wait_for_its_turn(self) -> None:
        """Wait until a forker before this one has gone, and with it all of its ranks. They have their own deadline."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def serve(self) -> Callable[[], None] | None:
        """Serve until nobody is left. Returns None then; and in each fork, what that is to do.

        SIGTERM, which may come to all processes of a job, is for the ranks: they would die with their forker.
        """
        signal.signal(signal.SIGTERM, self._terminated)
        try:
            while self._agent_lives or self._clients or self._sessions:
                for key, _ in self._selector.select(self._go_on()):
                    if self._selector.get_map().get(key.fd) is key:  # not gone by what came before it
                        key.data()
        except _Forked as forked:
            job = forked.job
        else:
            return None
        return job  # outside of the except clause: the command's own exceptions have no context

    def _go_on(self) -> float | None:
        """Do what is due; in how many seconds the next thing will be, at the latest (None: nothing is planned)."""
        return min((left for left in (self._sessions.go_on(), self._later.go_on()) if left is not None), default=None)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        client = Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(client))

    def _receive(self, client: Client) -> None:
        try:
            data = client.connection.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._drop(client, self._settings.stop_seconds)
            return
        client.received += data
        while b"\n" in client.received:
            line, _, client.received = client.received.partition(b"\n")
            try:
                self._obey(client, json.loads(line))
            except OSError as error:  # no more processes, or descriptors
                self._tell(client, {"failed": f"{type(error).__name__}: {error}"})

    def _obey(self, client: Client, message: dict[str, Any]) -> None:
        if message["do"] == "stop":
            self._stop(client)
        elif self._failed:
            self._tell(client, {"failed": self._failed})
        elif message["do"] == "store":
            self._open_store(client, message["host"])
        else:
            client.waiting = Order.parse(message["order"])
            self._start_waiting()

    def _stop(self, client: Client) -> None:
        if client.waiting is not None:
            client.waiting = None
            self._tell(client, {"signal": signal.SIGTERM})
        elif client.session is not None and client.session in self._sessions:
            self._sessions.end(client.session, self._settings.stop_seconds)

    def _tell(self, client: Client, message: dict[str, Any]) -> None:
        try:
            client.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # it is gone: that arrives by itself

    def _drop(self, client: Client, seconds: float) -> None:
        """A worker is gone, and what it had goes too."""
        self._clients.discard(client)
        self._selector.unregister(client.connection)
        client.connection.close()
        if client.store is not None:
            self._close_store(client.store)
        if client.session is not None and client.session in self._sessions:
            self._sessions.end(client.session, seconds)

    # -- stores ------------------------------------------------------------------------------------------------------

    def _open_store(self, client: Client, host: str) -> None:
        reader, writer = os.pipe()
        pid = self._fork(lambda: _hold_store(host, writer))
        os.close(writer)
        store = client.store = Store(pid, os.pidfd_open(pid), reader)
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._store_opened(client, store))
        self._selector.register(store.pidfd, selectors.EVENT_READ, lambda: self._store_gone(client))

    def _store_opened(self, client: Client, store: Store) -> None:
        said = os.read(store.pipe, 10_000).decode(errors="replace")
        self._selector.unregister(store.pipe)
        os.close(store.pipe)
        store.pipe = -1
        if said:
            self._tell(client, {**json.loads(said), "pid": store.pid, "started": start_time(store.pid)})

    def _store_gone(self, client: Client) -> None:
        """Somebody has ended the worker; or it couldn't open a store, and has said why."""
        assert client.store is not None
        if client.store.pipe >= 0:
            self._store_opened(client, client.store)
        self._drop(client, self._settings.stop_seconds)

    def _close_store(self, store: Store) -> None:
        if store.pipe >= 0:
            self._selector.unregister(store.pipe)
            os.close(store.pipe)
        self._selector.unregister(store.pidfd)
        os.close(store.pidfd)
        os.kill(store.pid, signal.SIGKILL)
        os.waitpid(store.pid, 0)

    # -- ranks -------------------------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        """Start what may start: what is left of older generations goes first."""
        for client in list(self._clients):
            order = client.waiting
            if order is not None and not self._sessions.end_older(order.generation, self._settings.stop_seconds):
                client.waiting = None
                try:
                    self._start(client, order)
                except OSError as error:  # no more processes, or descriptors
                    self._tell(client, {"failed": f"it can't be started: {error}"})

    def _start(self, client: Client, order: Order) -> None:
        pid = self._fork(lambda: become(order))
        if not order.fresh_interpreter and order.entry is not Entry.PROGRAM:
            self._later.rank_started()
        client.session = self._sessions.add(pid, order.generation, lambda how: self._tell(client, how))
        self._tell(client, {"pid": pid, "started": start_time(pid)})

    # -- forks, and the end ------------------------------------------------------------------------------------------

    def _fork(self, job: Callable[[], None]) -> int:
        """The fork's pid. In the fork it doesn't return: the stack is left, nothing of the forker's stays open."""
        self._later.finish()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads that a preloaded library has started, such as OpenBLAS's, which know forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            return pid
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:
            os._exit(1)
        self._close()
        raise _Forked(job)

    def _close(self) -> None:
        os.close(self._lock)
        self._selector.close()
        self._sessions.close()
        self._raylet.close()
        self._listener.close()
        for client in self._clients:
            client.connection.close()
            if client.store is not None:
                os.close(client.store.pidfd)
                if client.store.pipe >= 0:
                    os.close(client.store.pipe)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)

    def _terminated(self, number: int, _: object) -> None:
        if os.getpid() != self._pid:  # it came to a fork that is no rank yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _agent_gone(self) -> None:
        self._selector.unregister(0)
        self._agent_lives = False

    def _raylet_gone(self) -> None:
        """Everything ends at once."""
        self._selector.unregister(self._raylet)
        self._agent_lives = False
        for client in list(self._clients):
            self._drop(client, 0.0)
        self._sessions.end_all(0.0)


def _hold_store(host: str, answer: int) -> NoReturn:
    """Hold a store until SIGKILL."""
    try:
        _store, port = open_store(host)
    except BaseException as error:
        os.write(answer, json.dumps({"failed": f"no store at {host}: {type(error).__name__}: {error}"[:5000]}).encode())
        os._exit(1)
    os.write(answer, json.dumps({"port": port}).encode())
    os.close(answer)
    while True:
        signal.pause()


def main() -> None:
    """The process's own beginning and end; and those of all its forks."""
    del sys.path[0]  # `forker_keeper._BEGIN` put it there
    if sys.path and sys.path[0] == "":
        del sys.path[0]  # -c did: what the command's own entry wants comes there
    settings = Settings.parse(sys.argv[1])
    if os.fork():  # nobody's child: Ray 2.60 kills a worker's children when the worker leaves in order
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray 2.60 blocks SIGINT in its workers
    sign_in(settings.directory)  # so that the sweeper knows of it
    listener = _listen(settings.directory)
    os.write(1, f"{os.getpid()} {start_time(os.getpid())}\n".encode())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    forker = Forker(settings, listener)
    del listener  # a fork closes it
    forker.preload()
    forker.wait_for_its_turn()
    job = forker.serve()
    del forker
    if job is not None:
        job()


def _listen(directory: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(directory)  # a socket's whole path may have no more than 107 bytes
    Path(SOCKET).unlink(missing_ok=True)  # of one that is gone
    listener.bind(SOCKET)
    listener.listen(1024)
    os.chdir("/")
    return listener
