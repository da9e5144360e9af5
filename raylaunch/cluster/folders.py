"""Where things lie on a node: in Ray's session folder there. Private: Ray 2.60 has no public way to it."""

from __future__ import annotations

import os
import tempfile

import ray


def last_words_directory(run_id: str) -> str:
    """Where the workers of a run leave their last words on this node, and its forker has its socket.

    A worker's container shares Ray's session folder with its node, and it belongs to Ray's user.
    """
    node = ray._private.worker._global_node  # noqa: SLF001
    session = node.get_session_dir_path() if node is not None else tempfile.gettempdir()
    # One for each node: several may be on one machine, and have one session folder.
    return os.path.join(session, "raylaunch", f"{run_id}-{ray.get_runtime_context().get_node_id()}")


def log_root() -> str:
    """Where logs and journals go on this node unless somebody says otherwise: so Ray's dashboard lists the files."""
    node = ray._private.worker.global_worker.node  # noqa: SLF001
    return os.path.join(node.get_logs_dir_path() if node is not None else tempfile.gettempdir(), "raylaunch")


def rank_folder(root: str, run_id: str, generation: int, rank: int) -> str:
    """Where a rank's logs are."""
    return os.path.join(root, run_id, f"generation_{generation}", str(rank))
