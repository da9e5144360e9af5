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

from raylaunch.api import Launcher, run
from raylaunch.context import Context, get_context
from raylaunch.coordinator.commands import Recovery
from raylaunch.elastic import ElasticLauncher, get_current_launcher
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
