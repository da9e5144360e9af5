"""The peers: each module carries one order out with one launcher, as `python -m benchmarks.peers.with_... FOLDER`.

What a peer does, whoever it is:

1. It reads the order, `FOLDER/order.json` (`Order`).
2. It starts the Ray cluster that it needs, and waits until the machine is quiet.
3. It writes `FOLDER/called.json`, the time, and calls its launcher with the task, a function of `benchmarks.work`.
4. It writes `FOLDER/armed.json` when it may be hurt: `victim`, the process that stands for the second node, and
   `pids`, of the ranks that have everything ready for their loss (None: whoever they are).
5. It leaves with 0 when the launcher says that the training has ended well.

Killing, timing and cleaning up is done by `benchmarks.session`, which knows of no launcher.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Order:
    """What a peer is asked to do."""

    folder: str
    #: A function of `benchmarks.work`.
    task: str
    #: How many ranks, at least and at most.
    workers: tuple[int, int] = (4, 4)
    #: On how many nodes; they share the ranks equally.
    nodes: int = 1
    #: How many failures the run may survive.
    restarts: int = 3
    #: What only this peer knows.
    options: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        write(os.path.join(self.folder, "order.json"), asdict(self))

    @staticmethod
    def load(folder: str) -> Order:
        with open(os.path.join(folder, "order.json"), encoding="ascii") as file:
            found = json.load(file)
        return Order(**{**found, "workers": tuple(found["workers"])})

    @property
    def per_node(self) -> int:
        return self.workers[1] // self.nodes

    def tell(self, name: str, value: Any) -> None:
        """Write a file that the session waits for."""
        write(os.path.join(self.folder, f"{name}.json"), value)


def write(path: str, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with open(f"{path}.{os.getpid()}", "w", encoding="ascii") as file:
        json.dump(value, file)
    os.replace(f"{path}.{os.getpid()}", path)
