"""What whoever started a run sees of its failure: the exit code, the table, the error file."""

from __future__ import annotations

import json
import re
import time

import pytest

from raylaunch.errors import ConfigError, Ending, EndKind, Failure, PlacementTimeout, RunFailedError
from raylaunch.torchrun.error_file import hand_on_error_file
from raylaunch.torchrun.failure import exit_code, failure_table
from raylaunch.torchrun.signals import Stopped


def failed(*failures: Failure, journal: str = "") -> RunFailedError:
    by_rank = {failure.rank: failure for failure in failures if failure.rank is not None}
    return RunFailedError("the run failed", failures[0], by_rank, "job", journal)


def failure(kind: EndKind, rank: int = 1, **ending) -> Failure:
    where = {"local_rank": rank, "node": "3f2a" * 14, "host": "10.0.0.7", "pid": 71, "generation": 2}
    return Failure(Ending(kind, **ending), rank=rank, phase="running", at=time.monotonic(), **where)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (failed(failure(EndKind.EXITED, exit_code=3)), 3),
        (failed(failure(EndKind.EXITED, exit_code=255)), 255),
        (failed(failure(EndKind.SIGNALED, signal=9)), 137),
        (failed(failure(EndKind.SIGNALED, signal=11)), 139),
        (failed(failure(EndKind.OUT_OF_MEMORY)), 137),
        (failed(failure(EndKind.RAISED, error_type="ValueError")), 1),
        (failed(failure(EndKind.NODE_LOST)), 1),
        (failed(failure(EndKind.CANNOT_WORK, message="no such file")), 1),
        (RunFailedError("nobody failed"), 1),
        (PlacementTimeout("no room"), 1),
        (ConfigError("--nnodes=0"), 2),
        (ConnectionError("no cluster"), 1),
        (KeyboardInterrupt(), 130),
        (Stopped(15), 143),
        (Stopped(1), 129),
    ],
)
def test_exit_code(error, code):
    assert exit_code(error) == code


def test_the_table_names_the_root_cause_first_with_all_that_is_known():
    cause = failure(
        EndKind.EXITED, 1, exit_code=3, traceback="Traceback (most recent call last):\n  boom\nValueError: x"
    )
    other = failure(EndKind.EXITED, 0, exit_code=1, collateral=True)
    table = failure_table("train.py", failed(cause, other, journal="/logs/job/journal.jsonl"))
    for wanted in (
        "train.py FAILED",
        "rank      : 1 (local_rank: 1)",
        "host      : 10.0.0.7",
        f"node      : {'3f2a' * 14}",
        "pid       : 71",
        "exitcode  : 3",
        "error_file: /logs/job/generation_2/1/error.json",
        "traceback:",
        "ValueError: x",
        "journal: /logs/job/journal.jsonl",
    ):
        assert wanted in table, table
    assert re.search(r"time +: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\n", table)
    assert table.index("Root cause:") < table.index("Other failures:")
    assert re.search(r"rank 0 .*exit code 1 +<- followed", table)


def test_the_table_names_signals_and_shows_what_a_rank_wrote_last():
    table = failure_table("train.py", failed(failure(EndKind.SIGNALED, signal=9, traceback="one\ntwo\n")))
    assert "exitcode  : -9 (SIGKILL)" in table
    assert "last lines of stderr:\n    one\n    two" in table


def test_the_table_of_a_thousand_ranks_can_be_read():
    others = [failure(EndKind.RAISED, rank, error_type="RuntimeError", collateral=True) for rank in range(2, 1000)]
    table = failure_table("train.py", failed(failure(EndKind.SIGNALED, signal=9), *others))
    assert len(table.splitlines()) < 60
    assert "and 982 more" in table


def test_the_table_of_a_run_without_room_is_its_message():
    table = failure_table("train.py", PlacementTimeout("no room for 9 x {CPU: 1}"))
    assert "no room for 9 x {CPU: 1}" in table
    assert "Root cause" not in table


def test_a_launcher_under_a_launcher_hands_the_root_cause_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "mine.json"))
    hand_on_error_file(failed(failure(EndKind.RAISED, error_type="ValueError", message="x", traceback="Trace")))
    found = json.loads((tmp_path / "mine.json").read_text())["message"]
    assert found["message"] == "ValueError: x"
    assert found["extraInfo"]["py_callstack"] == "Trace"
    assert found["errorCode"] == 1


def test_the_ranks_own_error_file_is_what_is_handed_on(tmp_path, monkeypatch):
    theirs = tmp_path / "job" / "generation_2" / "1" / "error.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps({"message": {"message": "from record", "extraInfo": {"timestamp": "7"}}}))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "mine.json"))
    error = failed(failure(EndKind.EXITED, exit_code=3), journal=str(tmp_path / "job" / "journal.jsonl"))
    hand_on_error_file(error)
    assert json.loads((tmp_path / "mine.json").read_text())["message"]["message"] == "from record"
