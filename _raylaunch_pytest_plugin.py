"""The pytest plugin: fixtures that give a test a Ray cluster of its own. pytest finds it by its entry point.

    def test_survives_a_kill(raylaunch_cluster):
        run = raylaunch_cluster.start_run(train, num_workers=2)
        ...

pytest imports this file in every project where raylaunch is installed. It lies beside the package, because importing
anything of a package imports all that its __init__ imports, and whoever doesn't use the fixtures should not pay for it.

With pytest-xdist each of its workers is a process of its own, and has its own cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from raylaunch.testing.cluster import LocalCluster
    from raylaunch.testing.keeper import ClusterKeeper

#: The cluster of the fixture `raylaunch_cluster`.
NODES, CPUS = 2, 2


@pytest.fixture(scope="session")
def _raylaunch_keeper() -> Iterator[ClusterKeeper]:
    from raylaunch.testing.keeper import ClusterKeeper

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
        cluster = _raylaunch_keeper.take(wanted)
        taken = True
        return cluster

    yield make
    _raylaunch_keeper.give_back()


@pytest.fixture
def raylaunch_cluster(raylaunch_cluster_factory: Callable[..., LocalCluster]) -> LocalCluster:
    """The test's Ray cluster: a raylaunch.testing.LocalCluster of 2 nodes with 2 CPUs each, on this machine.

    Whatever the test leaves behind is ended after it, and the cluster is kept for the next test.
    """
    return raylaunch_cluster_factory(nodes=NODES, cpus=CPUS)
