"""Workers die while the group forms: before, in and just after joining the process group, and while they start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from harness import eventually
from steps import step_until

import raylaunch
from raylaunch import EndKind, Timeouts


class Trap:
    """An argument whose loading, in a promoted worker before it joins, calls `spring(where)`."""

    def __init__(self, spring, where: Path) -> None:
        self.spring, self.where = spring, where

    def __reduce__(self):
        return _load_trap, (self.spring, self.where)


def _load_trap(spring, where):
    context = raylaunch.get_context()
    if context.rank == 1 and context.generation == 1:
        spring(where)
    return "loaded"


def die(_where: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_killed(where: Path) -> None:
    where.touch()
    signal.pause()


def returns_generation(_trap, *, die_at_once: bool = False) -> int:
    context = raylaunch.get_context()
    if die_at_once and context.rank == 1 and context.generation == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    import torch.distributed as dist

    dist.barrier()
    return context.generation


def test_a_worker_that_dies_before_it_joins_is_one_more_recovery(one_node, start, gate):
    result = start(returns_generation, args=(Trap(die, gate("x")),), num_workers=2).result()
    assert list(result) == [2, 2]
    assert "rank 1" in result.recoveries[0].cause
    assert "killed by SIGKILL while forming" in result.recoveries[0].cause


def test_a_worker_that_dies_while_its_peer_waits_in_init_process_group_is_one_more_recovery(one_node, start, gate):
    run = start(returns_generation, args=(Trap(wait_to_be_killed, gate("waits")),), num_workers=2)
    eventually(gate("waits").exists, "rank 1 is about to join")
    one_node.kill_worker(run.id, 1)
    result = run.result()
    assert list(result) == [2, 2]
    assert "rank 1" in result.recoveries[0].cause


@pytest.mark.slow
def test_a_worker_that_dies_just_after_joining_is_one_more_recovery(one_node, start):
    result = start(returns_generation, args=(None,), kwargs={"die_at_once": True}, num_workers=2).result()
    assert list(result) == [2, 2]
    assert "rank 1" in result.recoveries[0].cause
    assert "killed by SIGKILL" in result.recoveries[0].cause


@pytest.mark.slow
def test_a_worker_that_never_joins_is_a_timeout_that_names_phase_and_rank(one_node, start, gate):
    trap = Trap(wait_to_be_killed, gate("waits"))
    run = start(returns_generation, args=(trap,), num_workers=2, max_restarts=0, timeouts=Timeouts(process_group=2))
    error = run.error()
    assert error.root_cause.phase == "forming"
    assert "rank 1 had not joined" in str(error)


def test_a_worker_that_dies_while_it_starts_is_replaced(one_node, start, gate, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dies_once.py").write_text(
        "import os, pathlib\n"
        f"flag = pathlib.Path({str(gate('died'))!r})\n"
        "try:\n"
        "    flag.touch(exist_ok=False)\n"
        "except FileExistsError:\n"
        "    pass\n"
        "else:\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    result = start(returns_generation, args=(None,), num_workers=2, preload=("dies_once", "torch")).result()
    assert list(result) == [1, 1]
    assert result.restarts == 1


@pytest.mark.slow
def test_workers_that_die_at_every_start_use_up_the_budget(one_node, start, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dies_always.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    error = start(returns_generation, args=(None,), num_workers=1, preload=("dies_always",), max_restarts=1).error()
    assert "restart is used up" in str(error)
    assert error.root_cause.ending.kind in (EndKind.SIGNALED, EndKind.KILLED)
    assert error.root_cause.phase == "starting"


def test_a_stopped_peer_does_not_hold_up_the_teardown(one_node, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=2)
    run.running()
    one_node.pause_worker(run.id, 0)
    one_node.kill_worker(run.id, 1)
    run.running(generation=2)
    gate("enough").touch()
    result = run.result()
    assert "rank 1" in result.recoveries[0].cause  # the `start` fixture sees that the stopped process is gone


def ignores_sigterm_and_hangs(started: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if raylaunch.get_context().generation == 1:
        started.touch()
        while True:
            signal.pause()


@pytest.mark.slow
def test_a_worker_that_ignores_sigterm_is_gone_at_the_next_generation(one_node, start, gate):
    run = start(ignores_sigterm_and_hangs, args=(gate("started"),), num_workers=2)
    eventually(gate("started").exists, "the ranks hang")
    run.running()
    one_node.kill_worker(run.id, 0)
    assert len(run.result()) == 2


def returns_early(rank: int) -> None:
    import torch.distributed as dist

    if raylaunch.get_context().rank != rank:
        dist.barrier()


@pytest.mark.parametrize("early", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_rank_returns_early_its_blocked_peers_fail_promptly_and_the_cause_names_it(one_node, start, early):
    run = start(returns_early, args=(early,), num_workers=2, max_restarts=0)
    error = run.error()
    assert f"rank {early} had already returned and left the group" in str(error)
    assert error.root_cause.rank == 1 - early
    (returned,), (failed,) = run.events("WorkerReturned"), run.events("WorkerFailed")
    assert failed["at"] - returned["at"] < 5
