"""What a rank of a launch calls: the user's function, with its launcher made the process's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raylaunch.context import Context, get_context
from raylaunch.errors import ConfigError
from raylaunch.worker.board_copy import BoardCopy

if TYPE_CHECKING:
    from raylaunch.elastic.launcher import ElasticLauncher

#: How long a rank waits to hear what stands on the board, in seconds: its coordinator may be restarting.
HEAR_SECONDS = 30.0


class DevicesTakenError(ConfigError):
    """Ray gave the rank other GPUs than the launcher's `devices` choose: somebody else has them. Never retried."""


class Call:
    """The function on its way. The launcher travels in the same pickle as the arguments: there it is one object."""

    def __init__(self, launcher: ElasticLauncher, function: Callable[..., Any]) -> None:
        self._launcher = launcher
        self._function = function
        self.__name__ = str(getattr(function, "__name__", None) or type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it. Called once in each rank's process."""
        # Everything that knows Ray, or this package as a whole, is there already: the worker has imported it.
        from raylaunch.cluster.board_link import BoardLink
        from raylaunch.elastic.current import entered

        context, launcher = get_context(), self._launcher
        _check_devices(launcher, context)
        os.environ["ROLE_NAME"] = launcher.role_name
        copy = BoardCopy(context.rank)
        with BoardLink(copy, context.run_id, context.generation) as link:
            if not link.wait_until_heard(HEAR_SECONDS):
                print(  # noqa: T201 - the rank's own log
                    f"raylaunch: events are not known after {HEAR_SECONDS:g} s; the coordinator does not answer",
                    file=sys.stderr,
                )
            with entered(launcher, copy, context.generation):
                return self._function(*args, **kwargs)


def _check_devices(launcher: ElasticLauncher, context: Context) -> None:
    settled = launcher._settled  # noqa: SLF001 - the launcher's own helper
    if settled is None or settled.indices is None:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    wanted = {str(index) for index in settled.indices}
    if not set(seen) <= wanted:
        raise DevicesTakenError(
            f"devices={launcher.config.devices!r}: rank {context.rank} was given GPU"
            f" {', '.join(seen)}: Ray has given the others to somebody else"
        )
