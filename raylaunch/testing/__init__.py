"""For tests, yours and ours: real local clusters to hurt, runs in the background, and a simulator of the coordinator.

    def test_survives(raylaunch_cluster):  # a fixture of the pytest plugin, _raylaunch_pytest_plugin.py
        run = raylaunch_cluster.start_run(train, num_workers=2)

Everything is loaded when it is asked for: the simulator needs no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylaunch.testing.background_run import BackgroundRun
    from raylaunch.testing.cluster import LocalCluster
    from raylaunch.testing.simulation import SimulationFailed, SimulationResult, simulate

__all__ = ["BackgroundRun", "LocalCluster", "SimulationFailed", "SimulationResult", "simulate"]

_MODULES = {"BackgroundRun": "background_run", "LocalCluster": "cluster"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'simulation')}"), name)
