"""Eager mode: the same script in one process, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

import raylaunch
from raylaunch import ConfigError, ElasticLauncher, get_context, get_current_launcher
from raylaunch.elastic import Events, split_batch
from raylaunch.worker.board_copy import BoardCopy


def what_it_sees(launcher, *, number):
    import torch
    import torch.distributed as dist

    assert get_current_launcher() is launcher
    total = torch.tensor(number)
    dist.all_reduce(total)
    environ = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ROLE_NAME", "MASTER_PORT")}
    context = get_context()
    return (
        int(total),
        dist.get_backend(),
        environ,
        context.device,
        launcher.rank,
        launcher.world_size,
        launcher.master_port,
    )


def test_the_call_is_made_here_with_everything_that_a_rank_has():
    import torch.distributed as dist

    before = dict(os.environ)
    launcher = ElasticLauncher("cpu:0-3", eager_mode=True, role="trainer")
    ((total, backend, environ, device, rank, world_size, port),) = launcher(what_it_sees, launcher, number=7)
    assert (total, backend, device, rank, world_size) == (7, "gloo", "cpu", 0, 1)
    assert environ == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "ROLE_NAME": "trainer",
        "MASTER_PORT": str(port),
    }
    # Nothing of it is left.
    assert dict(os.environ) == before
    assert not dist.is_initialized()
    assert get_context().run_id == ""
    assert get_current_launcher() is not launcher
    assert launcher(what_it_sees, launcher, number=8)[0][0] == 8  # and again


def test_what_the_function_raises_is_raised_as_it_is():
    import torch.distributed as dist

    def fails():
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        ElasticLauncher("cpu", eager_mode=True)(fails)
    assert not dist.is_initialized()
    assert "RANK" not in os.environ


def test_a_launcher_has_one_launch_at_a_time():
    launcher = ElasticLauncher("cpu", eager_mode=True)

    def again():
        with pytest.raises(ConfigError, match="has a launch going on"):
            launcher(print)
        return launcher.clone()(lambda: "another")

    assert launcher(again) == [["another"]]


def test_without_a_backend_no_process_group_is_made_and_one_that_is_there_stays(tmp_path):
    import torch.distributed as dist

    assert ElasticLauncher("cpu", None, eager_mode=True)(dist.is_initialized) == [False]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert ElasticLauncher("cpu", eager_mode=True)(dist.is_initialized) == [True]
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_events_work_between_the_threads_of_the_process():
    launcher = ElasticLauncher("cpu", eager_mode=True)
    steps, paused_at, saved = [], [], []
    events = launcher.events

    def directs():
        events.pause.set()
        assert events.paused.wait(30)
        paused_at.append(len(steps))
        events.trigger_save_checkpoint.set()
        assert events.finished_save_checkpoint.wait(30)
        assert len(steps) == paused_at[0]
        events.resume.set()
        before = len(steps)
        assert launcher._copy.wait(lambda: events.iteration > before + 3, 30)
        events.stop_all_tasks.set()

    def trains():
        director = threading.Thread(target=directs)
        director.start()
        while launcher.between_steps(len(steps), save=lambda: saved.append(len(steps))):
            steps.append(1)
        director.join(30)
        return director.is_alive()

    assert launcher(trains) == [False]
    assert saved == paused_at
    assert not events.stop_all_tasks.is_set()


def test_an_event_is_read_whatever_other_threads_are_at():
    # A forked process, as a DataLoader's worker, may find the lock taken by a thread that it hasn't.
    copy, inside, over = BoardCopy(), threading.Event(), threading.Event()
    events = Events(copy)
    events.pause.set()

    def looks() -> bool:
        inside.set()
        return over.wait(5)

    thread = threading.Thread(target=copy.wait, args=(looks, 0.0))
    thread.start()
    assert inside.wait(5)
    assert events.pause.is_set()
    assert thread.is_alive()
    over.set()
    thread.join()


def test_what_cannot_be_called_so_is_refused_as_on_a_cluster():
    async def coroutine():
        return 1

    launcher = ElasticLauncher("cpu", eager_mode=True)
    with pytest.raises(ConfigError, match="is a coroutine function"):
        launcher(coroutine)
    with pytest.raises(ConfigError, match="don't fit"):
        launcher(lambda x: x)


@pytest.mark.parametrize("progress", [("3", 4), (3, "4"), (0.5, None)])
def test_progress_is_counted_in_whole_numbers(progress):
    launcher = ElasticLauncher("cpu", eager_mode=True)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        launcher(lambda: launcher.between_steps(*progress))


def test_ray_is_not_imported():
    script = (
        "import sys, raylaunch\n"
        "launcher = raylaunch.ElasticLauncher('cpu', eager_mode=True)\n"
        "print(launcher(lambda launcher: launcher.rank, launcher), 'ray' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "[0] False\n"


def test_a_breakpoint_is_pdb_on_the_terminal():
    script = (
        "import raylaunch\n"
        "from raylaunch.elastic import set_trace\n"
        "def trains():\n"
        "    value = 41\n"
        "    set_trace()\n"
        "    return value\n"
        "print(raylaunch.ElasticLauncher('cpu', eager_mode=True)(trains))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input="value = value + 1\nc\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].endswith("[42]")


def test_the_whole_batch_is_the_only_ranks():
    assert raylaunch.get_current_launcher().world_size == 1
    assert split_batch([1, 2, 3]) == [1, 2, 3]
