"""The exception tree: a run's error is also an instance of its cause's type where it can be, and always pickles."""

from __future__ import annotations

import pickle
import subprocess

import pytest

from raylaunch.errors import (
    MESSAGE_LIMIT,
    TRACEBACK_LIMIT,
    Ending,
    EndKind,
    Failure,
    PlacementTimeout,
    RunFailedError,
    ending_of,
    run_failed,
)


class Needy(Exception):
    def __init__(self, one, *, two):
        super().__init__(one)
        self.two = two


class PickyNew(Exception):
    def __new__(cls, argument):
        return super().__new__(cls, argument)

    def __init__(self, argument):
        super().__init__(argument)


class Slotted(ValueError):
    __slots__ = ("extra",)


class Final(Exception):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses")


FAILURE = Failure(Ending(EndKind.RAISED, error_type="X", traceback="Traceback: ..."), rank=2, node="ab" * 20, pid=7)


def failed(cause):
    return run_failed(RunFailedError("it failed", FAILURE, {2: FAILURE}, "r1", "/j"), cause)


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("no"),
        UnicodeDecodeError("utf8", b"x", 0, 1, "bad"),
        subprocess.CalledProcessError(3, ["x"]),
        FileNotFoundError(2, "no such file", "name"),
        KeyError("k"),
        ImportError("no", name="x"),
        Needy(1, two=2),
        PickyNew(1),
        Slotted("s"),
        StopAsyncIteration.__base__("plain"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_the_error_is_also_of_the_causes_type_and_pickles(cause):
    error = failed(cause)
    assert isinstance(error, type(cause))
    assert isinstance(error, RunFailedError)
    assert error.__cause__ is cause
    assert "it failed" in str(error)
    assert "Traceback: ..." in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, RunFailedError)
    assert str(again) == str(error)
    assert again.failures == {2: FAILURE}


def test_the_errors_last_lines_name_the_root_cause_however_long_the_traceback_is():
    trace = "".join(f"  File {line}\n" for line in range(100))
    failure = Failure(
        Ending(EndKind.RAISED, error_type="ValueError", message="no column", traceback=trace),
        rank=2,
        node="3f2a" * 10,
        pid=71,
        phase="running",
    )
    lines = str(RunFailedError("it failed", failure, {2: failure}, "r1", "/j")).splitlines()
    assert lines[0] == "it failed"
    assert lines[-3:] == [
        "root cause: rank 2 (node 3f2a3f2a, pid 71) raised ValueError: no column while running",
        "",
        "journal: /j",
    ]


@pytest.mark.parametrize("cause", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), StopAsyncIteration(), Final()])
def test_control_flow_and_types_that_can_not_be_bases_fall_back_to_the_plain_error(cause):
    error = failed(cause)
    assert type(error) is RunFailedError
    assert error.__cause__ is cause
    assert pickle.loads(pickle.dumps(error)).run_id == "r1"


@pytest.mark.parametrize("kind", [PlacementTimeout, RunFailedError])
def test_every_kind_of_failed_run_pickles(kind):
    error = kind("no room", None, {}, "r1", "/j")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_a_placement_timeout_is_a_timeout_error():
    with pytest.raises(TimeoutError, match="no room"):
        raise PlacementTimeout("no room")


def test_a_cause_that_does_not_pickle_is_left_behind():
    cause = ValueError("holds a lock")
    cause.lock = __import__("threading").Lock()
    again = pickle.loads(pickle.dumps(failed(cause)))
    assert again.__cause__ is None
    assert "it failed" in str(again)


def test_an_ending_is_bounded_whatever_the_exception_says():
    ending = ending_of(ValueError("x" * 10**6))
    assert len(ending.message) <= MESSAGE_LIMIT + 50
    assert len(ending.traceback) <= TRACEBACK_LIMIT + 50
    assert ending.message.startswith("xxx")


def test_an_exception_whose_text_raises_still_has_an_ending():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    ending = ending_of(Mute())
    assert ending.kind is EndKind.RAISED
    assert "can't be shown" in ending.message


@pytest.mark.parametrize(
    ("code", "kind", "number"),
    [(0, "returned", None), (None, "returned", None), (3, "exited", 3), ("text", "exited", 1)],
)
def test_sys_exit_is_an_ending_by_its_code(code, kind, number):
    ending = ending_of(SystemExit(code))
    assert (ending.kind.value, ending.exit_code) == (kind, number)


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(EndKind.SIGNALED, signal=9), "killed by SIGKILL"),
        (Ending(EndKind.SIGNALED, signal=99), "killed by signal 99"),
        (Ending(EndKind.EXITED, exit_code=3), "exited with code 3"),
        (Ending(EndKind.RAISED, error_type="ValueError", message="no\nmore"), "raised ValueError: no"),
        (
            Ending(EndKind.RAISED, error_type="RuntimeError", message="[a/b.cc:5] gone", collateral=True),
            "lost a peer (RuntimeError: gone)",
        ),
    ],
)
def test_an_ending_reads_as_a_clause(ending, text):
    assert ending.describe() == text


def test_a_failure_says_who_where_and_how():
    failure = Failure(Ending(EndKind.SIGNALED, signal=9), rank=2, node="3f2a" * 10, pid=71, phase="running")
    assert failure.describe() == "rank 2 (node 3f2a3f2a, pid 71) killed by SIGKILL while running"
