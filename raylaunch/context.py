"""What train_fn can know about itself: `raylaunch.get_context()`.

Outside a run it is rank 0 of 1, never None, so that the same function runs under a debugger. One worker process serves
one generation and no other (design decision 7), so the context is the process's. A worker actor sets it before train_fn
is loaded; a rank that is a process of its own, such as a command's, has it from its environment, and so has whatever it
starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: The name of the node agent's socket in the folder that RAYLAUNCH_AGENT names.
AGENT_SOCKET = "agent.sock"
#: What a rank may ask there, before a number: whether this generation is current; to be answered once the coordinator
#: knows that this worker's function has returned.
IS_CURRENT, RETURNED = "is_current", "returned"


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
    if _context == Context() and "RAYLAUNCH_AGENT" in os.environ:
        with contextlib.suppress(KeyError, ValueError):  # somebody has changed what raylaunch had set
            return _described_by(os.environ)
    return _context


def enter_context(context: Context) -> None:
    """Make `context` the process's own. Called by the worker, once."""
    global _context  # noqa: PLW0603 - the process is the worker
    _context = context


def _described_by(environ: Mapping[str, str]) -> Context:
    generation, local_rank = int(environ["RAYLAUNCH_GENERATION"]), int(environ["LOCAL_RANK"])
    directory, lease = environ["RAYLAUNCH_AGENT"], float(environ["RAYLAUNCH_LEASE"])
    return Context(
        rank=int(environ["RANK"]),
        local_rank=local_rank,
        world_size=int(environ["WORLD_SIZE"]),
        local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
        node_rank=int(environ["GROUP_RANK"]),
        run_id=environ["RAYLAUNCH_RUN_ID"],
        generation=generation,
        restart_count=int(environ["TORCHELASTIC_RESTART_COUNT"]),
        max_restarts=int(environ["TORCHELASTIC_MAX_RESTARTS"]),
        device=f"cuda:{local_rank}" if environ.get("CUDA_VISIBLE_DEVICES") else "cpu",  # many a script removes it
        master_addr=environ["MASTER_ADDR"],
        master_port=int(environ["MASTER_PORT"]),
        _ask=lambda: ask_agent(directory, f"{IS_CURRENT} {generation}", lease),
    )


def ask_agent(directory: str, question: str, seconds: float | None) -> bool:
    """Ask the node's agent, which asks the coordinator. Whether it says yes, within this time (None: whenever)."""
    import socket  # `import raylaunch` stays light

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        folder = os.open(directory, os.O_PATH)
        try:
            connection.connect(f"/proc/self/fd/{folder}/{AGENT_SOCKET}")  # a path may have no more than 107 bytes
        finally:
            os.close(folder)
        connection.sendall(f"{question}\n".encode())
        return connection.makefile("rb").readline() == b"yes\n"
    return False
