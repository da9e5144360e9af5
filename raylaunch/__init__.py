"""raylaunch starts PyTorch distributed training on a Ray cluster, and re-forms it at once when anything fails.

    result = raylaunch.run(train_fn, num_workers=(8, 16), use_gpu=True)

    with raylaunch.Launcher(num_workers=8, use_gpu=True) as launcher:  # several runs on the same workers
        launcher.run(pretrain)
        launcher.run(finetune)

    launcher = raylaunch.ElasticLauncher("cuda:*").freeze()  # one process per GPU of a node
    launcher(worker, launcher)

The map: `api` takes a request, `spec` validates it, `coordinator/` decides (pure), `cluster/` acts (Ray), `worker/` is
what happens inside a worker (torch), `journal` records, `errors` tells. Importing this package imports neither torch
nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raylaunch.api import Launcher, run
from raylaunch.context import Context, get_context
from raylaunch.coordinator.commands import Recovery
from raylaunch.errors import (
    ConfigError,
    Ending,
    EndKind,
    Failure,
    InternalError,
    LauncherClosedError,
    PlacementTimeout,
    RaylaunchError,
    RunFailedError,
    RunInUseError,
)
from raylaunch.result import RunResult
from raylaunch.spec import Timeouts
from raylaunch.version import __version__

if TYPE_CHECKING:
    from raylaunch import elastic as elastic
    from raylaunch.elastic import ElasticLauncher, get_current_launcher

__all__ = [
    "ConfigError",
    "Context",
    "ElasticLauncher",
    "EndKind",
    "Ending",
    "Failure",
    "InternalError",
    "Launcher",
    "LauncherClosedError",
    "PlacementTimeout",
    "RaylaunchError",
    "Recovery",
    "RunFailedError",
    "RunInUseError",
    "RunResult",
    "Timeouts",
    "__version__",
    "get_context",
    "get_current_launcher",
    "run",
]


def __getattr__(name: str) -> Any:
    """ElasticLauncher and what belongs to it are imported when they are used: that doubles the time of an import."""
    if name in ("elastic", "ElasticLauncher", "get_current_launcher"):
        module = importlib.import_module("raylaunch.elastic")
        return module if name == "elastic" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
