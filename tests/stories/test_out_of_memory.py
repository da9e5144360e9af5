"""A node runs out of memory: Ray's memory monitor kills the worker that grew, and the error says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import raylaunch
from raylaunch import EndKind

ROOM = 2 << 30


@pytest.fixture(scope="module")
def one_node() -> Iterator[Any]:
    """A node whose memory is full, for Ray, at 2 GB more than is in use now."""
    from raylaunch.testing.cluster import LocalCluster

    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
        patch.setenv("RAY_memory_monitor_refresh_ms", "50")
        with LocalCluster(nodes=1, cpus=4) as cluster:
            yield cluster


def grows_on_rank_1() -> None:
    hoard = []
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if raylaunch.get_context().rank == 1:
            hoard.append(b"x" * (64 << 20))
            assert len(hoard) * (64 << 20) < 2 * ROOM, "Ray's memory monitor never came"
        time.sleep(0.01)


def test_a_worker_that_is_killed_for_its_memory_is_a_failure_that_says_so(one_node, start):
    error = start(grows_on_rank_1, num_workers=2, max_restarts=0).error()
    assert error.root_cause.ending.kind is EndKind.OUT_OF_MEMORY
    assert error.root_cause.rank == 1
    assert "out of memory" in str(error)
