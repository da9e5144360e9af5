"""Several launchers with one run id, as torchrun wants one on every node: one launches, the others follow its run.

Who follows waits for the run's coordinator to be gone, and then finds the exit code where the launcher has noted it: in
Ray's key-value store, which has no public door in 2.60.
"""

from __future__ import annotations

import contextlib
import json
import time

import ray
import ray.exceptions
from ray.experimental import internal_kv

from raylaunch.cluster.coordinator_actor import NAMESPACE, actor_name

#: How long the launcher may take from its run's end to its own, in seconds.
NOTE_SECONDS = 15.0
#: Ray 2.60 restarts a coordinator that has died in 1.7 s, and calls to it fail meanwhile, in seconds.
RESTART_SECONDS = 5.0


def note_end(run_id: str, code: int) -> None:
    """The launcher's part: its run is over, and this is its exit code."""
    note = json.dumps({"code": code, "at": time.time()})
    with contextlib.suppress(Exception):  # without Ray there is nobody to be told
        internal_kv._internal_kv_put(_key(run_id), note.encode(), overwrite=True, namespace=NAMESPACE)  # noqa: SLF001


def ended_since(run_id: str, moment: float) -> int | None:
    """The exit code of a run of this id that has ended since then, in seconds since 1970; None if there is none.

    A launcher that was started with the others, and is here when they are done, would run everything once more.
    """
    found = internal_kv._internal_kv_get(_key(run_id), namespace=NAMESPACE)  # noqa: SLF001
    note = json.loads(found) if found else {"at": 0.0}
    return int(note["code"]) if note["at"] >= moment else None


def follow(run_id: str) -> int | None:
    """Wait until the run is over; the launcher's exit code, or None if it has left none: it was killed."""
    since = time.time()
    while True:
        try:
            coordinator = ray.get_actor(actor_name(run_id), namespace=NAMESPACE)
            ray.get(coordinator.over.remote())
        except ValueError:  # it is gone
            break
        except ray.exceptions.RayActorError:
            if not _comes_back(run_id):
                break
    until = time.monotonic() + NOTE_SECONDS
    while (code := ended_since(run_id, since)) is None and time.monotonic() < until:
        time.sleep(0.1)  # Ray pushes no news of a key
    return code


def _comes_back(run_id: str) -> bool:
    """Whether a coordinator that doesn't answer is only being restarted."""
    until = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < until:
        try:
            coordinator = ray.get_actor(actor_name(run_id), namespace=NAMESPACE)
            ray.get(coordinator.status.remote(), timeout=1.0)
        except ValueError:
            return False
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            time.sleep(0.2)
        else:
            return True
    return False


def _key(run_id: str) -> bytes:
    return f"raylaunch:{run_id}:end".encode()
