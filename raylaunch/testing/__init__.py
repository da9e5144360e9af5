"""For tests, yours and ours: real local clusters to hurt (`LocalCluster`), and a simulator of the coordinator.

`LocalCluster` is loaded when it is asked for: the simulator needs no Ray.
"""

from __future__ import annotations

from typing import Any

from raylaunch.testing.simulation import SimulationFailed, SimulationResult, simulate

__all__ = ["LocalCluster", "SimulationFailed", "SimulationResult", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "LocalCluster":
        from raylaunch.testing.cluster import LocalCluster

        return LocalCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
