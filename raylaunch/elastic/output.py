"""What a rank prints, in files: `redirects` and `tee`, on the level of descriptors, so that libraries' is there too.

The files are where those of commands are: LOG_DIR/RUN_ID/generation_N/RANK/stdout.log and stderr.log.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from raylaunch.command import PerLocalRank, Streams

if TYPE_CHECKING:
    from raylaunch.context import Context
    from raylaunch.elastic.params import Params

#: How much is copied at a time, in bytes.
CHUNK = 1 << 16
#: How long what is on its way in the end may take, in seconds: a child that lives on holds its end of the pipe.
END_SECONDS = 2.0

_STREAMS = ((Streams.OUT, 1, "stdout"), (Streams.ERR, 2, "stderr"))


@contextmanager
def redirected(params: Params, context: Context) -> Iterator[None]:
    """The rank's streams go where the parameters say, for the block."""
    local_rank = context.rank % context.local_world_size
    tee = _of(params.streams("tee"), local_rank)
    redirects = _of(params.streams("redirects"), local_rank)
    if not tee | redirects:
        yield
        return
    from raylaunch.cluster.folders import log_root, rank_folder

    root = log_root() if params.log_dir is None else os.path.abspath(params.log_dir)
    folder = rank_folder(root, context.run_id, context.generation, context.rank)
    os.makedirs(folder, exist_ok=True)
    with ExitStack() as stack:
        for stream, fd, name in _STREAMS:
            if stream & (tee | redirects):
                stack.enter_context(to_file(fd, os.path.join(folder, f"{name}.log"), also_there=bool(stream & tee)))
        yield


@contextmanager
def to_file(fd: int, path: str, *, also_there: bool) -> Iterator[None]:
    """What is written to a descriptor goes to a file, for the block; `also_there`: and where it went before."""
    _flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = os.dup(fd)
    copier: threading.Thread | None = None
    if also_there:
        source, target = os.pipe()
        copier = threading.Thread(target=_copy, args=(source, (file, before)), name="raylaunch-tee", daemon=True)
        copier.start()
    else:
        target = file
    os.dup2(target, fd)
    if also_there:
        os.close(target)
    try:
        yield
    finally:
        _flush()
        os.dup2(before, fd)  # the last end of the pipe for writing, unless a child has one
        if copier is not None:
            copier.join(END_SECONDS)
        if copier is None or not copier.is_alive():
            os.close(file)
            os.close(before)


def _copy(source: int, targets: tuple[int, ...]) -> None:
    while data := os.read(source, CHUNK):
        for target in targets:
            left = data
            with contextlib.suppress(OSError):  # the console may be gone, and the file not
                while left:
                    left = left[os.write(target, left) :]
    os.close(source)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # somebody's replacement
            stream.flush()


def _of(streams: PerLocalRank, local_rank: int) -> Streams:
    return streams if isinstance(streams, Streams) else streams.get(local_rank, Streams.NONE)
