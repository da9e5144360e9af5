"""The driver's console, as far as forked ranks write to it: which of them, and on which of its streams.

Ray's own way for logs isn't used: it prefixes, and it drops lines that repeat (2.60).
"""

from __future__ import annotations

import contextlib
import os
import string
import sys
from collections import Counter
from collections.abc import Callable
from typing import IO, Any

from raylaunch.command import Logs, Streams
from raylaunch.coordinator.commands import Assignment
from raylaunch.worker.logs import Filter, Merger, Output, Source

_NAMES = {Streams.OUT: "stdout", Streams.ERR: "stderr"}


class Console:
    """What the ranks say, as `logs` wants it shown. `role`: ROLE_NAME; `folder`: where copies of filtered lines go."""

    def __init__(self, role: str, logs: Logs, folder: str) -> None:
        self._role = role
        self._logs = logs
        self._folder = folder
        self._files: list[IO[bytes]] = []
        self._mergers = {name: Merger(_writer(name)) for name in _NAMES.values()}
        words = {"stdout": logs.duplicate_stdout_filters, "stderr": logs.duplicate_stderr_filters}
        self._filters = {name: Filter(some, self._file(f"filtered_{name}.log")) for name, some in words.items() if some}
        #: How many bytes of each source have come, so that another agent can go on there.
        self.shown: Counter[Source] = Counter()

    def sources(self, assignment: Assignment) -> list[Source]:
        """What is wanted of this rank."""
        rank, local_rank = assignment.rank, assignment.local_rank
        plain, teed = self._logs.plain(rank, local_rank), self._logs.teed(local_rank)
        prefix = string.Template(self._logs.prefix).safe_substitute(
            role_name=self._role, rank=rank, local_rank=local_rank
        )
        found = []
        for stream, name in _NAMES.items():
            if stream & (plain | teed):
                found.append(Source(assignment.generation, rank, name, prefix if stream & teed else None))
        return found

    def show(self, output: Output) -> None:
        """Show it; returns when the console has taken it."""
        for source, data in output:
            self.shown[source] += len(data)
            self._mergers[source.stream].show(source, data)
            if source.prefix is not None and source.stream in self._filters:
                self._filters[source.stream].copy(source, data)

    def close(self) -> None:
        """Nothing more comes."""
        for merger in self._mergers.values():
            merger.finish()
        for file in self._files:
            file.close()

    def _file(self, name: str) -> Callable[[bytes], Any]:
        os.makedirs(self._folder, exist_ok=True)
        file = open(os.path.join(self._folder, name), "ab", buffering=0)  # noqa: SIM115 - `close` does
        self._files.append(file)
        return file.write


def _writer(name: str) -> Callable[[bytes], None]:
    """Writes to sys.stdout or sys.stderr, whatever they are by then: a file, a notebook's, pytest's."""

    def write(data: bytes) -> None:
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none: the files have it all
            if hasattr(stream, "buffer"):
                stream.flush()  # what was written as text comes first
                stream.buffer.write(data)
            else:
                stream.write(data.decode(errors="replace"))
            stream.flush()

    return write
