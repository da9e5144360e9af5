"""A breakpoint in one rank, while the others wait: `set_trace(rank=)`."""

from __future__ import annotations

import sys
import threading

from raylaunch.context import get_context
from raylaunch.coordinator.board import DEBUGGER, DEBUGGER_END
from raylaunch.errors import ConfigError

#: How long a rank waits for somebody to attach, and the others for the end, in seconds: choices.
ATTACH_SECONDS = 600.0
DEBUG_SECONDS = 3600.0

_count = 0


def set_trace(rank: int = 0, *, timeout: float = ATTACH_SECONDS) -> None:
    """Stop in one rank in a debugger. Called by every rank at the same place: the others wait until it goes on.

    In a launch, the driver's log says how to attach; in eager mode, and outside, it is pdb on the terminal. The others
    wait for an hour at most.

    Args:
        rank: which one stops.
        timeout: how long it waits for somebody to attach, in seconds; then it goes on.

    Raises:
        ConfigError: there is no such rank; or this is a run of several that no ElasticLauncher has launched.
    """
    global _count  # noqa: PLW0603 - the process's own calls, which all ranks make alike
    from raylaunch.elastic import remote_pdb
    from raylaunch.elastic.current import current_copy

    context = get_context()
    if not 0 <= rank < context.world_size:
        raise ConfigError(f"rank={rank!r}: must be one of the {context.world_size} ranks")
    _count += 1
    frame = sys._getframe(1)  # noqa: SLF001 - documented; as pdb.set_trace does
    if not context.generation:
        remote_pdb.on_the_terminal(frame)
        return
    copy, mark = current_copy(), (context.generation, _count)
    if copy is None:  # nothing would tell the others that it is over
        raise ConfigError("set_trace: ranks wait for one another in the launch of an ElasticLauncher, which this isn't")
    if context.rank != rank:
        copy.wait(lambda: bool(copy.get(DEBUGGER_END) == mark), DEBUG_SECONDS)
        return
    ended = threading.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            copy.put(DEBUGGER_END, mark)

    remote_pdb.for_a_visitor(
        frame,
        name=f"rank {context.rank}",
        timeout=timeout,
        tell=lambda text: copy.put(DEBUGGER, (*mark, text)),
        end=end,
    )
