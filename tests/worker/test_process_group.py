"""Real gloo groups over loopback: forming, failing in every way that a peer's end can show, and whose fault it was."""

from __future__ import annotations

import pytest


def test_four_ranks_join_through_a_store_that_was_open_before(play):
    results = play("forms")
    assert [result["sum"] for result in results] == [4.0] * 4
    assert [result["subgroup"] for result in results] == [4] * 4
    assert [result["left"] for result in results] == [True] * 4
    assert [result["threads"] for result in results] == [["MainThread"]] * 4
    # the server that rank 0 had opened as a spare is the one that all of them met in
    assert [result["same_store"] for result in results] == ["by rank 0"] * 4


def test_the_store_listens_on_one_address_and_keeps_its_port(play):
    first = play("forms")[0]
    assert first["listens_here"]
    assert not first["listens_elsewhere"]
    assert first["thief"] == "Address already in use"
    assert first["closed"]
    assert first["closes_everything"]


def test_the_users_collectives_keep_torchs_own_timeouts(play):
    for result in play("forms"):
        assert result["collective_timeout"] == 1800  # torch's default for gloo
        assert result["store_timeout"] == 1800
    assert [result["sum"] for result in play("patience")] == [2.0, 2.0]


@pytest.mark.parametrize("scenario", ["killed", "left_early", "silent"])
def test_what_follows_from_a_peers_end_is_collateral(play, scenario):
    survivor = play(scenario)[0]
    assert survivor["type"] == "RuntimeError"
    assert survivor["collateral"], survivor["text"]


def test_what_user_code_makes_of_it_is_collateral_and_a_bug_of_its_own_is_not(play):
    survivor = play("killed")[0]
    assert survivor["handled"]
    assert not survivor["buggy"]
    assert survivor["new_group"]["type"] == "DistStoreError"
    assert survivor["new_group"]["collateral"]


def test_a_lost_store_is_collateral(play):
    survivor = play("store_gone")[1]
    assert survivor["collateral"], survivor["text"]
    assert survivor["new_group"]["type"] == "DistNetworkError"
    assert survivor["new_group"]["collateral"]


def test_a_failed_full_mesh_is_collateral(play):
    survivor = play("stale_keys")[0]
    assert "connectFullMesh failed" in survivor["text"]
    assert survivor["collateral"]


@pytest.mark.parametrize("scenario", ["peer_missing", "endpoint_gone", "endpoint_mute"])
def test_joining_is_bounded_and_says_where_it_failed(play, scenario):
    (result,) = play(scenario)
    assert result["join_error"]
    assert result["collateral"]
    assert 0.5 <= result["seconds"] < 1.5
    assert "of 2 could not join the process group at 127.0.0.1:" in result["text"]
    assert "GLOO_SOCKET_IFNAME='lo'" in result["text"]


def test_what_is_nobody_elses_fault_is_raised_as_it_is(play):
    (result,) = play("own_faults")
    assert "MPI" in result["no_mpi"]["text"]
    assert not result["no_mpi"]["collateral"]
    assert "torch sees no GPU" in result["no_gpu"]["text"]
    assert not result["no_gpu"]["collateral"]
    assert result["left_alone"]
    assert result["remote"]
    assert not result["duplicate_gpu"]
    assert not result["out_of_memory"]


def test_without_torch_nothing_is_collateral_and_torch_stays_away(python):
    program = """
import socket, sys
from raylaunch.worker.process_group import JoinError, is_collateral, leave
leave()
left, right = socket.socketpair()
right.close()
try:
    left.sendall(b"x")
except OSError as error:
    assert not is_collateral(error)
assert not is_collateral(ConnectionResetError(104, "Connection reset by peer"))
assert not is_collateral(RuntimeError("Connection closed by peer: my own words"))
class Hostile:
    def __str__(self): raise KeyError("no text")
assert not is_collateral(RuntimeError(Hostile()))
assert is_collateral(JoinError("nobody came"))
chain = ValueError(0)
for number in range(10_000):
    link = ValueError(number); link.__context__ = chain; chain = link
assert not is_collateral(chain)
loop = ValueError(); other = ValueError(); loop.__cause__ = other; other.__cause__ = loop
assert not is_collateral(loop)
assert not {"torch", "ray"} & set(sys.modules), "imported too early"
"""
    process = python(program)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
