"""The same line with one --rdzv-id, started several times as under Slurm: one launches, the others follow its run."""

from __future__ import annotations

import signal

import pytest
from harness import eventually

LINE = "LOGS --rdzv-id=same-{} train.py"
WAITS = 'say("up"); wait_for("enough"); sys.exit(int((OUT / "enough").read_text()))'


def test_the_others_follow_the_first_and_leave_with_its_code(one_node, command):
    first = command(LINE.format("a"), WAITS)
    first.wait_for("up")
    second = command(LINE.format("a"), WAITS)
    eventually(lambda: "this one follows it" in second.stderr, "the second follows")
    (first.out / "enough").write_text("5")
    assert first.exit_code() == 5, first.stderr
    assert second.exit_code() == 5, second.stderr
    assert "its launcher has left with 5" in second.stderr
    assert second.stdout == ""
    third = command(LINE.format("a"), WAITS)  # a new job of the same name
    assert third.exit_code() == 5
    assert "this one follows it" not in third.stderr


def test_a_follower_that_is_stopped_leaves_the_run_alone(one_node, command):
    first = command(LINE.format("b"), WAITS)
    first.wait_for("up")
    second = command(LINE.format("b"), WAITS)
    eventually(lambda: "this one follows it" in second.stderr, "the second follows")
    second.signal(signal.SIGTERM)
    assert second.exit_code() == 143
    (first.out / "enough").write_text("0")
    assert first.exit_code() == 0, first.stderr


@pytest.mark.slow
def test_followers_of_a_launcher_that_was_killed_fail(one_node, command):
    first = command(LINE.format("c"), WAITS)
    first.wait_for("up")
    second = command(LINE.format("c"), WAITS)
    eventually(lambda: "this one follows it" in second.stderr, "the second follows")
    first.signal(signal.SIGKILL)
    assert first.exit_code() == -signal.SIGKILL
    assert second.exit_code() == 1
    assert "has ended without saying how" in second.stderr
