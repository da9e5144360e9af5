"""isolation="process": functions as processes of their own, forked from one on each node that has imported torch."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import actor_pids, eventually

import raylaunch
from raylaunch import ConfigError, EndKind


def total() -> int:
    """All ranks together."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones.item())


def step_until(path: str, up: str) -> None:
    """In lockstep until a file is there."""
    total()
    Path(f"{up}-{raylaunch.get_context().generation}-{dist.get_rank()}-{os.getpid()}").touch()
    while True:
        enough = torch.tensor([float(os.path.exists(path))])
        dist.all_reduce(enough)
        if enough.item():
            return
        time.sleep(0.01)


def pids(folder: Path, generation: int, ranks: int = 2) -> list[int]:
    """Wait until so many ranks of a generation step; their pids by rank."""

    def found():
        return sorted(path.name.split("-")[2:] for path in folder.glob(f"up-{generation}-*"))

    eventually(lambda: len(found()) == ranks, f"{ranks} ranks of generation {generation} are up")
    return [int(pid) for _, pid in found()]


def test_values_come_by_rank_and_the_context_is_the_ranks_own(one_node, start):
    def train(greeting, *, name):
        context = raylaunch.get_context()
        assert context.is_current()
        return greeting + name, total(), context, os.getpid(), os.getppid(), torch.ones(3)

    run = start(train, num_workers=2, isolation="process", args=("hello ",), kwargs={"name": "you"})
    result = run.result()
    for rank, (text, ranks, context, pid, _, tensor) in enumerate(result):
        assert (text, ranks, tensor.tolist()) == ("hello you", 2, [1.0] * 3)
        assert (context.rank, context.world_size, context.run_id, context.generation) == (rank, 2, run.id, 1)
        assert (context.device, context.max_restarts) == ("cpu", 3)
        assert pid != os.getpid()
    assert len({forker for *_, forker, _ in result}) == 1  # one import for both


def test_a_rank_that_was_replaced_is_not_current_and_what_a_rank_starts_knows_where_it_is(one_node, start):
    ask = "import raylaunch; c = raylaunch.get_context(); print(c.rank, c.world_size, c.is_current())"

    def train():
        def say(**env):
            line = [sys.executable, "-c", ask]
            return subprocess.run(line, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout

        return say(), say(RAYLAUNCH_GENERATION="0"), say(RAYLAUNCH_AGENT="/nowhere")

    result = start(train, num_workers=2, isolation="process").result()
    for rank, said in enumerate(result):
        assert said == (f"{rank} 2 True\n", f"{rank} 2 False\n", f"{rank} 2 False\n")


def test_there_is_no_ray_inside_until_somebody_imports_it(one_node, start):
    def look():
        import sys

        return "ray" in sys.modules

    def use():
        import ray.cloudpickle

        return ray.cloudpickle.loads(ray.cloudpickle.dumps(lambda: "works"))()

    assert list(start(look, num_workers=1, isolation="process").result()) == [False]
    assert list(start(use, num_workers=1, isolation="process").result()) == ["works"]


def test_a_killed_rank_re_forms_at_once_without_spares(one_node, start, tmp_path):
    go = str(tmp_path / "go")
    run = start(step_until, args=(go, str(tmp_path / "up")), num_workers=2, isolation="process", spares=0)
    first = pids(tmp_path, 1)
    one_node.kill_worker(run, 1)
    second = pids(tmp_path, 2)
    assert not set(first) & set(second)
    Path(go).touch()
    result = run.result()
    assert (result.restarts, result.generation) == (1, 2)
    assert f"pid {first[1]}) killed by SIGKILL" in result.recoveries[0].cause


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: sys.exit(7), "exited with code 7"),
        (lambda: os._exit(9), "exited with code 9"),
        (lambda: os._exit(0), "exited with code 0 (its process left before train_fn had returned)"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
        (lambda: os.abort(), "killed by SIGABRT"),
        (lambda: atexit.register(os._exit, 5), "exited with code 5"),
    ],
    ids=["exit", "os._exit", "os._exit 0", "SIGTERM", "abort", "at exit"],
)
def test_ends_are_told_exactly(one_node, start, end, told):
    def train():
        if dist.get_rank() == 1:
            end()
            return
        total()

    cause = start(train, num_workers=2, isolation="process", max_restarts=0).error().root_cause
    assert (cause.rank, cause.ending.describe()) == (1, told)


def test_an_exception_is_the_users_own_and_its_traceback_begins_with_the_users_code(one_node, start, tmp_path):
    class DataError(Exception):
        def __init__(self, table, column):
            super().__init__(f"no {column} in {table}")
            self.column = column

    def train():
        total()
        if dist.get_rank() == 1:
            raise DataError("prices", "euros")
        total()

    run = start(train, num_workers=2, isolation="process", no_retry=(DataError,))
    error = run.error()
    assert error.root_cause.rank == 1
    assert error.root_cause.ending.message == "no euros in prices"
    assert error.__cause__.column == "euros"
    assert "function_rank" not in error.root_cause.ending.traceback
    stderr = (run.journal.parent / "generation_1" / "1" / "stderr.log").read_text()
    assert "DataError: no euros in prices" in stderr


def test_what_can_not_be_sent_is_said(one_node, start):
    error = start(lambda: (x for x in ()), num_workers=1, isolation="process").error()
    assert "return value can't be sent to the driver" in str(error)
    assert error.root_cause.ending.kind is EndKind.CANNOT_WORK
    import ray

    with pytest.raises(ConfigError, match="ObjectRef"):
        raylaunch.run(print, args=(ray.put(1),), isolation="process")
    with pytest.raises(ConfigError, match="isolation='thread': must be 'actor' or 'process'"):
        raylaunch.run(print, isolation="thread")


def test_a_rank_that_returns_while_others_need_it_is_the_cause_of_their_failure(one_node, start):
    def train():
        if dist.get_rank():
            total()

    error = start(train, num_workers=2, isolation="process", max_restarts=0).error()
    assert "rank 0 had already returned and left the group" in str(error)


def test_a_launcher_holds_such_processes_too(one_node, tmp_path):
    with raylaunch.Launcher(num_workers=2, isolation="process", log_dir=str(tmp_path)) as launcher:
        first = launcher.run(lambda: (total(), os.getpid()))
        second = launcher.run(lambda: (total() + 1, os.getpid()))
        (directory,) = (Path(one_node.log_dir).parent / "raylaunch").glob(f"{launcher.name}-*")
        assert len(list(directory.glob("call-*"))) == 1  # what the first run called is gone
    assert [value for value, _ in first] == [2, 2]
    assert [value for value, _ in second] == [3, 3]
    assert not {pid for _, pid in first} & {pid for _, pid in second}


def test_a_killed_agent_is_a_failure_like_any_other(one_node, start, tmp_path):
    """The seats are in it: its ranks go with it, and the next ones come when there is another."""
    go = str(tmp_path / "go")
    run = start(step_until, args=(go, str(tmp_path / "up")), num_workers=2, isolation="process")
    first = pids(tmp_path, 1)
    (node,) = one_node.nodes
    eventually(lambda: len(actor_pids(node, "NodeAgent")) == 1, "an earlier run's agent is gone")
    (agent,) = actor_pids(node, "NodeAgent")
    os.kill(agent, signal.SIGKILL)
    second = pids(tmp_path, 2)
    assert not set(first) & set(second)
    Path(go).touch()
    result = run.result()
    assert result.restarts == 1
    assert "the agent of its node, which holds its seat, is gone" in result.recoveries[0].cause
