"""What a worker says of itself before it is a rank, whether it is an actor of its own or a seat in its node's agent."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from raylaunch.coordinator.commands import Process
from raylaunch.version import __version__


@dataclass(frozen=True)
class Hello:
    """A worker's first words."""

    node: str
    host: str
    process: Process
    versions: dict[str, str]


@dataclass(frozen=True)
class Warm:
    """A spare is ready. Memory in bytes."""

    port: int
    memory_available: int
    memory_used: int


def versions() -> dict[str, str]:
    """What has to be the same on the driver and on every node. Read without importing torch."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    found["raylaunch"] = __version__
    for name in ("torch", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def memory_available() -> int:
    """How much memory the node has left, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
