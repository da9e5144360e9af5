"""torch.distributed.launcher's API on a cluster: its calls, its results, its exceptions."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading

import pytest
from harness import eventually, leftovers, nothing_is_left

from raylaunch.errors import RunFailedError
from raylaunch.torchrun import ChildFailedError, LaunchConfig, SignalException, elastic_launch, launch_agent


@pytest.fixture
def config(one_node, tmp_path):
    """A LaunchConfig for the cluster; afterwards nothing of its runs may be left."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    def made(**changes) -> LaunchConfig:
        usual = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, "spares": 0}
        logs = DefaultLogsSpecs(str(tmp_path / "runs"))
        return LaunchConfig(**{**usual, "logs_specs": logs, "rdzv_configs": {"timeout": 30}, **changes})

    yield made
    nothing_is_left(tmp_path / "runs")


def all_reduced(base: int) -> tuple[int, str | None]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total.item()), os.environ.get("MY_FLAG")


def test_a_function_gives_each_ranks_value(config, monkeypatch):
    monkeypatch.setenv("MY_FLAG", "on")  # torch's workers have the launcher's environment
    launched = config()
    assert elastic_launch(launched, all_reduced)(10) == {0: (21, "on"), 1: (21, "on")}
    assert launched.run_id  # torch too notes there the id that it has made up


def test_torchs_own_config_and_backend_do(one_node, tmp_path):
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig as TorchsConfig

    logs = DefaultLogsSpecs(str(tmp_path / "runs"))
    theirs = TorchsConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="theirs", logs_specs=logs)
    assert theirs.rdzv_backend == "etcd"
    assert launch_agent(theirs, all_reduced, [0]) == {0: (1, None), 1: (1, None)}
    nothing_is_left(tmp_path / "runs")


def test_a_function_is_bound_to_cpus_and_has_its_role_as_a_command_has(config, tmp_path):
    """This machine has one NUMA node or several: bound, or told why not."""
    from torch.numa.binding import AffinityMode

    from raylaunch.torchrun import NumaOptions

    launched = config(numa_options=NumaOptions(affinity_mode=AffinityMode.NODE), role="trainer")
    seen = elastic_launch(launched, lambda: (os.environ["ROLE_NAME"], sorted(os.sched_getaffinity(0))))()
    for rank, (role, cpus) in seen.items():
        assert role == "trainer"
        (stderr,) = (tmp_path / "runs").glob(f"*/generation_1/{rank}/stderr.log")
        assert len(cpus) < (os.cpu_count() or 1) or "no NUMA binding (node)" in stderr.read_text()


def raises_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("no such column")
    threading.Event().wait()


class Told(logging.Handler):
    """What torch's event handler is told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(json.loads(record.getMessage()))


def test_a_failing_function_raises_torchs_error_with_the_root_cause(config, monkeypatch):
    from torch.distributed.elastic.events import handlers

    told = Told()
    monkeypatch.setitem(handlers._log_handlers, "mine", told)
    with pytest.raises(ChildFailedError) as raised:
        elastic_launch(config(event_log_handler="mine"), raises_on_rank_1)()
    rank, first = raised.value.get_first_failure()
    assert (rank, first.local_rank, first.exitcode) == (1, 1, 1)
    assert "no such column" in first.message["extraInfo"]["py_callstack"]
    assert raised.value.name == "raises_on_rank_1"
    assert isinstance(raised.value.__cause__, RunFailedError)
    with open(first.error_file, encoding="utf-8") as file:
        assert json.load(file)["message"]["message"] == "ValueError: no such column"
    states = [(one["source"], one["metadata"]["state"], one["metadata"]["global_rank"]) for one in told.events]
    assert states == [("WORKER", "FAILED", 1), ("AGENT", "SUCCEEDED", None)]  # torch's agent has done its work


@pytest.mark.slow
def test_a_command_has_no_values_and_its_own_exit_code(config, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os, sys; sys.exit(int(sys.argv[1]) if os.environ['RANK'] == '1' else 0)")
    assert elastic_launch(config(), sys.executable)("-u", str(script), 0) == {0: None, 1: None}
    with pytest.raises(ChildFailedError) as raised:
        elastic_launch(config(), shutil.which("sh"))("-c", f"{sys.executable} {script} 7")
    rank, first = raised.value.get_first_failure()
    assert (rank, first.exitcode) == (1, 7)
    assert raised.value.name == shutil.which("sh")


def test_a_failure_is_restarted_as_often_as_the_config_says(config, tmp_path):
    def once(marker: str) -> str:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return os.environ["TORCHELASTIC_RESTART_COUNT"]
        os._exit(3)

    assert elastic_launch(config(max_restarts=1, nproc_per_node=1), once)(str(tmp_path / "marker")) == {0: "1"}


def test_no_room_is_torchs_timeout(config):
    from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

    with pytest.raises(RendezvousTimeoutError, match="CPU"):
        elastic_launch(config(nproc_per_node=99, rdzv_configs={"timeout": 1}), all_reduced)(0)


def wait(marker: str):
    open(f"{marker}-{os.environ['RANK']}", "w").close()
    threading.Event().wait()


def test_a_signal_stops_the_run_and_is_torchs_exception(config, tmp_path):
    marker = str(tmp_path / "up")

    def interrupt() -> None:
        eventually(lambda: all(os.path.exists(f"{marker}-{rank}") for rank in (0, 1)), "both ranks are up")
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=interrupt)
    before = signal.getsignal(signal.SIGTERM)
    sender.start()
    with pytest.raises(SignalException) as raised:
        elastic_launch(config(shutdown_timeout=5), wait)(marker)
    sender.join()
    assert raised.value.sigval == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert not leftovers(tmp_path / "runs")


def test_a_handler_that_nobody_knows_is_refused_before_anything_starts(config):
    with pytest.raises(ValueError, match="torch has no such handler"):
        elastic_launch(config(event_log_handler="nobody"), all_reduced)(0)
