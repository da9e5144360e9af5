"""What `torchrun --rdzv-backend=ray` is told: honoured, accepted without meaning, or refused with a clear error."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from raylaunch.coordinator.agent_messages import Settings
from raylaunch.torchrun.backend.conf import Conf, read_conf


def conf(endpoint: str = "auto", run_id: str = "job", **config: Any) -> Conf:
    """As torch hands it over: with `timeout`, which LaunchConfig always sets, and strings from the command line."""
    return read_conf(RendezvousParameters("ray", endpoint, run_id, 1, 4, timeout=900, **config))


def test_the_defaults() -> None:
    assert conf() == Conf("job", "auto", None, Settings(1, 4, 5.0, 1.0, 10.0), 600.0, 30.0)


def test_what_is_honoured() -> None:
    settings = {
        "join_timeout": "60",
        "last_call_timeout": "0",
        "close_timeout": "1.5",
        "keep_alive_interval": 2,
        "keep_alive_max_attempt": "3",
    }
    told = conf("10.0.0.1:6379", **settings)
    assert told == Conf("job", "10.0.0.1:6379", None, Settings(1, 4, 0.0, 2.0, 6.0), 60.0, 1.5)


def test_what_has_no_meaning_here_is_accepted() -> None:
    assert conf(is_host="1", store_type="file", read_timeout="60", heartbeat_timeout="5") == conf()


def test_without_an_endpoint_ray_finds_its_cluster() -> None:
    assert conf(" ").address == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_id": ""}, "--rdzv-id: must not be empty"),
        ({"endpoint": "ray://head:10001"}, "a Ray Client address can't be used"),
        ({"last_call": "5"}, "--rdzv-conf: no such key: last_call; there are close_timeout, "),
        ({"join_timeout": "0"}, "--rdzv-conf join_timeout=0: must be a number, more than 0"),
        ({"last_call_timeout": "-1"}, "--rdzv-conf last_call_timeout=-1: must be a number, 0 or more"),
        ({"close_timeout": "soon"}, "--rdzv-conf close_timeout=soon: must be a number, more than 0"),
        ({"keep_alive_interval": "inf"}, "--rdzv-conf keep_alive_interval=inf: must be a number, more than 0"),
        ({"keep_alive_max_attempt": "1"}, "--rdzv-conf keep_alive_max_attempt=1: must be a number, 2 or more"),
    ],
)
def test_what_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        conf(**options)
    assert message in str(raised.value)
