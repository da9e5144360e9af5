"""Why a command failed, as far as it left word: its error file (torch's `@record`), or the end of its stderr."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

from raylaunch.errors import TRACEBACK_LIMIT, Ending, EndKind
from raylaunch.worker.process_group import is_collateral_text

#: How many lines of a stderr without a traceback are shown.
_LINES = 20
_TRACEBACK = "Traceback (most recent call last):"
#: What torch (2.13) puts before each line of a traceback once there is a process group.
_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
#: How the traceback of an exception group begins, and what stands before its lines (Python 3.11).
_GROUP = re.compile(r"^ *\+ Exception Group Traceback \(most recent call last\):$", re.MULTILINE)
_GROUP_MARGIN = re.compile(r"^ *[|+] ", re.MULTILINE)


def account_of(ending: Ending, error_file: str, stderr: str) -> Ending:
    """`ending` with what the command said of it, where it failed by itself. Raises nothing."""
    by_itself = ending.kind is EndKind.SIGNALED and ending.signal not in (signal.SIGKILL, signal.SIGTERM)
    if ending.kind is not EndKind.EXITED and not by_itself:
        return ending
    return _recorded(ending, error_file) or _printed(ending, stderr)


def _recorded(ending: Ending, error_file: str) -> Ending | None:
    """From what torch 2.13 writes: {"message": {"message": "Type: text", "extraInfo": {"py_callstack": ...}}}."""
    try:
        said = json.loads(Path(error_file).read_bytes())["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(said, str):  # anybody may write it
        return replace(ending, message=said)
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        return None
    text, extra = said["message"], said.get("extraInfo")
    trace = str(extra.get("py_callstack", "")) if isinstance(extra, dict) else ""
    kind = re.match(r"([\w.]+): ", text)
    error_type = kind[1] if kind else ""
    return replace(ending, error_type=error_type, message=text, traceback=trace, collateral=is_collateral_text(text))


def _printed(ending: Ending, stderr: str) -> Ending:
    try:
        with open(stderr, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TRACEBACK_LIMIT))
            text = _PREFIX.sub("", file.read().decode(errors="replace"))
    except OSError:
        return ending
    group = max((found.start() for found in _GROUP.finditer(text)), default=-1)
    grouped = group > text.rfind(f"\n{_TRACEBACK}")  # those of a group's members stand behind its margin
    start = group if grouped else text.rfind(_TRACEBACK)
    shown = text[start:] if start >= 0 else "\n".join(text.splitlines()[-_LINES:])
    lines = [line for line in shown.splitlines() if line.strip()]
    if not lines:
        return ending
    if start < 0:
        return replace(ending, message=lines[-1].strip(), traceback=shown)
    if grouped:
        lines = [_GROUP_MARGIN.sub("", line, count=1) for line in lines]
    # The line that names the exception is the first that isn't indented; what follows is its message.
    after = next((number for number, line in enumerate(lines[1:], 1) if not line.startswith(" ")), len(lines) - 1)
    text = "\n".join(lines[after:])
    kind = re.match(r"[\w.]+", lines[after])
    collateral = ending.kind is EndKind.EXITED and is_collateral_text(text)
    return replace(ending, error_type=kind[0] if kind else "", message=text, traceback=shown, collateral=collateral)
