"""Keeps a process's copy of the board and the coordinator's together, through the coordinator's restarts.

Two threads: one has always one call for news open, the other sends what the process has written. After a restart, told
by the board's epoch, they send and fetch everything.
"""

from __future__ import annotations

import threading
import time
from concurrent import futures
from types import TracebackType
from typing import Any

import ray

from raylaunch.cluster.board_door import NEWS_SECONDS, News
from raylaunch.cluster.coordinator_actor import NAMESPACE, actor_name
from raylaunch.coordinator.board import DEBUGGER_END, PAUSE, SAVE, SAVED, STOP
from raylaunch.worker.board_copy import DRIVER, BoardCopy

#: What ranks listen to; the driver hears everything.
FOR_RANKS = frozenset({PAUSE, SAVE, SAVED, STOP, DEBUGGER_END})
#: How long the coordinator may take beyond the time for which it lets a call wait, in seconds.
ANSWER_SECONDS = 10.0
#: How long to wait before the next try with a coordinator that is being restarted, in seconds.
RETRY_SECONDS = 0.1
#: The least time between two calls that send, in seconds: a rank may tell of each of its steps.
SEND_SECONDS = 0.05
#: How often a link with nothing to send looks whether all must be sent again, in seconds.
IDLE_SECONDS = 0.5
#: How long a rank that ends waits until its last words are sent, in seconds.
FLUSH_SECONDS = 2.0


class BoardLink:
    """A link, for as long as the block. `generation` None: the driver's; else that of a rank."""

    def __init__(self, copy: BoardCopy, run_id: str, generation: int | None) -> None:
        self._copy = copy
        self._run_id = run_id
        self._generation = generation
        self._names = None if copy.writer == DRIVER else FOR_RANKS
        self._coordinator: Any = None
        self._closed = threading.Event()
        self._over: futures.Future[None] = futures.Future()  # done when closed, for those who wait for an answer too
        self._heard = threading.Event()
        self._lost = threading.Event()  # the coordinator may have lost what was told
        self._lost.set()
        self._sent = 0
        self._threads = [
            threading.Thread(target=work, name=f"raylaunch-board-{run_id}", daemon=True)
            for work in (self._listen, self._send)
        ]

    def __enter__(self) -> BoardLink:  # noqa: PYI034 - Self is of Python 3.11
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go; a rank that returns sends its last words before."""
        if self._generation is not None and kind is None:
            self._flush()
        self._closed.set()
        self._over.set_result(None)

    def join(self, seconds: float) -> None:
        """Wait, bounded, for the threads of a link that has been left."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:  # otherwise the launch failed before it
                thread.join(max(0.0, until - time.monotonic()))

    def wait_until_heard(self, seconds: float) -> bool:
        """Wait until what stands on the board is known here; whether that came in time."""
        return self._heard.wait(seconds)

    def _flush(self) -> None:
        until = time.monotonic() + FLUSH_SECONDS
        while self._copy.own_news(self._sent, 0.0)[0] and time.monotonic() < until:
            time.sleep(SEND_SECONDS / 2)

    def _listen(self) -> None:
        epoch, seq = "", 0
        while not self._closed.is_set():
            try:
                news: News = self._call("news", NEWS_SECONDS, epoch, seq, self._names, self._copy.group)
            except Exception:  # it is being restarted, or gone: then the run ends, and the link with it
                epoch = ""
                self._lost.set()
                self._closed.wait(RETRY_SECONDS)
                continue
            if not news.epoch:
                continue  # a new board, of which the driver has not told yet
            if news.epoch != epoch:
                self._lost.set()
            epoch, seq = news.epoch, news.seq
            self._copy.take(news.notes, news.group, news.version)
            self._heard.set()

    def _send(self) -> None:
        while not self._closed.is_set():
            if self._lost.is_set():
                self._lost.clear()
                notes, seq = self._copy.everything()
            else:
                notes, seq = self._copy.own_news(self._sent, IDLE_SECONDS)
                if not notes:
                    self._sent = seq
                    continue
            try:
                heard = self._call("offer", 0.0, notes, self._generation)
            except Exception:
                heard = False
            if not heard:
                self._lost.set()
                self._closed.wait(RETRY_SECONDS)
                continue
            self._sent = seq
            self._closed.wait(SEND_SECONDS)

    def _call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if not ray.is_initialized():  # or Ray 2.60 would start a new session for the call
            raise ConnectionError("the connection to Ray is closed")
        if self._coordinator is None:  # by its name: what runs in a rank has no other door to it
            self._coordinator = ray.get_actor(actor_name(self._run_id), namespace=NAMESPACE)
        # No ray.get: in a thread, Ray 2.60 raises SystemExit there when its session ends.
        answer: futures.Future[Any] = getattr(self._coordinator, method).remote(*arguments).future()
        futures.wait([answer, self._over], seconds + ANSWER_SECONDS, futures.FIRST_COMPLETED)
        return answer.result(0)
