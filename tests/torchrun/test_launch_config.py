"""The launcher API's part that needs no cluster: what a LaunchConfig asks for, and torch's errors made of ours."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher import api as torch_api

import raylaunch.torchrun
from raylaunch.command import Command, Entry, Streams
from raylaunch.errors import ConfigError, Ending, EndKind, Failure, RunFailedError
from raylaunch.torchrun import LaunchConfig
from raylaunch.torchrun.launcher import child_failed_error, plan_of


def train():
    pass


def config(**changes) -> LaunchConfig:
    return LaunchConfig(**{"min_nodes": 1, "max_nodes": 2, "nproc_per_node": 4, **changes})


def test_it_has_torchs_names():
    assert raylaunch.torchrun.ChildFailedError is ChildFailedError
    assert raylaunch.torchrun.record is record
    for name in raylaunch.torchrun.__all__:
        assert getattr(raylaunch.torchrun, name) is not None


def test_a_config_has_all_of_torchs_fields_with_their_defaults():
    ours = {field.name: field for field in dataclasses.fields(LaunchConfig)}
    for field in dataclasses.fields(torch_api.LaunchConfig):
        assert ours[field.name].default == field.default, field.name
    assert isinstance(config(), torch_api.LaunchConfig)


def test_torchs_own_config_asks_for_the_same():
    theirs = torch_api.LaunchConfig(min_nodes=2, max_nodes=4, nproc_per_node=8, run_id="job", rdzv_backend="etcd")
    asked = plan_of(theirs, train, ())
    assert (asked.bounds, asked.wish.per_node, asked.wish.use_gpu) == ((2, 4), 8, None)
    assert asked.run_id == "job"
    assert asked.max_restarts == 3  # LaunchConfig's default, not the command's
    assert asked.timeouts.placement == 900
    assert asked.timeouts.stop == 30
    assert asked.log_dir is None  # torch makes a folder of its own where nobody names one; it is left alone
    assert asked.signals == (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def test_the_fields_mean_what_they_mean_to_torch(tmp_path):
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL, tee={0: Std.OUT}, local_ranks_filter={0, 1})
    asked = plan_of(
        config(
            logs_specs=specs,
            role="trainer",
            max_restarts=1,
            rdzv_configs={"join_timeout": "60", "last_call_timeout": 2, "is_host": "1"},
            log_line_prefix_template="${rank}|",
            duplicate_stdout_filters=["a"],
            signals_to_handle="SIGTERM",
            shutdown_timeout=3,
            virtual_local_rank=True,
            use_gpu=False,
            resources_per_worker={"CPU": 2},
            spares=0,
        ),
        "prog",
        ("x",),
    )
    assert asked.logs.redirects == Streams.BOTH
    assert asked.logs.tee == {0: Streams.OUT}
    assert asked.logs.local_ranks_filter == {0, 1}
    assert asked.logs.prefix == "${rank}|"
    assert asked.logs.duplicate_stdout_filters == ("a",)
    assert asked.log_dir == str(tmp_path)
    assert asked.command == Command(Entry.PROGRAM, "prog", ("x",), cwd=os.getcwd(), role="trainer")
    assert (asked.timeouts.placement, asked.timeouts.last_call, asked.timeouts.stop) == (60, 2, 3)
    assert asked.signals == (signal.SIGTERM,)
    assert asked.wish.resources == {"CPU": 2}
    assert asked.virtual_local_rank
    assert (asked.spares, asked.max_restarts) == (0, 1)


@pytest.mark.parametrize(
    ("args", "entry", "target", "rest"),
    [
        (("-u", "train.py", "x"), Entry.SCRIPT, "train.py", ("x",)),
        (("train.py",), Entry.SCRIPT, "train.py", ()),
        (("-u", "-m", "pkg.train", 1), Entry.MODULE, "pkg.train", ("1",)),
        (("-X", "dev", "train.py"), Entry.PROGRAM, sys.executable, ("-X", "dev", "train.py")),
    ],
)
def test_this_python_as_a_program_is_forked_where_that_is_the_same(args, entry, target, rest):
    command = plan_of(config(), sys.executable, args).command
    assert (command.entry, command.target, command.args) == (entry, target, rest)


@pytest.mark.parametrize(
    "changes", [{"min_nodes": 0}, {"min_nodes": 3}, {"nproc_per_node": 0}, {"nproc_per_node": "2"}, {"min_nodes": None}]
)
def test_a_config_that_cannot_work_is_refused(changes):
    with pytest.raises(ConfigError, match="must be whole numbers"):
        plan_of(config(**changes), train, ())


def test_an_entrypoint_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="entrypoint=None: must be a function"):
        plan_of(config(), None, ())


# -- torch's error ---------------------------------------------------------------------------------------------------


def failure(rank: int, ending: Ending, at: float) -> Failure:
    return Failure(ending, rank, rank % 2, "3f2a" * 14, "10.0.0.7", 70 + rank, 1, "running", at)


@pytest.fixture
def error(tmp_path) -> RunFailedError:
    now = time.monotonic()
    cause = failure(
        3, Ending(EndKind.RAISED, error_type="ValueError", message="boom", traceback="Traceback: boom"), now
    )
    others = [failure(0, Ending(EndKind.SIGNALED, signal=9), now - 5), failure(1, Ending(EndKind.EXITED, 7), now + 1)]
    failures = {one.rank: one for one in (*others, cause)}
    return RunFailedError("failed", cause, failures, "job", str(tmp_path / "job" / "journal.jsonl"))


def test_the_root_cause_is_torchs_first_failure(error):
    raised = child_failed_error("train", error)
    assert raised.name == "train"
    rank, first = raised.get_first_failure()
    assert (rank, first.local_rank, first.pid, first.exitcode) == (3, 1, 73, 1)
    assert first.message["message"] == "ValueError: boom"
    assert {rank: one.exitcode for rank, one in raised.failures.items()} == {3: 1, 0: -9, 1: 7}
    text = str(raised)
    assert text.index("rank      : 0") < text.index("Root Cause") < text.index("rank      : 3")
    assert "Traceback: boom" in text


def test_record_in_the_launcher_copies_the_root_causes_error_file(error, tmp_path, monkeypatch):
    mine = tmp_path / "mine.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(mine))

    @record
    def main():
        raise child_failed_error("train", error)

    with pytest.raises(ChildFailedError):
        main()
    said = json.loads(mine.read_text())["message"]
    assert said["message"] == "ValueError: boom"
    assert said["errorCode"] == 1


def test_a_run_in_which_no_worker_failed_has_no_child_failed_error():
    assert child_failed_error("train", RunFailedError("nobody")) is None
