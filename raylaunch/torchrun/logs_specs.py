"""torch's LogsSpecs, as far as it is data: which streams of which local ranks go where.

Its `reify` names files for all workers of the agent's own machine, and may make folders for them. Here no process is
that agent, and every rank's files lie in the run's folder, where journal and console look for them. So it isn't called,
and who has written one of their own is told so.
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
        logs, log_dir = logs_of(specs, asked.logs), log_dir_of(specs)
    except Exception as error:  # somebody else's code
        raise ConfigError(f"--logs-specs={asked.logs_specs}: {type(error).__name__}: {error}") from error
    notes = (*asked.notes, *notes_on(specs, f"--logs-specs={asked.logs_specs}"))
    return replace(asked, logs=logs, log_dir=log_dir, notes=notes)


def logs_of(specs: Any, logs: Logs) -> Logs:
    """`logs` with the streams that a LogsSpecs has chosen.

    Its fields (torch 2.13) are private, and nowhere else; one that doesn't keep them, as torch allows, has not chosen.
    """
    ranks = getattr(specs, "_local_ranks_filter", logs.local_ranks_filter)
    return replace(
        logs,
        redirects=_streams(getattr(specs, "_redirects", logs.redirects)),
        tee=_streams(getattr(specs, "_tee", logs.tee)),
        local_ranks_filter=frozenset(ranks) if ranks else None,
    )


def notes_on(specs: Any, shown: str) -> tuple[str, ...]:
    """What the user should know of a LogsSpecs, which messages call `shown`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    if type(specs).reify is DefaultLogsSpecs.reify:
        return ()
    return (f"{shown}: its streams and its folder are taken, but its reify is not called: files are named as ever",)


def log_dir_of(specs: Any) -> str | None:
    """Where a LogsSpecs wants the logs; None where torch (2.13) has made it a folder of this machine by itself."""
    folder: str | None = specs.root_log_dir
    own = os.path.join(tempfile.gettempdir(), "torchelastic_")
    if not folder or folder == os.devnull or folder.startswith(own):
        return None
    return os.path.abspath(folder)


def _streams(std: Any) -> PerLocalRank:
    if isinstance(std, Streams):
        return std
    if isinstance(std, Mapping):
        return {rank: one if isinstance(one, Streams) else Streams(int(one)) for rank, one in std.items()}
    return Streams(int(std))
