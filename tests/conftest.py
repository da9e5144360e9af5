"""The fixtures of tests on a real cluster: a cluster for a module, runs that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import CommandRun, Run, eventually, nothing_is_left


@pytest.fixture(scope="session")
def clusters() -> Iterator[Any]:
    """Keeps a module's cluster for the next, if that wants the same and finds it as new: a start costs 4 s and more."""
    from raylaunch.testing.keeper import ClusterKeeper

    keeper = ClusterKeeper()
    yield keeper
    keeper.close()


@pytest.fixture(scope="module")
def one_node(clusters: Any) -> Iterator[Any]:
    """A cluster of one node with four CPUs, for the module."""
    yield clusters.take({"nodes": 1, "cpus": 4})
    clusters.give_back()


@pytest.fixture(scope="module")
def two_nodes(clusters: Any) -> Iterator[Any]:
    """A cluster of two nodes with two CPUs each, for the module. A test that loses a node gives another back."""
    yield clusters.take({"nodes": 2, "cpus": 2})
    clusters.give_back()


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a run on the module's cluster; afterwards nothing of any run may be left."""
    yield from _starter(request, tmp_path, Run)


@pytest.fixture
def start_command(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., CommandRun]]:
    """The same of a command."""
    yield from _starter(request, tmp_path, CommandRun)


def _starter(request: pytest.FixtureRequest, tmp_path: Path, kind: Any) -> Iterator[Callable[..., Any]]:
    name = "two_nodes" if "two_nodes" in request.fixturenames else "one_node"
    cluster = request.getfixturevalue(name)
    runs: list[Run] = []

    def start(what: Any, **arguments: Any) -> Run:
        arguments.setdefault("spares", 0)  # a test that needs spares says so: they cost a core each
        run: Run = kind(cluster, what, {"log_dir": tmp_path / "runs", **arguments})
        runs.append(run)
        return run

    yield start
    for run in runs:
        eventually(run.done, f"run {run.id} is over")
    nothing_is_left(tmp_path / "runs")


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Path]:
    """Files by which a test and its workers, on the same machine, wait for each other."""
    folder = tmp_path / "gates"
    folder.mkdir()
    return lambda name: folder / name
