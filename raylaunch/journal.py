"""The run's record: one JSON line for every event before it is decided on, and one for the decision.

    {"seq": 7, "run": "a1b2", "event": "WorkerReady", "at": 3.2, ...}
    {"seq": 7, "before": "rendezvous", "after": "forming", "generation": 1, "reason": "...", "commands": [...]}

The coordinator is pure, so the events alone reproduce every state: after the coordinator's own death, and on anybody's
desk with `raylaunch replay JOURNAL`. Values are encoded by their dataclass fields and decoded by their annotations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
import json
import logging
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, BinaryIO

from raylaunch.coordinator.commands import Command
from raylaunch.coordinator.events import EVENTS, Event
from raylaunch.coordinator.machine import Coordinator, Decision
from raylaunch.errors import InternalError

logger = logging.getLogger("raylaunch")


class Journal:
    """Writes the record. A disk that is full, or anything else that goes wrong, is told once and stops nothing."""

    def __init__(self, folder: str, run_id: str) -> None:
        self.path = os.path.join(folder, "journal.jsonl")
        self._run_id = run_id
        self._file: BinaryIO | None = None
        self._broken = False
        try:
            os.makedirs(folder, exist_ok=True)
            self._open(folder)
        except OSError as error:
            self._give_up(error)

    def _open(self, folder: str) -> None:
        """Open a new file: an earlier run of the same id has left its own, and nothing is overwritten."""
        for number in itertools.count(1):
            self.path = os.path.join(folder, f"journal-{number}.jsonl" if number > 1 else "journal.jsonl")
            with contextlib.suppress(FileExistsError):
                self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
                return

    def event(self, seq: int, event: Event) -> None:
        """Record an event."""
        self._write({"seq": seq, "run": self._run_id, "event": type(event).__name__, **encode(event)})

    def decision(self, seq: int, decision: Decision) -> None:
        """Record what an event led to."""
        self._write({"seq": seq, **encode_decision(decision)})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        if not self._broken:
            self._broken = True
            logger.warning("the journal %s can't be written: %s; the run goes on without it", self.path, error)


def encode(value: Any) -> Any:
    """A dataclass value as JSON-able data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def encode_decision(decision: Decision) -> dict[str, Any]:
    """A decision as JSON-able data, its commands with their names."""
    return {
        "before": decision.before.value,
        "after": decision.after.value,
        "generation": decision.generation,
        "reason": decision.reason,
        "commands": [_encode_command(command) for command in decision.commands],
    }


def _encode_command(command: Command) -> dict[str, Any]:
    return {"command": type(command).__name__, **encode(command)}


def decode(hint: Any, data: Any) -> Any:
    """The value that `encode` made `data` from, by its type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if data is None else decode(inner, data)
    if origin is tuple:
        return tuple(decode(arguments[0], item) for item in data)
    if origin is dict:
        return {key: decode(arguments[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint(**{name: decode(kind, data[name]) for name, kind in _hints(hint).items() if name in data})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(data)
    return data


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a journal: an event (with `decision` None), or the decision recorded for it."""

    seq: int
    event: Event | None
    decision: dict[str, Any] | None


def read(path: str) -> Iterator[Entry]:
    """The entries of a journal. A last line that a crash cut short is left out. Raises ValueError for other rubbish."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                data = json.loads(line)
                seq = data.pop("seq")
                if "event" in data:
                    cls = EVENTS[data.pop("event")]
                    yield Entry(seq, decode(cls, data), None)
                else:
                    yield Entry(seq, None, data)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a journal of this version of raylaunch: {error}"
                ) from error


@dataclasses.dataclass(frozen=True)
class Step:
    """One event of a journal, replayed. `same`: whether the recorded decision was reproduced (None: none recorded)."""

    seq: int
    event: Event
    decision: Decision
    same: bool | None


def replay(path: str) -> Iterator[Step]:
    """Hand a journal's events to a new coordinator, and compare what it decides with what was recorded."""
    recorded = {entry.seq: entry.decision for entry in read(path) if entry.decision is not None}
    coordinator = Coordinator()
    for entry in read(path):
        if entry.event is not None:
            try:
                decision = coordinator.handle(entry.event)
            except InternalError as error:
                decision = coordinator.refuse(error)
            was = recorded.get(entry.seq)
            again = json.loads(json.dumps(encode_decision(decision)))
            yield Step(entry.seq, entry.event, decision, None if was is None else was == again)
