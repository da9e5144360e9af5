"""A launcher reserves once and runs many: fresh processes each time, no failure carried over, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from drivers import Driver
from harness import eventually, journal_lines, leftovers, nothing_is_left, runs
from steps import any_rank, step_until
from test_coordinator_dies import kill_coordinator

import raylaunch
from raylaunch import ConfigError, LauncherClosedError, RunFailedError, Timeouts, journal
from raylaunch.cluster.session import Session, Setup
from raylaunch.spec import make_spec


@pytest.fixture
def launcher(two_nodes, tmp_path):
    """A launcher of two workers on the module's cluster; afterwards nothing of it may be left."""
    yield functools.partial(raylaunch.Launcher, num_workers=2, log_dir=str(tmp_path / "runs"))
    nothing_is_left(tmp_path / "runs")


def status(cluster, launcher, phase: str, spares: int = 2):
    """Wait until the launcher is in a phase, with so many ready spares; returns its status."""

    def there():
        with contextlib.suppress(ValueError):  # not yet
            found = cluster.status(launcher.name)
            return found.phase == phase and found.ready_spares >= spares and found

    return eventually(there, f"launcher {launcher.name} is {phase} with {spares} ready spares")


def groups(launcher) -> set[str]:
    """The ids of the placement groups that the launcher holds."""
    from ray.util.placement_group import placement_group_table

    mine = [i for i in placement_group_table().values() if i["name"].startswith(f"raylaunch:{launcher.name}:")]
    return {info["placement_group_id"] for info in mine if info["state"] == "CREATED"}


def started(launcher, tmp_path: Path) -> list[dict]:
    """Every worker process that the launcher has had, in order."""
    lines = journal_lines(tmp_path / "runs" / launcher.name / "journal.jsonl")
    return [line for line in lines if line.get("event") == "WorkerStarted"]


def who() -> tuple[int, int, str, int, str, str]:
    any_rank(False)
    context = raylaunch.get_context()
    environment = (os.environ["RAYLAUNCH_RUN_ID"], os.environ["TORCHELASTIC_RESTART_COUNT"])
    return os.getpid(), context.rank, context.run_id, context.max_restarts, *environment


# -- one run after the other -----------------------------------------------------------------------------------------


def test_two_runs_in_a_row_have_the_same_groups_other_processes_and_one_journal(two_nodes, launcher, tmp_path, gate):
    with launcher(name="twice") as held:
        first = held.submit(step_until, args=(gate("enough"),))
        before = status(two_nodes, held, "running", spares=2)
        reserved = groups(held)
        assert len(reserved) == 1
        gate("enough").touch()
        assert list(first.result(60)) == [(0, 2, 1), (1, 2, 1)]
        second = held.run(who, max_restarts=1)
        assert groups(held) == reserved
        old = {member.process.pid for member in before.members.values()}
        eventually(lambda: not any(map(runs, old)), "the first run's processes are gone")
    assert [value[1:] for value in second] == [(rank, "twice-2", 1, "twice-2", "0") for rank in (0, 1)]
    assert old.isdisjoint(value[0] for value in second)
    assert [first.result().run_id, second.run_id] == ["twice-1", "twice-2"]
    assert (second.generation, second.restarts, second.recoveries) == (2, 0, ())
    assert first.result().journal == second.journal == str(tmp_path / "runs" / "twice" / "journal.jsonl")
    steps = list(journal.replay(second.journal))
    assert all(step.same for step in steps)
    assert steps[-1].decision.after.value == "done"
    assert not leftovers(tmp_path / "runs")


class Diverged(Exception):
    pass


def diverges():
    if raylaunch.get_context().rank == 1:
        raise Diverged("loss is nan")
    any_rank(False)


def dies(until: Path | None = None):
    """Rank 1 kills itself, until a file is there."""
    context = raylaunch.get_context()
    any_rank(False)
    if context.rank == 1 and not (until and until.exists()):
        if until:
            until.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    any_rank(False)
    return context.restart_count


