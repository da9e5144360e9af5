"""Between the tests of a session: one cluster after the other, each test's as new. For the pytest plugin's fixtures."""

from __future__ import annotations

from typing import Any

from raylaunch.testing.cluster import LocalCluster


class ClusterKeeper:
    """Keeps one test's cluster for the next, which saves its start, if that wants the same and finds it as new."""

    def __init__(self) -> None:
        self._cluster: LocalCluster | None = None
        self._wanted: dict[str, Any] = {}

    def take(self, wanted: dict[str, Any]) -> LocalCluster:
        """A cluster that no test has changed, with this process as its driver."""
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
