"""Workers die, in every way they can; the group re-forms, and the cause that is told is the injected one."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import actor_pids, eventually
from steps import any_rank

import raylaunch
from raylaunch import EndKind, RunFailedError


def train_until(gate: Path, harm: str = "") -> tuple[int, int, int]:
    """Steps until the gate file is there; rank 1 of the first generation does harm to itself at step 3."""
    context = raylaunch.get_context()
    step = 0
    while True:
        step += 1
        if step == 3 and context.rank == 1 and context.generation == 1 and harm:
            HARM[harm]()
        if any_rank(gate.exists() or bool(harm and context.generation > 1)):  # all ranks leave at the same step
            return context.rank, context.world_size, context.generation
        time.sleep(0.01)


class NeedsArguments(Exception):
    def __init__(self, code, *, reason):
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class HoldsALock(Exception):
    def __init__(self):
        import threading

        super().__init__("holds a lock")
        self.lock = threading.Lock()


def raise_value_error():
    raise ValueError("no such column")


def raise_with_required_arguments():
    raise NeedsArguments(5, reason="because")


def raise_unpicklable():
    raise HoldsALock


def raise_keyboard_interrupt():
    raise KeyboardInterrupt


HARM = {
    "raise": raise_value_error,
    "required arguments": raise_with_required_arguments,
    "unpicklable": raise_unpicklable,
    "KeyboardInterrupt": raise_keyboard_interrupt,
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(7)": lambda: os._exit(7),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: ctypes.string_at(0),
}


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("raise", "raised ValueError: no such column"),
        pytest.param("required arguments", "NeedsArguments: 5: because", marks=pytest.mark.slow),
        pytest.param("unpicklable", "HoldsALock: holds a lock", marks=pytest.mark.slow),
        pytest.param("KeyboardInterrupt", "raised KeyboardInterrupt", marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", "exited with code 3", marks=pytest.mark.slow),
        ("os._exit(7)", "exited with code 7"),
        ("SIGKILL", "killed by SIGKILL"),
        pytest.param("SIGTERM", "killed by SIGTERM", marks=pytest.mark.slow),
        pytest.param("SIGSEGV", "killed by SIGSEGV", marks=pytest.mark.slow),
    ],
)
def test_whichever_way_a_rank_ends_the_group_re_forms_and_the_true_cause_is_told(one_node, start, gate, harm, told):
    run = start(train_until, args=(gate("open"), harm), num_workers=2)
    result = run.result()
    assert list(result) == [(0, 2, 2), (1, 2, 2)]
    assert result.restarts == 1
    (recovery,) = result.recoveries
    assert told in recovery.cause
    assert "rank 1" in recovery.cause
    (pid,) = {event["pid"] for event in run.events("WorkerStarted") if f"pid {event['pid']})" in recovery.cause}
    assert pid


def test_the_error_of_a_failed_run_is_the_users_own_and_says_where_it_came_from(one_node, start, gate):
    run = start(train_until, args=(gate("open"), "raise"), num_workers=2, max_restarts=0)
    error = run.error()
    assert isinstance(error, ValueError)
    assert isinstance(error, RunFailedError)
    assert isinstance(error.__cause__, ValueError)
    assert str(error.__cause__) == "no such column"
    assert error.root_cause.rank == 1
    assert error.root_cause.ending.kind is EndKind.RAISED
    assert error.root_cause.node == one_node.nodes[0].node_id
    assert "in raise_value_error" in str(error)  # the remote traceback
    assert "raylaunch/worker" not in str(error)  # ... without the launcher's own frames
    assert "max_restarts=0" in str(error)
    assert str(run.journal) in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ValueError)
    assert str(again) == str(error)


def test_an_exception_with_required_arguments_still_becomes_a_readable_error(one_node, start, gate):
    error = start(train_until, args=(gate("open"), "required arguments"), num_workers=2, max_restarts=0).error()
    assert isinstance(error, RunFailedError)
    assert "5: because" in str(error)
    assert pickle.loads(pickle.dumps(error)).root_cause == error.root_cause


def test_a_killed_rank_without_restarts_left_is_a_failure_with_its_signal(one_node, start, gate):
    run = start(train_until, args=(gate("open"), "SIGKILL"), num_workers=2, max_restarts=0)
    error = run.error()
    assert error.root_cause.ending.kind is EndKind.SIGNALED
    assert error.root_cause.ending.signal == signal.SIGKILL
    assert error.root_cause.rank == 1


def exits_with_success():
    sys.exit(0)


def test_sys_exit_0_is_success_with_the_value_none(one_node, start):
    assert list(start(exits_with_success, num_workers=2).result()) == [None, None]


def raises_everywhere():
    raise LookupError("the data is not there")


@pytest.mark.slow
def test_the_same_exception_on_all_ranks_is_one_failure(one_node, start):
    error = start(raises_everywhere, num_workers=3, max_restarts=1).error()
    assert isinstance(error, LookupError)
    assert error.root_cause.generation == 2  # one was charged for the first generation, not three


@pytest.mark.slow
def test_what_only_follows_a_peers_end_is_never_fatal_whatever_no_retry_names(one_node, start, gate):
    run = start(train_until, args=(gate("open"), "SIGKILL"), num_workers=2, no_retry=(RuntimeError,))
    result = run.result()
    assert result.restarts == 1
    assert "killed by SIGKILL" in result.recoveries[0].cause


def test_an_exception_named_in_no_retry_ends_the_run_at_once(one_node, start):
    error = start(raises_everywhere, num_workers=2, max_restarts=5, no_retry=(LookupError,)).error()
    assert isinstance(error, LookupError)
    assert error.root_cause.generation == 1
    assert "no_retry" in str(error)


def test_with_a_warm_spare_a_killed_rank_is_replaced_by_it(one_node, start, gate):
    run = start(train_until, args=(gate("open"),), num_workers=2, spares="auto")
    before = run.running(spares=2)
    ranks = {member.process.pid for member in before.members.values()}
    spares = {event["pid"] for event in run.events("WorkerStarted")} - ranks
    assert len(spares) == 2
    for pid in spares:  # warm, and without a hand on a GPU
        assert "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        assert not [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd).startswith("/dev/nvidia")]
    one_node.kill_worker(run.id, 1)
    after = run.running(generation=2)
    gate("open").touch()
    result = run.result()
    assert list(result) == [(0, 2, 2), (1, 2, 2)]
    assert "killed by SIGKILL" in result.recoveries[0].cause
    # Every rank runs in a new process, and in one that was there before the kill.
    assert not {m.process for m in before.members.values()} & {m.process for m in after.members.values()}
    kill = run.events("WorkerLost")[0]
    started = {event["pid"]: event["at"] for event in run.events("WorkerStarted")}
    assert all(started[m.process.pid] < kill["at"] for m in after.members.values())


@pytest.mark.slow
def test_a_second_kill_right_after_the_recovery_is_one_more_recovery(one_node, start, gate):
    run = start(train_until, args=(gate("open"),), num_workers=2)
    run.running()
    one_node.kill_worker(run.id, 0)
    run.running(generation=2)
    one_node.kill_worker(run.id, 1)
    run.running(generation=3)
    gate("open").touch()
    result = run.result()
    assert result.restarts == 2
    assert ["rank 0" in result.recoveries[0].cause, "rank 1" in result.recoveries[1].cause] == [True, True]


@pytest.mark.slow
def test_two_ranks_killed_in_the_same_moment_are_one_failure(one_node, start, gate):
    run = start(train_until, args=(gate("open"),), num_workers=3, max_restarts=1)
    members = run.running().members
    for rank in (1, 2):
        os.kill(members[rank].process.pid, signal.SIGKILL)
    run.running(generation=2)
    gate("open").touch()
    result = run.result()
    assert result.restarts == 1
    assert "killed by SIGKILL" in result.recoveries[0].cause


@pytest.mark.slow
def test_a_dead_node_agent_is_replaced_and_costs_the_training_nothing(one_node, start, gate):
    run = start(train_until, args=(gate("open"),), num_workers=2)
    run.running()
    (node,) = one_node.nodes
    eventually(lambda: len(actor_pids(node, "NodeAgent")) == 1, "an earlier run's agent is gone")
    (dead,) = actor_pids(node, "NodeAgent")
    os.kill(dead, signal.SIGKILL)
    one_node.kill_worker(run.id, 1)  # while nobody watches: Ray's word is enough
    run.running(generation=2)
    eventually(lambda: set(actor_pids(node, "NodeAgent")) - {dead}, "another agent is there")
    one_node.kill_worker(run.id, 0)
    run.running(generation=3)
    gate("open").touch()
    result = run.result()
    assert result.restarts == 2
    assert ["rank 1" in result.recoveries[0].cause, "rank 0" in result.recoveries[1].cause] == [True, True]


def leaves_slowly(raises: bool) -> int:
    """Rank 1 destroys the group as scripts do at their end, and then takes its time (logs to upload, say)."""
    import torch.distributed as dist

    context = raylaunch.get_context()
    if context.generation == 1 and context.rank == 1:
        try:
            if raises:
                raise ValueError("no such column")
        finally:
            dist.destroy_process_group()
            time.sleep(600)
    while context.generation == 1:
        any_rank(mine=False)
    return context.generation


@pytest.mark.parametrize(
    ("raises", "told"),
    [(True, "raised ValueError: no such column"), (False, "destroyed its process group and went on in train_fn")],
)
def test_a_rank_that_has_left_the_group_and_still_cleans_up_is_the_cause(one_node, start, raises, told):
    run = start(leaves_slowly, args=(raises,), num_workers=2)
    (recovery,) = run.result().recoveries
    assert "rank 1" in recovery.cause
    assert told in recovery.cause
