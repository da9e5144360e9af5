"""run() works wherever Python does, and a driver that is interrupted, stopped or killed leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from drivers import Driver
from harness import eventually, leftovers, listens, nothing_is_left
from steps import step_until

import raylaunch

#: Ray tasks and actors that call run() need this module, as they would with a working_dir.
CODE = {"env_vars": {"PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])}}


@pytest.fixture
def drive(one_node, tmp_path):
    """Start drivers; end those that are left."""
    drivers: list[Driver] = []

    def drive(script: str, **arguments: str) -> Driver:
        drivers.append(Driver(one_node, tmp_path, script, **arguments))
        return drivers[-1]

    yield drive
    for driver in drivers:
        driver.end()


# -- where run() is called from --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script_keeps_functions_values_and_exceptions_of_its_own(one_node, drive):
    driver = drive("""
import dataclasses

@dataclasses.dataclass
class Metrics:
    rank: int
    loss: float

class Diverged(Exception):
    def __init__(self, loss, *, step):
        super().__init__(f"loss {loss} at step {step}")
        self.loss, self.step = loss, step

scale = 0.5

def train(diverge):
    rank = raylaunch.get_context().rank
    if diverge and rank == 1:
        raise Diverged(7.0, step=3)
    return Metrics(rank, scale * rank)

if __name__ == "__main__":
    result = raylaunch.run(train, args=(False,), num_workers=2, spares=0, log_dir=log_dir)
    assert list(result) == [Metrics(0, 0.0), Metrics(1, 0.5)], result
    try:
        raylaunch.run(train, args=(True,), num_workers=2, spares=0, log_dir=log_dir, max_restarts=0)
    except Diverged as error:
        assert isinstance(error, raylaunch.RunFailedError)
        assert error.root_cause.rank == 1
        assert "Diverged: loss 7.0 at step 3" in str(error)
        say("caught")
""")
    assert driver.exit_code() == 0, driver.said()
    assert (driver.gates / "caught").exists()
    nothing_is_left(driver.log_dir)


def rank_and_size():
    context = raylaunch.get_context()
    return context.rank, context.world_size


def test_a_notebook_cell_with_a_running_event_loop_can_call_it(one_node, tmp_path):
    async def cell():
        return raylaunch.run(rank_and_size, num_workers=2, spares=0, log_dir=str(tmp_path / "runs"))

    assert list(asyncio.run(cell())) == [(0, 2), (1, 2)]
    nothing_is_left(tmp_path / "runs")
    assert not [thread for thread in threading.enumerate() if "raylaunch" in thread.name]


def test_a_ray_task_can_call_it_and_leaves_nothing(one_node, tmp_path):
    import ray

    @ray.remote(num_cpus=0, runtime_env=CODE)
    def pipeline(log_dir):
        result = raylaunch.run(rank_and_size, num_workers=2, spares=0, log_dir=log_dir)
        return list(result), result.restarts

    assert ray.get(pipeline.remote(str(tmp_path / "runs"))) == ([(0, 2), (1, 2)], 0)
    nothing_is_left(tmp_path / "runs")


def test_a_ray_actor_that_is_killed_while_it_waits_leaves_nothing(one_node, tmp_path, gate):
    import ray

    @ray.remote(num_cpus=0, runtime_env=CODE)
    class Pipeline:
        def train(self, log_dir, enough):
            return raylaunch.run(step_until, args=(enough,), num_workers=2, spares=0, log_dir=log_dir, run_id="inner")

    pipeline = Pipeline.remote()
    pipeline.train.remote(str(tmp_path / "runs"), gate("never"))
    eventually(lambda: is_running(one_node, "inner"), "the inner run runs")
    ray.kill(pipeline)
    nothing_is_left(tmp_path / "runs", 15)  # Ray leaves an actor's own actors five seconds


def is_running(cluster, run_id: str) -> bool:
    try:
        return cluster.status(run_id).phase == "running"
    except ValueError:  # not yet
        return False


# -- how a driver ends -----------------------------------------------------------------------------------------------

#: Trains until it is stopped; says where its store is, and has a child in a session of its own, as some loaders have.
TRAIN = """
def train():
    context = raylaunch.get_context()
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        say(f"port-{context.rank}", context.master_port)
        wait_for("never")
    finally:
        say(f"cleaned-up-{context.rank}")
"""

RUN = "raylaunch.run(train, num_workers=2, spares=0, run_id=run_id, log_dir=log_dir)\n"


def test_an_interrupt_lets_workers_clean_up_and_leaves_nothing_though_the_driver_lives_on(one_node, drive):
    driver = drive(f"""{TRAIN}
try:
    {RUN}
except KeyboardInterrupt:
    say("interrupted")
