"""The pytest plugin: fixtures that give a test a Ray cluster of its own. pytest finds it by its entry point.

    def test_survives_a_kill(raylaunch_cluster):
        run = raylaunch_cluster.start_run(train, num_workers=2)
        ...

pytest imports this file in every project where raylaunch is installed: nothing here imports Ray or torch before a test
asks for a cluster. With pytest-xdist each of its workers is a process of its own, and has its own cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from raylaunch.testing.cluster import LocalCluster

#: The cluster of the fixture `raylaunch_cluster`.
NODES, CPUS = 2, 2


class ClusterKeeper:
    """Keeps one test's cluster for the next, which saves its start, if that wants the same and finds it as new."""

    def __init__(self) -> None:
        self._cluster: LocalCluster | None = None
        self._wanted: dict[str, Any] = {}

    def take(self, wanted: dict[str, Any]) -> LocalCluster:
        """A cluster that no test has changed, with this process as its driver."""
        from raylaunch.testing.cluster import LocalCluster

        if self._cluster is None or wanted != self._wanted or not self._renewed(self._cluster):
            self.close()
            self._cluster, self._wanted = LocalCluster(**wanted), wanted
        return self._cluster

    def give_back(self) -> None:
        """End what the test has left in its cluster, and the cluster if it is not as it was."""
        if self._cluster is None:
            return
        try:
            self._cluster.disconnect()
        except BaseException:
            self.close()
            raise
        if not self._cluster.as_new():
            self.close()

    def close(self) -> None:
        """End the cluster."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.shutdown()

    @staticmethod
    def _renewed(cluster: LocalCluster) -> bool:
        if not cluster.as_new():  # it was shut down, or has died, since the last test
            return False
        try:
            cluster.connect()
        except (OSError, RuntimeError):  # it is there, and doesn't answer
            return False
        return cluster.as_new()


@pytest.fixture(scope="session")
def _raylaunch_keeper() -> Iterator[ClusterKeeper]:
    keeper = ClusterKeeper()
    yield keeper
    keeper.close()


@pytest.fixture
def raylaunch_cluster_factory(_raylaunch_keeper: ClusterKeeper) -> Iterator[Callable[..., LocalCluster]]:
    """Make the test's cluster: call it once, with the arguments of raylaunch.testing.LocalCluster.

    Whatever the test leaves behind is ended after it, and the cluster is kept for the next test that wants the same.
    """
    taken = False

    def make(**wanted: Any) -> LocalCluster:
        nonlocal taken
        if taken:
            pytest.fail("raylaunch_cluster_factory: a test has one cluster, and this one has it already", pytrace=False)
        taken = True
        return _raylaunch_keeper.take(wanted)

    yield make
    _raylaunch_keeper.give_back()


@pytest.fixture
def raylaunch_cluster(raylaunch_cluster_factory: Callable[..., LocalCluster]) -> LocalCluster:
    """The test's Ray cluster: a raylaunch.testing.LocalCluster of 2 nodes with 2 CPUs each, on this machine.

    Whatever the test leaves behind is ended after it, and the cluster is kept for the next test.
    """
    return raylaunch_cluster_factory(nodes=NODES, cpus=CPUS)
