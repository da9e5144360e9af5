"""What no restart can mend ends the run at once, and the error says what is wrong, where, and what to do about it."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
from importlib import metadata

import pytest
from drivers import Driver
from steps import step_until

import raylaunch
from raylaunch import ConfigError, EndKind, RunFailedError, Timeouts


def returns_one():
    return 1


def fails_at_once(run) -> RunFailedError:
    """The run's error; it has cost no restart and formed no group."""
    error = run.error()
    assert type(error) is RunFailedError
    assert error.root_cause.ending.kind is EndKind.CANNOT_WORK
    assert "no restart can mend this" in str(error)
    assert not run.events("WorkerJoined")
    return error


def test_a_module_that_only_the_driver_can_import_is_named_with_the_remedy(one_node, start, tmp_path, monkeypatch):
    path = tmp_path / "only_on_the_driver.py"
    path.write_text("def train():\n    return 1\n")
    found = importlib.util.spec_from_file_location("only_on_the_driver", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "only_on_the_driver", module)
    error = fails_at_once(start(module.train))
    assert "No module named 'only_on_the_driver'" in str(error)
    assert "runtime_env={'working_dir': ...}" in str(error)
    assert error.root_cause.node == one_node.nodes[0].node_id
    assert one_node.nodes[0].node_id[:8] in str(error)


class Unloadable:
    """Pickles, but doesn't unpickle."""

    def __call__(self):
        return 1

    def __getstate__(self):
        return {"path": "/data"}

    def __setstate__(self, state):
        raise OSError(f"{state['path']} is not mounted")


def test_a_function_that_does_not_load_on_the_workers_says_why(one_node, start):
    error = fails_at_once(start(Unloadable()))
    assert "train_fn doesn't load here: OSError: /data is not mounted" in str(error)
    assert "in __setstate__" in str(error)  # the remote traceback


#: A sitecustomize.py that hides raylaunch.
HIDES_RAYLAUNCH = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "raylaunch":
            raise ModuleNotFoundError("No module named 'raylaunch'", name="raylaunch")
sys.meta_path.insert(0, Hide())
"""


def test_a_node_without_raylaunch_is_told_what_to_install(one_node, start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDES_RAYLAUNCH)
    error = fails_at_once(start(returns_one, runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}}))
    assert "the module 'raylaunch' can't be imported there: install it on every node" in str(error)
    assert one_node.nodes[0].node_id[:8] in str(error)


@pytest.mark.slow
def test_a_cluster_without_raylaunch_fails_at_once_too(one_node, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDES_RAYLAUNCH)
    driver = Driver(
        one_node,
        tmp_path,
        f"""
import ray
ray.init(runtime_env={{"env_vars": {{"PYTHONPATH": {str(tmp_path)!r}}}}}, log_to_driver=False)
say("connected")
try:
    raylaunch.run(time.sleep, args=(0,), log_dir=log_dir)
except raylaunch.RaylaunchError as error:
    say("error", error)
