"""What a failed run comes to for whoever started it: the exit code, and the table of what failed. Pure."""

from __future__ import annotations

import datetime as dt
import os
import signal
import time

from raylaunch.errors import ConfigError, EndKind, Failure, RunFailedError, signal_name

#: Lines of a traceback, or of what a rank wrote last, in the table: the last ones say the most.
TEXT_LINES = 40
#: How many failures the table holds besides the root cause; of a thousand ranks that lost one peer nobody reads all.
OTHERS = 16


def exit_code(error: BaseException) -> int:
    """The exit code of a launcher that was left by this error.

    The root cause's own code where it has one, 128 + N for a signal, 2 for what could not work, 130 for Ctrl-C, else 1.
    """
    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if not isinstance(error, RunFailedError) or error.root_cause is None:
        return 1
    ending = error.root_cause.ending
    if ending.kind is EndKind.EXITED:
        return (ending.exit_code or 0) & 0xFF or 1
    if ending.kind is EndKind.SIGNALED and ending.signal:
        return 128 + ending.signal
    if ending.kind is EndKind.OUT_OF_MEMORY:  # Ray's memory monitor sends SIGKILL
        return 128 + signal.SIGKILL
    return 1


def process_exit_code(failure: Failure) -> int:
    """The exit code of a failed process as multiprocessing, and torch, write it: -N for signal N."""
    ending = failure.ending
    if ending.kind is EndKind.SIGNALED and ending.signal:
        return -ending.signal
    if ending.kind is EndKind.OUT_OF_MEMORY:
        return -signal.SIGKILL
    return ending.exit_code or 1


def error_file(error: RunFailedError, failure: Failure) -> str:
    """Where a rank's TORCHELASTIC_ERROR_FILE is, on its node; "" where there is none."""
    if not error.journal or failure.rank is None:
        return ""
    folder = os.path.join(os.path.dirname(error.journal), f"generation_{failure.generation}", str(failure.rank))
    return os.path.join(folder, "error.json")


def wall_clock(at: float) -> float:
    """When it was, in seconds since 1970, for a time on this process's monotonic clock."""
    return time.time() - (time.monotonic() - at)


def failure_table(program: str, error: RunFailedError) -> str:
    """What failed, for people: the root cause first, then the others."""
    title = f"{program} FAILED"
    lines = ["=" * max(60, len(title)), title, error.message]
    cause = error.root_cause
    if cause is not None:
        lines += ["-" * 60, "Root cause:", *_block(error, cause)]
        others = [failure for failure in error.failures.values() if failure.rank != cause.rank]
        if others:
            lines += ["-" * 60, "Other failures:"]
            for failure in others[:OTHERS]:
                mark = "  <- followed from the root cause" if failure.ending.collateral else ""
                lines.append(f"  {_when(failure)}{failure.describe()}, exit code {process_exit_code(failure)}{mark}")
            if len(others) > OTHERS:
                lines.append(f"  ... and {len(others) - OTHERS} more, in the journal")
    if error.journal:
        lines += ["-" * 60, f"journal: {error.journal}"]
    lines.append("=" * max(60, len(title)))
    return "\n".join(lines)


def _block(error: RunFailedError, failure: Failure) -> list[str]:
    """The root cause, with all that is known of it."""
    ending, code = failure.ending, process_exit_code(failure)
    rank = "none (a worker without a rank)" if failure.rank is None else str(failure.rank)
    local = "" if failure.local_rank is None else f" (local_rank: {failure.local_rank})"
    named = f" ({signal_name(-code)})" if code < 0 else ""
    rows = {
        "what": ending.describe(),
        "rank": rank + local,
        "time": _when(failure).strip(),
        "host": failure.host,
        "node": failure.node,
        "pid": str(failure.pid or ""),
        "exitcode": f"{code}{named}" if failure.pid else "",
        "error_file": error_file(error, failure),
    }
    lines = [f"  {name:10}: {value}" for name, value in rows.items() if value]
    text = ending.traceback.rstrip()
    if text:
        traceback = "Traceback (most recent call last)" in text
        lines.append(f"  {'traceback' if traceback else 'last lines of stderr'}:")
        lines += [f"    {line}" for line in text.splitlines()[-TEXT_LINES:]]
    return lines


def _when(failure: Failure) -> str:
    if not failure.at:
        return ""
    moment = dt.datetime.fromtimestamp(wall_clock(failure.at)).astimezone().replace(tzinfo=None)
    return moment.isoformat(sep=" ", timespec="milliseconds") + " "
