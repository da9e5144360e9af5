"""What a run that succeeded comes to: `RunResult`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:  # `import raylaunch` stays light
    from raylaunch.coordinator.commands import Recovery


@dataclass(frozen=True)
class RunResult(Sequence[Any]):
    """What a run came to: a sequence of train_fn's return values by rank, and how it went.

    Attributes:
        values: the return values, by rank.
        run_id: the run.
        world_size: how many workers the last generation had.
        generation: its number; 1 when nothing happened. In a launcher it goes on rising from run to run.
        restarts: how many failures were charged to `max_restarts`.
        journal: path of the run's journal, or its launcher's.
        recoveries: for each re-formation after a failure: its cause, the seconds it took, the new world size.
    """

    values: tuple[Any, ...]
    run_id: str
    world_size: int
    generation: int
    restarts: int
    journal: str
    recoveries: tuple[Recovery, ...] = field(default=())

    @overload
    def __getitem__(self, rank: int) -> Any: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, rank: int | slice) -> Any:
        return self.values[rank]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)