@pytest.mark.slow
def test_runs_that_fail_are_followed_by_one_with_its_full_budget(two_nodes, launcher, gate):
    with launcher() as held:
        with pytest.raises(Diverged, match="loss is nan") as raised:
            held.run(diverges, max_restarts=0)
        assert isinstance(raised.value, RunFailedError)
        assert raised.value.run_id == f"{held.name}-1"
        reserved = groups(held)
        with pytest.raises(Diverged, match="no_retry names this exception"):
            held.run(diverges, no_retry=(Diverged,))
        with pytest.raises(RunFailedError, match="max_restarts=0 allows no restart") as killed:
            held.run(dies, max_restarts=0)
        assert killed.value.root_cause.rank == 1
        result = held.run(dies, args=(gate("once"),), max_restarts=1)
        assert list(result) == [1, 1]
        assert (result.restarts, len(result.recoveries)) == (1, 1)
        assert groups(held) == reserved


@pytest.mark.slow
def test_a_run_in_a_launcher_for_which_there_is_no_room_fails_alone(two_nodes, launcher):
    with contextlib.ExitStack() as room:
        big = room.enter_context(launcher(num_workers=4))
        assert len(big.run(who)) == 4
        with launcher(timeouts=Timeouts(placement=5)) as small:
            with pytest.raises(raylaunch.PlacementTimeout, match="wanted: 2 x"):
                small.run(who)
            room.close()
            assert len(small.run(who)) == 2


# -- submit ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submitted_runs_follow_one_another_and_leaving_waits_for_them(two_nodes, launcher, gate):
    heard = []
    with launcher() as held:
        first = held.submit(step_until, args=(gate("enough"),))
        failing = held.submit(diverges, max_restarts=0)
        withdrawn = held.submit(who)
        last = held.submit(who)
        last.add_done_callback(lambda future: heard.append(future.result()[0][2]))
        assert withdrawn.cancel()
        status(two_nodes, held, "running", spares=0)
        assert not first.cancel()
        assert not any(future.done() for future in (first, failing, last))
        gate("enough").touch()
    assert all(future.done() for future in (first, failing, last))
    assert isinstance(failing.exception(), Diverged)
    with pytest.raises(CancelledError):
        withdrawn.result()
    assert len({value[0] for value in last.result()}) == 2
    assert heard == [f"{held.name}-4"]


@pytest.mark.slow
def test_an_exception_that_leaves_the_block_stops_what_runs_and_what_would_have_run(two_nodes, launcher, gate):
    with contextlib.suppress(ZeroDivisionError), launcher() as held:
        running = held.submit(step_until, args=(gate("never"),))
        waiting = held.submit(who)
        status(two_nodes, held, "running", spares=0)
        _ = 1 / 0
    assert "was stopped" in str(running.exception(0))
    assert isinstance(waiting.exception(0), LauncherClosedError)


# -- how it is used --------------------------------------------------------------------------------------------------


def test_outside_of_its_block_a_launcher_says_so(two_nodes, launcher):
    held = launcher(name="once")
    with pytest.raises(LauncherClosedError, match="launcher once holds nothing yet"):
        held.run(who)
    with held:
        pass  # nothing was run, and nothing need be ready
    for use in (held.run, held.submit):
        with pytest.raises(LauncherClosedError, match="launcher once has been left, and everything released"):
            use(who)
    with pytest.raises(LauncherClosedError, match="entered once"), held:
        pass


@pytest.mark.slow
def test_what_cannot_work_is_refused_and_the_launcher_goes_on(two_nodes, launcher):
    for arguments, words in (
        ({"num_workers": 0}, "num_workers=0: must be at least 1"),
        ({"name": "a b"}, "name='a b': must be 1 to 64"),
        ({"env": {"RANK": "3"}}, r"env\['RANK'\]='3': raylaunch sets this variable itself"),
        ({"preload": "torch"}, "preload='torch': must be a tuple"),
        ({"max_restarts": 3}, "max_restarts: no such argument"),
    ):
        with pytest.raises(ConfigError, match=words):
            launcher(**arguments)
    with launcher() as held:
        for function, arguments, words in (
            (who, {"args": (1,)}, "don't fit train_fn"),
            (who, {"max_restarts": -2}, "max_restarts=-2"),
            (who, {"no_retry": (3,)}, "no_retry"),
            (who, {"num_workers": 3}, "num_workers: no such argument"),
            (7, {}, "must be callable"),
        ):
            with pytest.raises(ConfigError, match=words):
                held.run(function, **arguments)
        assert len(held.run(who)) == 2


