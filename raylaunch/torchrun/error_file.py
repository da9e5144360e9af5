"""torch's error files: what `@record` writes for a rank (torch 2.13), and handing the root cause's on.

A launcher that itself runs under a launcher has a TORCHELASTIC_ERROR_FILE of its own, and leaves the root cause there.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from raylaunch.errors import Failure, RunFailedError
from raylaunch.torchrun.failure import error_file, process_exit_code, wall_clock

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def error_data(error: RunFailedError, failure: Failure) -> dict[str, Any]:
    """What a rank's error file holds; where it has none, or none that can be reached from here, what is known."""
    with contextlib.suppress(OSError, ValueError), open(error_file(error, failure), encoding="utf-8") as file:
        found = json.load(file)
        if isinstance(found, dict) and "message" in found:
            return found
    ending = failure.ending
    message = f"{ending.error_type}: {ending.message}" if ending.error_type else failure.describe()
    extra = {"py_callstack": ending.traceback or message, "timestamp": str(int(wall_clock(failure.at)))}
    return {"message": {"message": message, "extraInfo": extra}}


def write_error_file(error: RunFailedError, failure: Failure) -> str:
    """See that the failure's error file is there for this process; returns its path, or "" where it can't be."""
    path = error_file(error, failure)
    if path and not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(error_data(error, failure), file)
        except OSError:
            return ""
    return path


def hand_on_error_file(error: RunFailedError) -> None:
    """Leave the root cause in this process's own error file, if it has one, as torchrun does."""
    path, cause = os.environ.get(VARIABLE), error.root_cause
    if not path or cause is None:
        return
    data = error_data(error, cause)
    if isinstance(data["message"], dict):
        data["message"]["errorCode"] = process_exit_code(cause)
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)
