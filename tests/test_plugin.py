"""The pytest plugin as its users meet it: pytest in a process of its own, on test files as they would write them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness import LONGEST, eventually

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"

#: How long a session with several clusters, one after the other, may take on a busy machine, in seconds.
BUSY = 240.0
pytestmark = pytest.mark.timeout(BUSY + LONGEST)

#: A cluster as `ray start --head` makes it: it stands in the machine's address file. Lives until its stdin is closed.
SOMEBODY_S_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print("cluster", cluster.address, flush=True)
sys.stdin.read()
"""
WHERE = "import ray; ray.init(log_to_driver=False); print('at', ray.get_runtime_context().gcs_address)"


class Session:
    """A pytest session in a folder, and everything that is started in it, wherever that goes."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
        self._mark = f"{uuid.uuid4()}"
        self._environment = {**os.environ, "SESSION_MARK": self._mark, "NOTES": str(folder), **environment}
        self.output = folder / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-v", *arguments],
                cwd=folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def outcomes(self, seconds: float = BUSY) -> dict[str, str]:
        """Wait for its end; returns how each test ended, or an ERROR after it."""
        self.process.wait(seconds)
        return dict(re.findall(r"::(\w+) (PASSED|FAILED|ERROR)", self.said()))

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def leaves_nothing(self) -> None:
        """Within 10 s after its end."""
        until = time.monotonic() + 10
        while left := self.left():
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def left(self) -> list[str]:
        """The processes that it started and that are still there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SESSION_MARK") == self._mark and process.pid != self.process.pid:
                    found.append(f"{process.pid} {process.cmdline()}")
        return found


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Start pytest on these files (name: text), or on one with this text. Nothing of it may be left in the end."""
    sessions = []

    def start(files: str | dict[str, str], *arguments: str, **environment: str) -> Session:
        for name, text in ({"test_theirs.py": files} if isinstance(files, str) else files).items():
            (tmp_path / name).write_text(text)
        sessions.append(Session(tmp_path, *arguments, **environment))
        return sessions[-1]

    yield start
    for one in sessions:
        one.process.kill()
        one.process.wait()
        one.leaves_nothing()


def test_whoever_does_not_use_it_pays_nothing_for_it(session):
    text = """
import sys

def test_what_is_imported():
    assert "_raylaunch_pytest_plugin" in sys.modules
    assert not {"raylaunch", "ray", "torch", "numpy"} & set(sys.modules)
"""
    one = session(text)
    assert one.outcomes() == {"test_what_is_imported": "PASSED"}, one.said()


@pytest.mark.slow
def test_the_example_of_the_page(session):
    """docs/testing.md: both files, as they stand there."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["test_train.py", "train.py"]
    one = session(dict(blocks))
    outcomes = one.outcomes()
    assert (len(outcomes), set(outcomes.values())) == (2, {"PASSED"}), one.said()