# -- what is lost between the runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_spare_and_the_coordinator_that_die_between_the_runs_cost_the_next_one_nothing(two_nodes, launcher, tmp_path):
    with launcher() as held:
        status(two_nodes, held, "held", spares=2)
        victim = started(held, tmp_path)[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(started(held, tmp_path)) == 3, "another spare")
        status(two_nodes, held, "held", spares=2)
        kill_coordinator(two_nodes)
        result = held.run(who, max_restarts=0)
        assert victim not in {value[0] for value in result}
        assert (result.restarts, result.generation) == (0, 1)


@pytest.mark.slow
def test_a_node_that_is_lost_between_the_runs_costs_the_next_one_nothing(two_nodes, launcher, tmp_path):
    with launcher(num_workers=2, placement_strategy="SPREAD") as held:
        assert len(held.run(who, max_restarts=0)) == 2
        status(two_nodes, held, "held", spares=2)
        gone = two_nodes.nodes[1]
        two_nodes.kill_node(gone)
        eventually(lambda: len([w for w in started(held, tmp_path) if w["node"] != gone.node_id]) >= 3, "another spare")
        status(two_nodes, held, "held", spares=2)
        result = held.run(who, max_restarts=0)
        assert (len(result), result.restarts) == (2, 0)
    two_nodes.add_node()


@pytest.mark.slow
def test_a_run_that_is_taken_back_before_it_begins_leaves_nothing(two_nodes, tmp_path):
    spec, setup = make_spec(run_id="taken-back"), Setup((), None, (), None, tmp_path / "runs")
    with Session(spec, setup, held=False):  # as after an interrupt in the moment between request and beginning
        began = time.monotonic()
    assert time.monotonic() - began < spec.timeouts.stop
    nothing_is_left(tmp_path / "runs")


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(two_nodes, tmp_path):
    """Start drivers; end those that are left."""
    drivers: list[Driver] = []

    def drive(script: str) -> Driver:
        drivers.append(Driver(two_nodes, tmp_path, script))
        return drivers[-1]

    yield drive
    for driver in drivers:
        driver.end()
    nothing_is_left(tmp_path / "runs")


@pytest.mark.slow
def test_an_interrupt_stops_the_run_and_the_next_one_follows_on_the_same_workers(drive):
    driver = drive("""
def train():
    try:
        say(f"at-{raylaunch.get_context().rank}")
        wait_for("never")
    finally:
        say(f"cleaned-up-{raylaunch.get_context().rank}")

with raylaunch.Launcher(num_workers=2, name=run_id, log_dir=log_dir) as launcher:
    try:
        launcher.run(train)
    except KeyboardInterrupt:
        say("interrupted")
    print(list(launcher.run(os.getpid, max_restarts=0)))
""")
    for rank in (0, 1):
        driver.wait_for(f"at-{rank}")
    driver.signal(signal.SIGINT)
    driver.wait_for("interrupted")
    assert [(driver.gates / f"cleaned-up-{rank}").exists() for rank in (0, 1)] == [True, True]
    assert driver.exit_code() == 0, driver.said()
    requests = [line for line in journal_lines(driver.journal) if "RequestBundles" in str(line.get("commands"))]
    assert len(requests) == 1


@pytest.mark.slow
def test_an_interrupt_while_the_block_is_left_releases_everything(drive):
    driver = drive("""
def train():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    say(f"deaf-{raylaunch.get_context().rank}")
    wait_for("never")

timeouts = raylaunch.Timeouts(stop=600)
with raylaunch.Launcher(num_workers=2, name=run_id, log_dir=log_dir, timeouts=timeouts) as launcher:
    launcher.submit(train)
""")
    for rank in (0, 1):
        driver.wait_for(f"deaf-{rank}")
    assert [one for one in leftovers(driver.log_dir) if "sleep" in one]
    driver.signal(signal.SIGINT)  # it waits for the run, and begins to stop it
    driver.wait_for_event("ReleaseRequested")
    driver.signal(signal.SIGINT)
    assert driver.exit_code() != 0
    assert "KeyboardInterrupt" in driver.said()
