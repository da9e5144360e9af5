"""The ranks' output on its way from their files to one console: following, cutting into lines, prefixing, filtering.

The files are the buffer: a node reads on only when the console has taken what was read before, so that memory stays
bounded, whatever the ranks write, and nothing is lost. No Ray, no threads, no clock.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: How much of one file is read at a time, and the longest line that is held back until it is whole, in bytes.
CHUNK = 1 << 16
#: How much a node reads from all its files at a time, in bytes.
BATCH = 1 << 20
#: Behind each of these begins a line: also behind a carriage return, by which progress bars go back to its beginning.
_LINE_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")


@dataclass(frozen=True, slots=True)
class Source:
    """One stream of one rank of one generation, and how the console shows it."""

    generation: int
    rank: int
    stream: str  # "stdout" or "stderr"
    #: What stands before each line; None: it is shown as it is.
    prefix: str | None = None


#: What was read of some sources, in order.
Output = list[tuple[Source, bytes]]


class Follower:
    """One file that grows, from where it was read to. It needn't be there yet."""

    def __init__(self, path: str, *, whole_lines: bool, offset: int = 0) -> None:
        self._path = path
        self._whole_lines = whole_lines
        self._offset = offset
        self._fd = -1

    def read(self, *, ended: bool) -> bytes:
        """What is new: at most a chunk of it, and no part of a line unless the line is longer than that, or `ended`."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return b""
        data = os.pread(self._fd, CHUNK, self._offset)
        if self._whole_lines and len(data) < CHUNK and not ended:
            # A carriage return at the very end may be half of a line's end.
            data = data[: max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1]
        elif len(data) == CHUNK:  # then another source may have its turn between two lines
            data = data[: data.rfind(b"\n") + 1] or data[: data.rfind(b"\r", 0, -1) + 1] or data
        self._offset += len(data)
        return data

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Followers:
    """The files that a node follows."""

    def __init__(self) -> None:
        self._followers: dict[Source, Follower] = {}
        self._newest = 0
        self._kept_waiting: Sequence[Source] = ()  # by the last batch, which was full

    def follow(self, source: Source, path: str, offset: int) -> None:
        """Follow one more, from this offset; those of the generation before the last one are given up when read."""
        self._newest = max(self._newest, source.generation)
        self._followers[source] = Follower(path, whole_lines=source.prefix is not None, offset=offset)

    def read(self, *, ended: bool) -> Output:
        """What is new, oldest generation first; at most a batch.

        In turn, so that no source waits for ever for one that never stops, and a turn ends with a line. Of what a rank
        has written since the last look, stdout comes first: an error is mostly what it says last.

        `ended`: nobody writes any more; the files are closed when all is read, so that their disk can be unmounted.
        """
        output: Output = []
        size = 0
        for generation in sorted({source.generation for source in self._followers}):
            over = generation < self._newest - 1
            sources = deque(self._by_turn(generation))
            while sources:
                data = self._followers[sources[0]].read(ended=ended or over)
                if not data:
                    sources.popleft()
                    continue
                output.append((sources[0], data))
                size += len(data)
                if data.endswith(b"\n"):  # behind a carriage return another line would cover a progress bar
                    sources.rotate(-1)
                if size >= BATCH:
                    self._kept_waiting = tuple(sources)
                    return output
            if over:
                for source in self._by_turn(generation):
                    self._followers.pop(source).close()
        self._kept_waiting = ()
        if ended and not output:
            for follower in self._followers.values():
                follower.close()
        return output

    def _by_turn(self, generation: int) -> list[Source]:
        sources = [source for source in self._followers if source.generation == generation]
        sources.sort(key=lambda source: (source.rank, source.stream != "stdout"))
        return list(dict.fromkeys([one for one in self._kept_waiting if one in sources] + sources))


class Merger:
    """Output of several sources for one stream of the console: prefixed, and no line in the middle of another."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._open: Source | None = None  # its line has not ended

    def show(self, source: Source, data: bytes) -> None:
        """Show what a source has written."""
        if source.prefix is None:
            self._close_line(source)
            self._write(data)
        else:
            prefix = source.prefix.encode(errors="surrogateescape")
            parts = _LINE_ENDS.split(data)
            self._close_line(source)
            begun = self._open is source or self._open == source
            shown = [
                part if (begun and not number) or part in (b"", b"\r") else prefix + part
                for number, part in enumerate(parts)
            ]
            self._write(b"".join(shown))
        self._open = None if data.endswith((b"\n", b"\r")) else source

    def finish(self) -> None:
        """End the last line."""
        self._close_line(None)

    def _close_line(self, source: Source | None) -> None:
        if self._open is not None and self._open != source and (self._open.prefix or source is not None):
            self._write(b"\n")
            self._open = None


class Filter:
    """Copies the lines that contain one of some words."""

    def __init__(self, words: Iterable[str], write: Callable[[bytes], None]) -> None:
        self._words = [word.encode(errors="surrogateescape") for word in words]
        self._write = write

    def copy(self, source: Source, data: bytes) -> None:
        """Copy what is wanted of this."""
        prefix = (source.prefix or "").encode(errors="surrogateescape")
        for line in _LINE_ENDS.split(data):
            if any(word in line for word in self._words):
                self._write(prefix + line)
