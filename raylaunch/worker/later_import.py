"""What a forker imports once its ranks run, for those of later generations: what creating a first DDP model needs.

It takes some 1.1 s of a core (torch 2.13). Before the first ranks it would delay them; so it is done when no rank has
been started for a while, in a thread, so that the forker goes on to notice ends meanwhile. Nobody is forked before that
thread has gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
import time

MODULE = "torch._dynamo"
#: How long no rank must have been started, in seconds.
QUIET_SECONDS = 2.0


class LaterImport:
    """That import, from the first rank that could use it to its end."""

    def __init__(self) -> None:
        self._over = False
        self._at: float | None = None
        self._thread: threading.Thread | None = None

    def rank_started(self) -> None:
        """A rank was started that might have used it."""
        if not self._over:
            self._at = time.monotonic() + QUIET_SECONDS

    def go_on(self) -> float | None:
        """Begin, if it is time; in how many seconds it will be (None: nothing is planned)."""
        if self._at is None:
            return None
        left = self._at - time.monotonic()
        if left > 0:
            return left
        self._over, self._at = True, None
        self._thread = threading.Thread(target=_import, name="raylaunch-later", daemon=True)
        self._thread.start()
        return None

    def finish(self) -> None:
        """Somebody is about to be forked."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            gc.freeze()  # the collector of a fork would copy every page


def _import() -> None:
    gc.disable()  # its passes over all that an import makes take a tenth of it
    with contextlib.suppress(Exception):  # a rank will meet it itself, if it needs it
        if "torch" in sys.modules:
            importlib.import_module(MODULE)
    gc.enable()
