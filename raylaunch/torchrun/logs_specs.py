"""torch's LogsSpecs, as far as it is data: which streams of which local ranks go where.

Its `reify` names files for the workers of the launcher's own machine. Here every rank's files lie in the run's folder,
so it is not called.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from raylaunch.command import Logs, PerLocalRank, Streams
from raylaunch.errors import ConfigError

if TYPE_CHECKING:
    from raylaunch.torchrun.plan import Plan

GROUP = "torchrun.logs_specs"


def with_logs_specs(asked: Plan) -> Plan:
    """The plan with the streams of the LogsSpecs that --logs-specs names. Raises `ConfigError`."""
    if asked.logs_specs is None:
        return asked
    found = list(metadata.entry_points(group=GROUP, name=asked.logs_specs))
    if not found:
        raise ConfigError(f"--logs-specs: could not find entrypoint under '{GROUP}[{asked.logs_specs}]' key")
    from torch.distributed.elastic.multiprocessing import Std

    def torchs(streams: PerLocalRank) -> Any:
        if isinstance(streams, Streams):
            return Std(streams.value)
        return {rank: Std(one.value) for rank, one in streams.items()}

    chosen = asked.logs.local_ranks_filter
    try:
        specs = found[0].load()(
            log_dir=asked.log_dir,
            redirects=torchs(asked.logs.redirects),
            tee=torchs(asked.logs.tee),
            local_ranks_filter=None if chosen is None else set(chosen),
        )
    except Exception as error:  # somebody else's code
        raise ConfigError(f"--logs-specs={asked.logs_specs}: {type(error).__name__}: {error}") from error
    return replace(asked, logs=logs_of(specs, asked.logs), log_dir=log_dir_of(specs))


def logs_of(specs: Any, logs: Logs) -> Logs:
    """`logs` with the streams that a LogsSpecs has chosen. Its fields (torch 2.13) are private, and nowhere else."""
    ranks = specs._local_ranks_filter  # noqa: SLF001
    return replace(
        logs,
        redirects=_streams(specs._redirects),  # noqa: SLF001
        tee=_streams(specs._tee),  # noqa: SLF001
        local_ranks_filter=frozenset(ranks) if ranks else None,
    )


def log_dir_of(specs: Any) -> str | None:
    """Where a LogsSpecs wants the logs; None where torch (2.13) has made it a folder of this machine by itself."""
    folder: str | None = specs._root_log_dir  # noqa: SLF001
    own = os.path.join(tempfile.gettempdir(), "torchelastic_")
    if not folder or folder == os.devnull or folder.startswith(own):
        return None
    return os.path.abspath(folder)


def _streams(std: Any) -> PerLocalRank:
    if isinstance(std, Mapping):
        return {rank: Streams(int(one)) for rank, one in std.items()}
    return Streams(int(std))
