"""The board: named values that the driver and the workers of a run tell one another.

Not a log of messages but what stands: a pause, a request for a checkpoint, how far training is. So it is bounded by its
names, nobody who comes late, a new generation above all, has anything to catch up on, and a lost copy is made whole by
anybody's: everyone has a copy of his own, and of two values of one name the later wins wherever they meet. The board in
the coordinator is where they meet. Beside the state machine: it decides nothing about the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

#: Everything that can stand on a board, and what it means:
#: the pause's number and whether it goes on; the pause that all ranks of a generation are in, and that generation;
PAUSE, PAUSED = "pause", "paused"
#: how many checkpoints were asked for; how many of these requests are done; whether all ranks shall stop;
SAVE, SAVED, STOP = "save", "saved", "stop"
#: iteration, total or None, generation; where a debugger waits: generation, number, text; which of them has ended.
PROGRESS, DEBUGGER, DEBUGGER_END = "progress", "debugger", "debugger_end"

NAMES = frozenset({PAUSE, PAUSED, SAVE, SAVED, STOP, PROGRESS, DEBUGGER, DEBUGGER_END})


@dataclass(frozen=True, slots=True)
class Note:
    """One value. Of two for the same name the one with the higher version wins, and with equal ones, the writer's."""

    version: int
    writer: int
    value: Any

    @property
    def stamp(self) -> tuple[int, int]:
        """What is compared."""
        return self.version, self.writer


@dataclass(frozen=True, slots=True)
class Group:
    """The run as it stands, as its coordinator tells it. `world_size` 0: no generation is formed."""

    generation: int = 0
    world_size: int = 0
    restarts: int = 0


class Board:
    """One copy of the board. `seq` rises with every change of this copy; `version` is the highest that it knows of."""

    def __init__(self) -> None:
        self.seq = 0
        self._notes: dict[str, Note] = {}
        self._changed: dict[str, int] = {}
        self.version = 0

    def put(self, name: str, value: Any, writer: int) -> None:
        """Write a value: it wins over all that this copy has seen."""
        self.offer({name: Note(self.version + 1, writer, value)})

    def offer(self, notes: Mapping[str, Note], version: int = 0) -> None:
        """Take in what another copy has, where it is later. `version`: the highest that the other knows of.

        Who hears only some of the names needs that too, or what he puts would lose against what he hasn't heard.
        """
        unknown = notes.keys() - NAMES
        assert not unknown, f"no such names: {sorted(unknown)}"
        self.version = max(self.version, version)
        for name, note in notes.items():
            self.version = max(self.version, note.version)
            known = self._notes.get(name)
            if known is None or known.stamp < note.stamp:
                self.seq += 1
                self._notes[name], self._changed[name] = note, self.seq

    def get(self, name: str, default: Any = None) -> Any:
        """What stands there."""
        note = self._notes.get(name)
        return default if note is None else note.value

    def since(self, seq: int, names: Collection[str] = NAMES) -> dict[str, Note]:
        """Those of these names that have changed after `seq`."""
        return {name: self._notes[name] for name, at in self._changed.items() if at > seq and name in names}
