"""What a run's ranks are when they are processes of their own: a command, as under torchrun; where ranks' output goes.

Plain, frozen data: made by the command line and the launcher API, carried out by `cluster/` and `worker/`. Imports
nothing but the standard library.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Entry(str, enum.Enum):
    """How a command's target is run."""

    SCRIPT = "script"  # a Python file (or folder, or zip): `python -u target args`
    MODULE = "module"  # `python -u -m target args`
    PROGRAM = "program"  # any program: `target args`, found by PATH
    RUN_PATH = "run_path"  # a Python file by runpy.run_path: sys.path stays as it is (torchrun's --run-path)
    FUNCTION = "function"  # a pickled function (`isolation="process"`); the target is its name


@dataclass(frozen=True, slots=True)
class Command:
    """What each rank runs, as a process of its own in its own session.

    How long a rank has after SIGTERM before its whole session gets SIGKILL is the run's `timeouts.stop`.
    """

    entry: Entry
    #: The script's path, the module's name or the program. A relative path is relative to `cwd`.
    target: str
    #: `${local_rank}` in them is replaced by the rank's own, as torchrun does.
    args: tuple[str, ...] = ()
    #: Where it runs, where that folder exists on the node; otherwise, and if "", where Ray puts the node's workers: in
    #: runtime_env's `working_dir`.
    cwd: str = ""
    #: A new interpreter for each rank instead of a fork of the one that has imported the run's `preload`.
    fresh_interpreter: bool = False
    #: ROLE_NAME.
    role: str = "default"
    #: To which CPUs near its GPU each rank is bound (torch's AffinityMode: node, socket, exclusive, core-complex); "":
    #: to none.
    numa_binding: str = ""


class Streams(enum.Flag):
    """Which of a rank's streams. The values are those of torch's `Std`: `Streams(3)` is both."""

    NONE = 0
    OUT = 1
    ERR = 2
    BOTH = OUT | ERR


#: For all local ranks the same, or by local rank; those that are not named have none.
PerLocalRank = Streams | Mapping[int, Streams]


@dataclass(frozen=True, slots=True)
class Logs:
    """What of the ranks' output the driver's console shows. Their files always hold all of it.

    By default it shows rank 0, as it is.
    """

    #: To the files only.
    redirects: PerLocalRank = Streams.NONE
    #: To the files and, with a prefix, to the console.
    tee: PerLocalRank = Streams.NONE
    #: The console shows nobody but these local ranks; None: no filter.
    local_ranks_filter: frozenset[int] | None = None
    #: What stands before each line: a template of `${role_name}`, `${rank}` and `${local_rank}` (torchrun's
    #: TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE, in which the prefix is followed by nothing).
    prefix: str = "[${role_name}${local_rank}]:"
    #: Lines of tee'd streams that contain one of these are also written to filtered_stdout.log and
    #: filtered_stderr.log, in the run's folder on the driver's machine.
    duplicate_stdout_filters: tuple[str, ...] = field(default=())
    duplicate_stderr_filters: tuple[str, ...] = field(default=())

    def teed(self, local_rank: int) -> Streams:
        """What the console shows of this local rank with a prefix."""
        return _of(self.tee, local_rank) if self._passes(local_rank) else Streams.NONE

    def plain(self, rank: int, local_rank: int) -> Streams:
        """What the console shows of this rank as it is: rank 0, or those that the filter names."""
        if not self._passes(local_rank) or (self.local_ranks_filter is None and rank != 0):
            return Streams.NONE
        return Streams.BOTH & ~_of(self.redirects, local_rank) & ~_of(self.tee, local_rank)

    def _passes(self, local_rank: int) -> bool:
        return self.local_ranks_filter is None or local_rank in self.local_ranks_filter


def _of(streams: PerLocalRank, local_rank: int) -> Streams:
    return streams if isinstance(streams, Streams) else streams.get(local_rank, Streams.NONE)
