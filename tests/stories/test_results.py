"""What a run leaves: values by rank, whatever their size, the error, and a journal that reproduces every decision."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
from harness import leftovers
from steps import step_until

import raylaunch
from raylaunch import RunResult, journal

MEGABYTE = 1_000_000


# -- values ----------------------------------------------------------------------------------------------------------


def a_lot():
    import numpy as np

    return np.full(100 * MEGABYTE, raylaunch.get_context().rank, dtype=np.uint8)


def test_100_mb_of_each_rank_can_be_read_when_the_workers_are_gone(one_node, start, tmp_path):
    run = start(a_lot, num_workers=2)
    result = run.result()
    assert not leftovers(tmp_path / "runs")
    assert [(len(value), value[0], value[-1]) for value in result] == [(100 * MEGABYTE, r, r) for r in (0, 1)]
    assert run.journal.stat().st_size < MEGABYTE


@dataclasses.dataclass
class Curve:
    points: list[tuple[int, float]]


@dataclasses.dataclass
class Report:
    rank: int
    curves: dict[str, Curve]


def uses_ray_signals_and_asyncio(dataset, config, *, extra):
    """What works on a process's main thread, and with references to Ray's objects."""
    import ray

    rank = raylaunch.get_context().rank
    assert isinstance(dataset, ray.ObjectRef)
    assert isinstance(config["labels"], ray.ObjectRef)
    rows, labels = ray.get([dataset, config["labels"]])

    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    assert threading.current_thread() is threading.main_thread()

    async def loss():
        await asyncio.sleep(0)
        return extra * sum(rows) / len(labels)

    return Report(rank, {"loss": Curve([(0, asyncio.run(loss()))])})


def test_references_ray_get_signal_handlers_and_asyncio_work_inside_and_any_value_comes_back(one_node, start):
    import ray

    dataset, labels = ray.put([1, 2, 3]), ray.put(["a", "b"])
    run = start(
        uses_ray_signals_and_asyncio,
        args=(dataset, {"labels": labels}),
        kwargs={"extra": 2},
        num_workers=2,
    )
    assert list(run.result()) == [Report(rank, {"loss": Curve([(0, 6.0)])}) for rank in (0, 1)]


def test_a_result_tells_how_the_run_went_and_its_journal_replays_to_the_same_decisions(one_node, start, gate):
    run = start(step_until, args=(gate("enough"),), num_workers=2)
    run.running()
    one_node.kill_worker(run.id, 1)
    run.running(generation=2)
    gate("enough").touch()
    result = run.result()
    assert isinstance(result, RunResult)
    assert (len(result), result[0], result[-1], result[0:1]) == (2, (0, 2, 2), (1, 2, 2), ((0, 2, 2),))
    assert (result.run_id, result.world_size, result.generation, result.restarts) == (run.id, 2, 2, 1)
    (recovery,) = result.recoveries
    assert (recovery.generation, recovery.world_size) == (2, 2)
    assert "rank 1" in recovery.cause
    assert "killed by SIGKILL" in recovery.cause
    assert 0 < recovery.seconds < 60
    assert result.journal == str(run.journal)
    steps = list(journal.replay(result.journal))
    assert all(step.same for step in steps)
    assert steps[-1].decision.after.value == "done"


# -- errors ----------------------------------------------------------------------------------------------------------


class Diverged(Exception):
    def __init__(self, text, weights):
        super().__init__(text)
        self.weights = weights


def raises_a_lot():
    raise Diverged("loss is nan", b"w" * (50 * MEGABYTE))


@pytest.mark.slow
def test_an_exception_of_50_mb_is_told_without_being_sent_around(one_node, start):
    run = start(raises_a_lot, max_restarts=0)
    error = run.error()
    assert "Diverged: loss is nan" in str(error)
    assert "in raises_a_lot" in str(error)
    assert run.journal.stat().st_size < MEGABYTE


# -- the journal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for a few lines."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    where = tmp_path / "tiny"
    where.mkdir()
    if libc.mount(b"tmpfs", str(where).encode(), b"tmpfs", 0, b"size=4k") != 0:
        pytest.skip(f"can't mount: {os.strerror(ctypes.get_errno())}")
    yield where
    assert libc.umount2(str(where).encode(), 0) == 0


def test_a_full_disk_under_the_journal_is_told_once_and_training_goes_on(one_node, tiny_disk, gate, caplog):
    caplog.set_level(logging.INFO, "raylaunch")
    gate("enough").touch()
    result = raylaunch.run(step_until, args=(gate("enough"),), num_workers=2, spares=0, log_dir=str(tiny_disk))
    assert list(result) == [(0, 2, 1), (1, 2, 1)]
    told = [record.getMessage() for record in caplog.records if "can't be written" in record.getMessage()]
    (once,) = told
    assert "No space left on device" in once
    assert "the run goes on without it" in once
    assert Path(result.journal).stat().st_size > 0
    assert list(journal.read(result.journal))  # what there is can be read: whole lines, but for the last
    assert not leftovers(tiny_disk)


@pytest.mark.slow
def test_the_journal_of_an_earlier_run_of_the_same_id_is_kept(one_node, start):
    first = start(os.getpid)
    before = Path(first.result().journal)
    text = before.read_text()
    second = start(os.getpid, run_id=first.id)
    after = Path(second.result().journal)
    assert after != before
    assert after.parent == before.parent
    assert before.read_text() == text
    assert all(step.same for step in journal.replay(str(after)))


def gives_a_generator():
    return (number * 10 for number in (7, 8, 9))


def test_a_generator_is_refused_as_a_value_and_not_taken_for_several(one_node, start):
    error = start(gives_a_generator, num_workers=1).error()
    assert "return value can't be sent to the driver" in str(error)