@pytest.fixture
def somebody_s_cluster() -> Iterator[dict[str, str]]:
    """A cluster that is none of ours, in the address file of a machine of its own; yields the environment there."""
    folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")  # short: sockets lie below it
    os.mkdir(f"{folder}/ray")
    environment = {"RAY_TMPDIR": folder}
    with subprocess.Popen(
        [sys.executable, "-c", SOMEBODY_S_CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        address = next(line.split()[1] for line in process.stdout if line.startswith("cluster "))
        yield {**environment, "SOMEBODY_S": address}
        process.stdin.close()
        process.wait(LONGEST)
    shutil.rmtree(folder)


STORIES = f"""
import os, subprocess, sys, time
from pathlib import Path
import pytest
import raylaunch

notes = Path(os.environ["NOTES"])

def stays():
    subprocess.Popen(["sleep", "1001"], start_new_session=True)
    (notes / f"rank {{raylaunch.get_context().rank}}").touch()
    time.sleep(1000)

def ranks():
    context = raylaunch.get_context()
    return context.rank, context.world_size, os.environ.get("RAY_ADDRESS")

def at(**environment):
    environment = {{**{{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}}, **environment}}
    out = subprocess.run([sys.executable, "-c", {WHERE!r}], capture_output=True, text=True, env=environment)
    return next(line.split()[1] for line in out.stdout.splitlines() if line.startswith("at "))

def test_1_fails_in_the_middle_of_everything(raylaunch_cluster):
    import ray
    from ray.util.placement_group import placement_group

    run = raylaunch_cluster.start_run(stays, num_workers=2, spares=0, run_id="the-same")
    run.wait_until(lambda: (notes / "rank 0").exists() and (notes / "rank 1").exists(), "both ranks")
    (notes / "paused").write_text(str(raylaunch_cluster.pause_worker(run, 1)))

    @ray.remote(num_cpus=0)
    class Stays:
        def there(self):
            return True

    ray.get(Stays.options(name="stays", lifetime="detached").remote().there.remote())
    ray.get(placement_group([{{"CPU": 1}}], lifetime="detached", name="stays").ready())
    assert False, "on purpose"

def test_2_finds_a_clean_cluster(raylaunch_cluster):
    assert raylaunch_cluster.as_new()
    assert subprocess.run(["pgrep", "-f", "sleep 1001"]).returncode == 1
    assert not os.path.exists("/proc/" + (notes / "paused").read_text())
    run = raylaunch_cluster.start_run(ranks, num_workers=4, spares=0, run_id="the-same")
    assert list(run.result()) == [(rank, 4, None) for rank in range(4)]
    (notes / "second").write_text(raylaunch_cluster.address)

def test_3_gets_the_same_cluster_and_touches_no_other(raylaunch_cluster):
    assert (notes / "second").read_text() == raylaunch_cluster.address
    assert os.environ["RAY_ADDRESS"] == raylaunch_cluster.address
    assert at() == os.environ["SOMEBODY_S"]  # a bare ray.init() elsewhere on the machine
    assert at(RAY_ADDRESS=os.environ["RAY_ADDRESS"]) == raylaunch_cluster.address
    assert len(raylaunch.run(ranks, num_workers=2, spares=0)) == 2

def test_4_wants_another_size(raylaunch_cluster_factory):
    import ray

    with pytest.raises(raylaunch.ConfigError, match="cpus=-1: must be a whole number"):
        raylaunch_cluster_factory(cpus=-1)
    assert not ray.is_initialized()

def test_5_wants_another_size(raylaunch_cluster_factory):
    import ray

    cluster = raylaunch_cluster_factory(nodes=1, cpus=1, gpus=2)
    assert ray.cluster_resources()["GPU"] == 2
    with pytest.raises(pytest.fail.Exception, match="a test has one cluster"):
        raylaunch_cluster_factory(nodes=1, cpus=1, gpus=2)

def test_6_has_its_environment_back():
    import ray

    assert os.environ["RAY_ADDRESS"] == "192.0.2.1:6379"
    assert not ray.is_initialized()
    assert at() == os.environ["SOMEBODY_S"]
"""


@pytest.mark.slow
def test_each_test_finds_a_clean_cluster_and_no_other_is_touched(session, somebody_s_cluster):
    """RAY_ADDRESS names a production cluster, and the machine's address file somebody's."""
    address_file = Path(somebody_s_cluster["RAY_TMPDIR"], "ray", "ray_current_cluster")
    assert address_file.read_text() == somebody_s_cluster["SOMEBODY_S"]
    one = session(STORIES, RAY_ADDRESS="192.0.2.1:6379", **somebody_s_cluster)
    outcomes = one.outcomes()
    assert {test[:6]: outcome for test, outcome in outcomes.items()} == {
        "test_1": "FAILED",
        **{f"test_{number}": "PASSED" for number in range(2, 7)},
    }, one.said()
    assert "on purpose" in one.said()
    assert address_file.read_text() == somebody_s_cluster["SOMEBODY_S"]


IN_PARALLEL = """
import os, time
from pathlib import Path
import pytest
import raylaunch

notes = Path(os.environ["NOTES"])

@pytest.mark.parametrize("me", [0, 1])
def test_has_its_own_cluster_at_the_same_time(raylaunch_cluster, me):
    (notes / f"{me}.part").write_text(raylaunch_cluster.address)
    (notes / f"{me}.part").rename(notes / f"{me}.address")
    other = notes / f"{1 - me}.address"
    run = raylaunch_cluster.start_run(os.getpid, num_workers=2, spares=0, run_id="the-same")
    assert len(set(run.result())) == 2
    until = time.monotonic() + 60
    while not other.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert other.read_text() != raylaunch_cluster.address
"""


@pytest.mark.slow
def test_each_worker_of_xdist_has_its_own_cluster(session):
    one = session(IN_PARALLEL, "-n", "2")
    one.outcomes()
    assert "2 passed" in one.said(), one.said()


IN_THE_MIDDLE = """
import os, time
from pathlib import Path
import raylaunch

notes = Path(os.environ["NOTES"])

def stays():
    import subprocess
    subprocess.Popen(["sleep", "1002"], start_new_session=True)
    (notes / f"rank {raylaunch.get_context().rank}").touch()
    time.sleep(1000)

def test_is_interrupted(raylaunch_cluster):
    run = raylaunch_cluster.start_run(stays, num_workers=2, spares=0)
    run.running()
    raylaunch_cluster.pause_worker(run, 1)
    (notes / "now").touch()
    run.result(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_session_leaves_nothing(session, tmp_path, how):
    one = session(IN_THE_MIDDLE)
    names = ["rank 0", "rank 1", "now"]

    def reached() -> bool:
        assert one.process.poll() is None, one.said()
        return all((tmp_path / name).exists() for name in names)

    eventually(reached, "the middle", BUSY)
    assert [words for words in one.left() if "sleep" in words]
    one.process.send_signal(how)
    assert one.process.wait(LONGEST) != 0, one.said()
    one.leaves_nothing()
