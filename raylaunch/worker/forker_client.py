"""The agent's connection to the forker of its node for one worker: a store, and a rank's process.

The other side is `forker.py`. As long as the connection is there, so are the store and the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

from raylaunch.coordinator.commands import Process
from raylaunch.errors import Ending, EndKind, RaylaunchError
from raylaunch.worker.forked import Order
from raylaunch.worker.forker_keeper import SOCKET

#: How often to look for the socket of a forker that is being started beside this process, in seconds.
_LOOK_SECONDS = 0.02


class ForkerError(RaylaunchError):
    """The forker isn't there, or can't do what it was asked for."""


class ForkerGoneError(ForkerError):
    """The connection has ended: with the forker, or with the store that the worker had there."""


class ForkerClient:
    """One connection. Its calls come in order, from one thread; `stop`, `returned`, `hang_up` come at any time."""

    def __init__(self, directory: str, seconds: float) -> None:
        """Connect to the forker whose run has this directory, which may just be starting. Raises `ForkerError`."""
        self._connection = _connect(directory, seconds)
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._answers_kept: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, name="raylaunch-forker", daemon=True)
        self._thread.start()

    def open_store(self, host: str) -> tuple[Process, int]:
        """Have a process opened that holds a store there: it stands for the worker. It, and the store's port.

        Raises `ForkerError`.
        """
        answer = self._ask({"do": "store", "host": host})
        return Process(answer["pid"], answer["started"]), answer["port"]

    def start(self, order: Order) -> int:
        """Have a rank's process started, once; its pid. It may have to wait for older ones to be gone.

        Raises `ForkerError`.
        """
        answer = self._ask({"do": "run", "order": asdict(order)})
        if "returned" in answer:  # it has overtaken its start
            self._answers_kept.append(answer)
            answer = self._answer()
        if "signal" in answer:  # it was ended before it began
            self._answers_kept.append(answer)
            return 0
        return int(answer["pid"])

    def wait(self) -> Ending | None:
        """Wait until the rank's process has ended; how it did. None: it says that it has returned (`returned`).

        Raises `ForkerError` when the worker has been ended.
        """
        answer = self._answers_kept.pop() if self._answers_kept else self._answer()
        if "returned" in answer:
            return None
        if "signal" in answer:
            return Ending(EndKind.SIGNALED, signal=answer["signal"])
        code = answer["exit_code"]
        return Ending(EndKind.EXITED, exit_code=code) if code else Ending(EndKind.RETURNED)

    def stop(self) -> None:
        """SIGTERM to the rank's whole session, and SIGKILL when its time is over."""
        self._send({"do": "stop"})

    def returned(self) -> None:
        """The rank says that it has returned, and is about to end: `wait` need not wait for that."""
        self._answers.put({"returned": True})

    def hang_up(self) -> None:
        """End the connection. Whoever waits for an answer gets a `ForkerGoneError`."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go: the store and the rank's process, with its session, are ended."""
        self.hang_up()
        self._thread.join()
        self._connection.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._send(message)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer = self._answers.get()
        if "gone" in answer:
            raise ForkerGoneError(answer["gone"])
        if "failed" in answer:
            raise ForkerError(answer["failed"])
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone: the reading thread sees that
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put({"gone": "the connection to the process that forks this node's ranks has ended"})


def _connect(directory: str, seconds: float) -> socket.socket:
    until = time.monotonic() + seconds
    connection = socket.socket(socket.AF_UNIX)
    while True:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # not yet; or of one that is gone
            folder = os.open(directory, os.O_PATH)
            try:
                connection.connect(
                    f"/proc/self/fd/{folder}/{SOCKET}"
                )  # a socket's path may have no more than 107 bytes
            finally:
                os.close(folder)
            return connection
        if time.monotonic() > until:
            connection.close()
            raise ForkerGoneError(f"the process that forks a node's ranks did not come within {seconds:g} s")
        time.sleep(_LOOK_SECONDS)