sys.stdin.read()
print(list(raylaunch.run(raylaunch.get_context, spares=0, log_dir=log_dir)))
""")
    port = int(driver.wait_for("port-0"))
    driver.wait_for("port-1")
    assert listens(port)
    assert [one for one in leftovers(driver.log_dir) if "sleep" in one]
    driver.signal(signal.SIGINT)
    driver.wait_for("interrupted")
    assert (driver.gates / "cleaned-up-0").exists()
    assert (driver.gates / "cleaned-up-1").exists()
    nothing_is_left(driver.log_dir, port=port)
    assert "stopping: KeyboardInterrupt in the driver" in driver.said()
    assert driver.exit_code() == 0, driver.said()  # the session is fit for the next run
    assert "Context(rank=0" in driver.said()


def test_sigterm_stops_the_run_in_order_and_ends_the_script(one_node, drive):
    driver = drive(TRAIN + RUN)
    driver.wait_for("port-0")
    driver.wait_for("port-1")
    driver.signal(signal.SIGTERM)
    assert driver.exit_code() == signal.SIGTERM
    assert (driver.gates / "cleaned-up-0").exists()
    assert (driver.gates / "cleaned-up-1").exists()
    nothing_is_left(driver.log_dir)


@pytest.mark.slow
def test_sigterm_leaves_ranks_the_time_that_timeouts_stop_promises(one_node, drive):
    driver = drive("""
def train():
    say("up")
    try:
        wait_for("never")
    finally:
        time.sleep(4)  # Ray 2.60 by itself aborts a driver three seconds after its SIGTERM
        say("saved")

raylaunch.run(train, spares=0, run_id=run_id, log_dir=log_dir, timeouts=raylaunch.Timeouts(stop=30))
""")
    driver.wait_for("up")
    driver.signal(signal.SIGTERM)
    assert driver.exit_code() == signal.SIGTERM
    assert (driver.gates / "saved").exists()
    nothing_is_left(driver.log_dir)


#: Takes no notice of SIGTERM, and has ten minutes to go on so.
DEAF = """
def train():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"deaf-{raylaunch.get_context().rank}", os.getpid())
    wait_for("never")

raylaunch.run(
    train, num_workers=2, spares=0, run_id=run_id, log_dir=log_dir, timeouts=raylaunch.Timeouts(stop=600)
)
"""


def test_a_second_interrupt_kills_at_once(one_node, drive):
    driver = drive(DEAF)
    driver.wait_for("deaf-0")
    driver.wait_for("deaf-1")
    driver.signal(signal.SIGINT)
    driver.wait_for_event("StopRequested")
    assert leftovers(driver.log_dir)
    second = time.monotonic()
    driver.signal(signal.SIGINT)
    assert driver.exit_code() != 0
    assert time.monotonic() - second < 10
    assert "KeyboardInterrupt" in driver.said()
    nothing_is_left(driver.log_dir)


@pytest.mark.slow
def test_workers_that_die_while_the_run_is_being_stopped_end_it_sooner(one_node, drive):
    driver = drive(DEAF)
    pids = [int(driver.wait_for(f"deaf-{rank}")) for rank in (0, 1)]
    driver.signal(signal.SIGINT)
    driver.wait_for_event("StopRequested")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert driver.exit_code() != 0
    assert "KeyboardInterrupt" in driver.said()
    nothing_is_left(driver.log_dir)


def test_a_driver_killed_with_sigkill_takes_everything_with_it(one_node, drive):
    driver = drive(TRAIN + RUN)
    port = int(driver.wait_for("port-0"))
    driver.wait_for("port-1")
    assert listens(port)
    assert [one for one in leftovers(driver.log_dir) if "sleep" in one]
    driver.signal(signal.SIGKILL)
    assert driver.exit_code() == -signal.SIGKILL
    nothing_is_left(driver.log_dir, port=port)


def test_an_interrupt_while_the_run_waits_for_room_leaves_nothing(one_node, drive):
    driver = drive("""
raylaunch.run(time.sleep, args=(0,), num_workers=9, spares=0, run_id=run_id, log_dir=log_dir)
""")
    driver.wait_for_event("RunRequested")
    driver.signal(signal.SIGINT)
    assert driver.exit_code() != 0
    assert "KeyboardInterrupt" in driver.said()
    nothing_is_left(driver.log_dir)


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_at_once_from_one_driver_and_from_two_do_not_disturb_each_other(one_node, start, drive, gate):
    other = drive("""
def train():
    context = raylaunch.get_context()
    say(f"at-{context.generation}")
    wait_for("enough")
    return context.rank, context.generation

result = raylaunch.run(train, spares=0, run_id=run_id, log_dir=log_dir)
assert list(result) == [(0, 2)], result
assert result.restarts == 1
""")
    mine = [start(step_until, args=(gate(f"enough-{n}"),), num_workers=n) for n in (1, 2)]
    before = [run.running() for run in mine]
    other.wait_for("at-1")
    one_node.kill_worker(other.run_id, 0)
    one_node.kill_worker(mine[0].id, 0)
    other.wait_for("at-2")
    mine[0].running(generation=2)
    # Nobody else has noticed: the same processes, the same generation.
    assert mine[1].running().members == before[1].members
    assert one_node.status(other.run_id).generation == 2
    for n in (1, 2):
        gate(f"enough-{n}").touch()
    (other.gates / "enough").touch()
    assert [run.result().restarts for run in mine] == [1, 0]
    assert list(mine[1].result()) == [(0, 2, 1), (1, 2, 1)]
    assert other.exit_code() == 0, other.said()
