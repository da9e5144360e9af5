"""`raylaunch.testing` itself: what can't work is refused with words, and a run in the background says how it stands."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from steps import step_until

import raylaunch
from raylaunch import ConfigError
from raylaunch.testing import LocalCluster


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nodes": 0}, "nodes=0: must be a whole number, 1 or more"),
        ({"nodes": True}, "nodes=True: must be a whole number, 1 or more"),
        ({"cpus": -1}, "cpus=-1: must be a whole number, 0 or more"),
        ({"cpus": 1.5}, "cpus=1.5: must be a whole number, 0 or more"),
        ({"gpus": "2"}, "gpus='2': must be a whole number, 0 or more"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ConfigError) as caught:
        LocalCluster(**arguments)
    assert words in str(caught.value)


def test_a_cluster_beside_another_or_on_another_thread_is_refused(one_node):
    with pytest.raises(ConfigError, match="connected to a Ray cluster already"):
        LocalCluster()
    refusals = []

    def elsewhere():
        for make in (LocalCluster, one_node.add_node):
            with pytest.raises(ConfigError) as caught:
                make()
            refusals.append(str(caught.value))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ["main thread" in refusal for refusal in refusals] == [True, True]


def test_harm_to_what_is_not_there_is_refused(one_node, start, gate):
    head = one_node.nodes[0]
    with pytest.raises(ConfigError, match=f"node={head.node_id}: is the driver's own"):
        one_node.kill_node(head)
    with pytest.raises(
        ConfigError, match=f"node='first': must be one of the cluster's `nodes`, which are {head.node_id}"
    ):
        one_node.drain_node("first")
    with pytest.raises(ConfigError, match="seconds=0: must be more than 0"):
        one_node.drain_node(head, seconds=0)
    with pytest.raises(ConfigError, match="num_gpus: no such argument; write cpus=, gpus="):
        one_node.add_node(num_gpus=1)
    with pytest.raises(ConfigError, match="run='nobody': no such run is going on"):
        one_node.kill_worker("nobody", 0)
    run = start(step_until, args=(gate("enough"),), num_workers=1)
    run.running()
    with pytest.raises(ConfigError, match=r"rank=1: must be a rank of the run, which has ranks \[0\]"):
        one_node.pause_worker(run, 1)
    with pytest.raises(TimeoutError, match=r"no second generation within 0\.1 s; it is in phase .running. of"):
        run.wait_until(lambda: False, "second generation", seconds=0.1)
    with pytest.raises(TimeoutError, match=rf"is not over after 0\.1 s.*{run.journal}"):
        run.result(0.1)
    assert not run.done()
    gate("enough").touch()
    assert list(run.result()) == [(0, 1, 1)]
    assert run.done()
    with pytest.raises(AssertionError, match="over before there was generation 2 running: it returned"):
        run.running(generation=2)
    with pytest.raises(AssertionError, match="did not fail"):
        run.error()


def test_what_a_background_run_raises_reaches_the_test(one_node):
    run = one_node.start_run(os.getpid, num_wrokers=2)
    with pytest.raises(AssertionError) as caught:
        run.running()
    assert "num_wrokers" in str(caught.value)
    assert isinstance(caught.value.__cause__, ConfigError)
    with pytest.raises(ConfigError, match="did you mean 'num_workers'"):
        run.result()
    assert isinstance(run.error(), raylaunch.ConfigError)


@pytest.mark.slow
def test_a_run_under_which_the_session_is_closed_says_so_though_nothing_has_happened_for_long(one_node, start, gate):
    run = start(step_until, args=(gate("never"),), num_workers=2)
    run.running()
    quiet = 7.0  # seconds: what is told in the beginning is told by then
    run.wait_until(lambda: time.time() - run.journal.stat().st_mtime > quiet, "a steady run")
    one_node.disconnect()
    try:
        assert "ray.shutdown() was called under the run" in str(run.error(5))
    finally:
        one_node.connect()


@pytest.mark.slow
def test_whoever_leaves_the_cluster_can_come_back(one_node, start):
    """Last in this file: while it is away, the environment is as it was."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    address = one_node.address
    assert os.environ["RAY_ADDRESS"] == address
    one_node.disconnect()
    assert os.environ.get("RAY_ADDRESS") != address
    with pytest.raises(ConfigError, match="call its connect"):
        one_node.start_run(os.getpid)
    assert one_node.as_new()
    one_node.connect()
    assert one_node.as_new()
    assert len(start(os.getpid, num_workers=1).result()) == 1
