"""Which of the ranks' streams the console shows, and what it looks like there."""

from __future__ import annotations

import io
import sys

import pytest

from raylaunch.cluster.console import Console
from raylaunch.command import Logs, Streams
from raylaunch.coordinator.commands import Assignment

NONE, OUT, ERR, BOTH = Streams.NONE, Streams.OUT, Streams.ERR, Streams.BOTH


@pytest.mark.parametrize(
    ("logs", "plain", "teed"),
    [
        pytest.param(Logs(), [BOTH, NONE, NONE], [NONE, NONE, NONE], id="rank 0"),
        pytest.param(Logs(redirects=BOTH), [NONE, NONE, NONE], [NONE, NONE, NONE], id="files only"),
        pytest.param(Logs(redirects={0: ERR}), [OUT, NONE, NONE], [NONE, NONE, NONE], id="its stderr to the file only"),
        pytest.param(Logs(tee=BOTH), [NONE, NONE, NONE], [BOTH, BOTH, BOTH], id="all, with prefixes"),
        pytest.param(Logs(tee={1: OUT}), [BOTH, NONE, NONE], [NONE, OUT, NONE], id="one more, with a prefix"),
        pytest.param(Logs(local_ranks_filter=frozenset({1, 2})), [NONE, BOTH, BOTH], [NONE, NONE, NONE], id="these"),
        pytest.param(
            Logs(tee=BOTH, local_ranks_filter=frozenset({1})), [NONE, NONE, NONE], [NONE, BOTH, NONE], id="of all, one"
        ),
    ],
)
def test_what_the_console_shows(logs, plain, teed):
    assert [logs.plain(rank, rank) for rank in range(3)] == plain
    assert [logs.teed(rank) for rank in range(3)] == teed


def test_local_rank_0_of_another_node_is_not_rank_0():
    assert Logs().plain(4, 0) is NONE
    assert Logs(tee={0: BOTH}).teed(0) is BOTH


def assignment(rank, generation=1):
    return Assignment(
        generation=generation,
        rank=rank,
        local_rank=rank,
        node_rank=0,
        world_size=2,
        local_world_size=2,
        num_nodes=1,
        master_addr="127.0.0.1",
        master_port=1,
        restart_count=0,
    )


def console_for(logs, folder):
    return Console("trainer", logs, str(folder))


def test_lines_reach_the_drivers_own_streams_with_their_prefixes(tmp_path, capfdbinary):
    logs = Logs(tee=BOTH, prefix="[${role_name} ${rank}.${local_rank}] ", duplicate_stdout_filters=("loss",))
    console = console_for(logs, tmp_path)
    for rank in range(2):
        out, err = console.sources(assignment(rank))
        console.show([(out, b"loss %d\nother \xff\n" % rank), (err, b"oops\n")])
    console.close()
    shown = capfdbinary.readouterr()
    assert shown.out == b"".join(
        b"[trainer %d.%d] loss %d\n[trainer %d.%d] other \xff\n" % ((rank,) * 5) for rank in range(2)
    )
    assert shown.err == b"[trainer 0.0] oops\n[trainer 1.1] oops\n"
    assert (tmp_path / "filtered_stdout.log").read_bytes() == b"[trainer 0.0] loss 0\n[trainer 1.1] loss 1\n"


def test_a_notebooks_streams_take_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    console = console_for(Logs(), tmp_path)
    out, _ = console.sources(assignment(0))
    console.show([(out, b"caf\xc3\xa9 \xff\n")])
    assert sys.stdout.getvalue() == "café \ufffd\n"
    console.close()


def test_who_closes_its_end_loses_nothing_but_the_view(tmp_path, monkeypatch):
    class Broken:
        def write(self, _text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Broken())
    console = console_for(Logs(), tmp_path)
    out, _ = console.sources(assignment(0))
    console.show([(out, b"text\n")])
    assert console.shown[out] == 5
    console.close()


def test_another_agent_goes_on_where_the_last_one_was(tmp_path):
    console = console_for(Logs(redirects=ERR, prefix=""), tmp_path)
    (out,) = console.sources(assignment(0))
    console.show([(out, b"one\n"), (out, b"two\n")])
    assert console.shown[out] == 8
    assert console.sources(assignment(0, generation=2)) != [out]
    console.close()
