"""Ray's own control store (GCS) dies and is started again, with storage that outlives it: the run goes on.

Here the storage is RocksDB on the disk, which Ray 2.60 has as an alpha; to the run it is the same as an external Redis.
"""

from __future__ import annotations

import os
import signal

import pytest
from harness import eventually, runs
from steps import step_until

from raylaunch.cluster import placement
from raylaunch.testing.cluster import LocalCluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """As elsewhere, but what the control store knows is kept on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", str(tmp_path_factory.mktemp("gcs")))
        with LocalCluster(nodes=1, cpus=4) as cluster:
            yield cluster


@pytest.fixture
def gcs(one_node):
    """The node that has the control store."""
    node = one_node.nodes[0]
    node._ray_params.gcs_server_port = int(one_node.address.rpartition(":")[2])  # the same port again
    return node


def steps(folder, generation: int) -> int:
    """How many steps rank 0 of a generation has made."""
    file = folder / f"{generation}-0"
    return len(file.read_text().splitlines()) if file.exists() else 0


def goes_on(folder, generation: int) -> None:
    before = steps(folder, generation)
    eventually(lambda: steps(folder, generation) > before + 50, f"generation {generation} goes on")


def test_training_goes_on_while_the_control_store_is_away_and_failures_are_mended_when_it_is_back(
    one_node, gcs, start, gate, tmp_path
):
    log = tmp_path / "steps"
    log.mkdir()
    run = start(step_until, args=(gate("enough"), log), num_workers=2, spares=2)
    run.running(spares=2)
    gcs.kill_gcs_server()
    goes_on(log, 1)
    gcs.start_gcs_server()
    one_node.kill_worker(run.id, 1)  # after
    victim = run.running(generation=2, spares=2).members[0].process
    goes_on(log, 2)

    gcs.kill_gcs_server()
    os.kill(victim.pid, signal.SIGKILL)  # meanwhile
    eventually(lambda: not runs(victim.pid), "the rank is gone")
    gcs.start_gcs_server()
    run.running(generation=3)
    goes_on(log, 3)
    gate("enough").touch()
    result = run.result()
    assert result.restarts == 2
    assert ["killed by SIGKILL" in recovery.cause for recovery in result.recoveries] == [True, True]


def test_a_question_under_way_when_the_session_ends_starts_no_other_session(one_node, monkeypatch):
    """As after `run()` and `ray.shutdown()`, when Ray's answers had been slow."""
    import ray

    ask = ray.nodes

    def nodes():
        answer = ask()
        ray.shutdown()
        return answer

    monkeypatch.setattr(ray, "nodes", nodes)
    try:
        with pytest.raises(ConnectionError, match="closed"):
            placement.survey("r")
        assert not ray.is_initialized()
    finally:
        if not ray.is_initialized():
            ray.init(address=one_node.address, log_to_driver=False)
