"""Which addresses the command connects to; what can't be one is refused before Ray is asked."""

from __future__ import annotations

import pytest

from raylaunch.cluster.connection import connected
from raylaunch.errors import ConfigError


def connect(address: str | None) -> None:
    with connected(address, standalone=False, cpus=1, min_nodes=1, say=lambda _: None):
        pass


@pytest.mark.parametrize("how", ["--address", "RAY_ADDRESS"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "must be HOST:PORT"),
        (":6379", "must be HOST:PORT"),
        ("head:", "must be HOST:PORT"),
        ("head:port", "must be HOST:PORT"),
        ("1.2.3.4:99999", "must be HOST:PORT"),
        ("ray://head:10001", "a Ray Client address can't carry a run"),
        ("http://head:8265", "the address of Ray's dashboard can't carry a run"),
    ],
)
def test_what_is_no_clusters_address_is_refused_by_name(monkeypatch, how, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address if how == "RAY_ADDRESS" else "")
    with pytest.raises(ConfigError) as refused:
        connect(address if how == "--address" else None)
    assert str(refused.value).startswith(f"{how}={address}: ")
    assert message in str(refused.value)


def test_a_cluster_that_is_not_there_is_named_at_once():
    with pytest.raises(ConnectionError, match=r"--address=\[::1\]:1: no Ray cluster answers there"):
        connect("[::1]:1")
