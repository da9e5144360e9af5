"""Where things lie on a node: in Ray's session folder there. Private: Ray 2.60 has no public way to it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass

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


@dataclass(frozen=True)
class RankFiles:
    """Where a rank writes."""

    stdout: str
    stderr: str
    #: TORCHELASTIC_ERROR_FILE.
    error: str


def make_rank_folder(root: str, run_id: str, generation: int, rank: int) -> RankFiles:
    """Make a rank's folder, without what an earlier run of the same name left there. Raises OSError."""
    folder = rank_folder(root, run_id, generation, rank)
    os.makedirs(folder, exist_ok=True)
    files = RankFiles(*(os.path.join(folder, name) for name in ("stdout.log", "stderr.log", "error.json")))
    for path in (files.stdout, files.stderr, files.error):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return files


def rank_folder(root: str, run_id: str, generation: int, rank: int) -> str:
    """Where a rank's logs are."""
    return os.path.join(root, run_id, f"generation_{generation}", str(rank))


def no_logs(root: str, error: OSError) -> str:
    """That logs can't be written there, as the end of a sentence."""
    return f"the ranks' logs can't be written below {root}: {error.strerror}"
