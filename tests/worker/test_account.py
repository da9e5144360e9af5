"""What a command left word of: torch's error file, or the end of its stderr."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from raylaunch.errors import Ending, EndKind
from raylaunch.worker.account import account_of

EXITED = Ending(EndKind.EXITED, exit_code=1)
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:1"


@pytest.fixture
def told(tmp_path):
    """The account of an ending, with this error file and this stderr."""

    def account(ending=EXITED, *, recorded=None, printed=None):
        if recorded is not None:
            (tmp_path / "error.json").write_text(recorded if isinstance(recorded, str) else json.dumps(recorded))
        if printed is not None:
            (tmp_path / "stderr.log").write_bytes(printed.encode() if isinstance(printed, str) else printed)
        return account_of(ending, str(tmp_path / "error.json"), str(tmp_path / "stderr.log"))

    return account


def record(message, trace="Traceback ..."):
    return {"message": {"message": message, "extraInfo": {"py_callstack": trace, "timestamp": "1"}}}


def test_what_torch_records_comes_first(told):
    ending = told(recorded=record("KeyError: 'loss'"), printed="something else\n")
    assert (ending.kind, ending.exit_code, ending.error_type) == (EndKind.EXITED, 1, "KeyError")
    assert ending.message == "KeyError: 'loss'"
    assert ending.traceback == "Traceback ..."
    assert not ending.collateral


def test_a_traceback_on_stderr_is_found_between_other_lines(told):
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\nmy.Error: no such\n  column\n'
    ending = told(printed=f"a warning\n{trace}")
    assert (ending.error_type, ending.message) == ("my.Error", "my.Error: no such\n  column")
    assert ending.traceback == trace
    assert ending.describe() == "exited with code 1 (my.Error: no such)"


def test_the_last_line_of_a_stderr_without_a_traceback(told):
    ending = told(Ending(EndKind.EXITED, exit_code=3), printed="reading\nthe data is not there\n\n")
    assert (ending.message, ending.exit_code) == ("the data is not there", 3)
    assert ending.traceback == "reading\nthe data is not there\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are of Python 3.11")
def test_a_group_of_exceptions_is_named_by_its_own_line(told):
    text = "raise __builtins__.ExceptionGroup('many', [ValueError('a'), TypeError('b')]) from KeyError('c')"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    ending = told(printed=f"a warning\n{done.stderr}")
    assert ending.error_type == "ExceptionGroup"
    assert ending.message.startswith("ExceptionGroup: many (2 sub-exceptions)\n")
    assert "TypeError: b" in ending.traceback
    assert told(printed=f"{done.stderr}\nTraceback (most recent call last):\nOSError: late\n").error_type == "OSError"


@pytest.mark.parametrize("how", ["recorded", "printed"])
@pytest.mark.parametrize(
    ("text", "collateral"),
    [
        (GLOO, True),
        ("torch.distributed.DistNetworkError: The client socket has timed out", True),
        ("torch.distributed.DistBackendError: ncclInvalidUsage", False),
        ("RuntimeError: Connection closed by peer", False),  # not torch's
    ],
)
def test_what_only_follows_a_peer_is_marked(told, how, text, collateral):
    if how == "recorded":
        assert told(recorded=record(text)).collateral is collateral
    else:
        trace = f'[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1\n[rank0]: {text}\n'
        assert told(printed=trace).collateral is collateral
        assert told(printed=trace.replace("[rank0]: ", "")).collateral is collateral


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"message": 5}', '{"message": {}}', '"text"', "{}"])
def test_rubbish_is_no_account(told, rubbish):
    assert told(recorded=rubbish).kind is EndKind.EXITED
    assert told(recorded=rubbish, printed=b"\xff\xfe\n").kind is EndKind.EXITED


def test_a_message_that_is_only_text_is_taken(told):
    assert told(recorded={"message": "out of luck"}).message == "out of luck"


def test_who_is_killed_says_nothing_and_who_crashes_does(told):
    for number in (9, 15):
        assert told(Ending(EndKind.SIGNALED, signal=number), printed="step 7\n").message == ""
    assert told(Ending(EndKind.SIGNALED, signal=6), printed="what(): no\n").message == "what(): no"
    assert told(Ending(EndKind.RETURNED), printed="fine\n") == Ending(EndKind.RETURNED)


def test_of_a_long_stderr_the_end_is_read(told):
    assert told(printed="x" * 5_000_000 + "\nthe end\n").message == "the end"
