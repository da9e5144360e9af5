"""What train_fn can know about itself: `raylaunch.get_context()`.

Outside a run it is rank 0 of 1, never None, so that the same function runs under a debugger. One worker process serves
one generation and no other (design decision 7), so the context is the process's, set once before train_fn is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Context:
    """Where this process stands in its run. The names are torchrun's; `node_rank` is its GROUP_RANK."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    run_id: str = ""
    #: The number of the formed group; it only rises. Part of what a checkpoint of a shared run should be stamped with.
    generation: int = 0
    #: How many failures the run has been charged with so far, the same number on all ranks.
    restart_count: int = 0
    max_restarts: int = 0
    #: A device string for torch, such as "cuda:1" or "cpu".
    device: str = "cpu"
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    _ask: Callable[[], bool] = field(default=_always, repr=False, compare=False)

    def is_current(self) -> bool:
        """Whether this process's generation is the live one; ask before committing a checkpoint.

        Asks the coordinator (some milliseconds), and waits through its restart. False when the generation has been
        replaced, or when the coordinator can't be reached for the worker's lease: then do not commit.
        """
        return self._ask()


_context = Context()


def get_context() -> Context:
    """This process's context."""
    return _context


def enter_context(context: Context) -> None:
    """Make `context` the process's own. Called by the worker, once."""
    global _context  # noqa: PLW0603 - the process is the worker
    _context = context