""",
    )
    try:
        driver.wait_for("connected")
        connected = time.monotonic()
        error = driver.wait_for("error")
        assert time.monotonic() - connected < 20
        assert "the module 'raylaunch' can't be imported there: install it on every node" in error
        assert driver.exit_code() == 0
    finally:
        driver.end()


@pytest.mark.parametrize("package", ["torch", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_node_with_another_version_is_named_with_both_before_anything_forms(one_node, start, tmp_path, package):
    (tmp_path / f"{package}-9.9.9.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9.9\n"
    (tmp_path / f"{package}-9.9.9.dist-info" / "METADATA").write_text(text)
    run = start(returns_one, runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}})
    error = fails_at_once(run)
    node = one_node.nodes[0].node_id[:8]
    assert f"node {node} has {package} 9.9.9 where the driver has {metadata.version(package)}" in str(error)
    assert error.root_cause.rank is None
    assert not run.events("WorkerReady")  # nobody imported the wrong torch


def test_a_module_to_preload_that_is_not_there_is_named(one_node, start):
    error = fails_at_once(start(returns_one, preload=("torch", "no_such_module")))
    assert "preload=['torch', 'no_such_module'] can't be imported there" in str(error)
    assert "No module named 'no_such_module'" in str(error)


def test_a_runtime_env_that_cannot_be_set_up_is_told(one_node, start, tmp_path):
    error = fails_at_once(start(returns_one, runtime_env={"working_dir": "file:///no/such/archive.zip"}))
    assert "runtime_env" in str(error)
    assert "/no/such/archive.zip" in str(error)


@pytest.mark.parametrize("placement", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_more_workers_than_the_cluster_can_hold_are_refused_with_what_it_has(one_node, start, placement):
    asked = time.monotonic()
    run = start(returns_one, num_workers=9, timeouts=Timeouts(placement=placement))
    error = run.error()
    assert placement <= time.monotonic() - asked < placement + 8
    assert isinstance(error, raylaunch.PlacementTimeout)
    assert isinstance(error, TimeoutError)
    assert error.root_cause is None
    text = str(error)
    assert "no room for 9 workers" in text
    assert "timeouts.placement" in text
    assert "wanted: 9 x {CPU: 1}, strategy PACK" in text
    assert f"node {one_node.nodes[0].node_id[:8]}" in text
    assert "has free: CPU 4 of 4" in text
    assert f"Ray: group raylaunch:{run.id}:minimum:1 is PENDING (" in text


def test_a_worker_that_fits_no_node_is_told_as_infeasible(one_node, start):
    error = start(returns_one, num_workers=1, resources_per_worker={"CPU": 64}, timeouts=Timeouts(placement=0)).error()
    assert "wanted: 1 x {CPU: 64}" in str(error)
    assert "has free: CPU 4 of 4" in str(error)
    assert "INFEASIBLE" in str(error)


@pytest.mark.slow
def test_who_waits_for_room_is_told_so_and_starts_when_there_is_some(one_node, start, caplog):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    caplog.set_level(logging.WARNING, "raylaunch")
    somebody = placement_group([{"CPU": 3}], name="somebody-s")
    ray.get(somebody.ready())
    told = threading.Event()
    heard = []

    class Listen(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())
            told.set()

    listen = Listen()
    logging.getLogger("raylaunch").addHandler(listen)
    try:
        asked = time.monotonic()
        run = start(returns_one, resources_per_worker={"CPU": 2})
        assert told.wait(20)
        assert time.monotonic() - asked > 4
    finally:
        logging.getLogger("raylaunch").removeHandler(listen)
        remove_placement_group(somebody)
    assert "waiting for room: 0 of 1 bundles of {CPU: 2} can be used; gives up in 5" in heard[0]
    assert "has free: CPU 1 of 4" in heard[0]
    assert "is PENDING (" in heard[0]
    assert list(run.result()) == [1]


def test_a_run_id_in_use_is_refused_and_the_run_that_has_it_goes_on(one_node, start, gate):
    first = start(step_until, args=(gate("enough"),))
    first.running()
    second = start(returns_one, run_id=first.id)
    error = second.error()
    assert isinstance(error, ConfigError)
    assert f"run_id={first.id!r} is in use" in str(error)
    gate("enough").touch()
    assert list(first.result()) == [(0, 1, 1)]
    assert first.result().restarts == 0


def returns_a_lock():
    return threading.Lock()


def test_a_value_that_does_not_pickle_is_named_with_its_rank(one_node, start):
    error = start(returns_a_lock).error()
    assert error.root_cause.ending.kind is EndKind.CANNOT_WORK
    assert error.root_cause.rank == 0
    assert "its return value can't be sent to the driver" in str(error)
    assert "cannot pickle '_thread.lock' object" in str(error)
    assert error.root_cause.generation == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_selector": {"x": "in("}},
        {"runtime_env": {"env_vars": {"A": 1}}},
        {"runtime_env": {"working_dir": 7}},
    ],
    ids=str,
)
def test_what_ray_itself_refuses_is_refused_before_anything_starts(one_node, start, arguments):
    error = start(lambda: None, num_workers=1, **arguments).error(10)
    assert isinstance(error, raylaunch.ConfigError)
    assert next(iter(arguments)) in str(error)


@pytest.mark.slow
def test_a_runtime_env_that_ray_refuses_later_is_an_error_that_says_so(one_node, start, tmp_path):
    missing = str(tmp_path / "missing")
    error = start(lambda: None, num_workers=1, runtime_env={"working_dir": missing}).error(30)
    assert missing in str(error)
