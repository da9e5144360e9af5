"""What torchrun offers, on Ray: its command line, and the API of torch.distributed.launcher.

    from raylaunch.torchrun import LaunchConfig, elastic_launch  # instead of torch.distributed.launcher.api

    results = elastic_launch(LaunchConfig(min_nodes=1, max_nodes=4, nproc_per_node=8), train)("s3://...")

The map: `options` knows every option, `parser` reads them, `plan` makes of them what to run (with `entry`,
`rendezvous` and `values`), `sizing` settles what depends on the cluster, `launch` carries it out; `run` is the command,
`launcher` the API. The API's names are loaded when they are used, since they need torch, and the command doesn't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylaunch.torchrun.launcher import (
        ChildFailedError,
        LaunchConfig,
        NumaOptions,
        ProcessFailure,
        SignalException,
        elastic_launch,
        launch_agent,
        record,
    )

__all__ = [
    "ChildFailedError",
    "LaunchConfig",
    "NumaOptions",
    "ProcessFailure",
    "SignalException",
    "elastic_launch",
    "launch_agent",
    "record",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raylaunch.torchrun import launcher

    return getattr(launcher, name)
