"""Whatever dies, and whenever: ten seconds later nothing of the run is left, found by looking at every process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from drivers import Driver
from harness import eventually, nothing_is_left

SECONDS = 10.0

#: Every rank has children of all sorts: a program and a fork in sessions of their own, a DataLoader's workers. They say
#: their pids by existing files. Rank 1 is deaf to SIGTERM, and stopped if wanted.
SCRIPT = """
import ray
from torch.utils.data import DataLoader

def children():
    yield subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
    fork = os.fork()
    if not fork:
        os.setsid()
        while True:
            time.sleep(1000)
    yield fork
    loader = iter(DataLoader(range(1000), num_workers=1))
    next(loader)
    kept.append(loader)
    yield from [worker.pid for worker in loader._workers]

kept = []

def live(rank):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for pid in [os.getpid(), *children()]:
        say(f"pid-{pid}")
    say(f"up-{rank}-{os.getpid()}")
    if "stopped" in sys.argv[4:] and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for("never")

class Trap:
    '''Holds a rank of one generation up while it forms.'''
    def __init__(self, generation):
        self.generation = generation
    def __reduce__(self):
        return spring, (self.generation,)

def spring(generation):
    context = raylaunch.get_context()
    if context.generation == generation:
        live(context.rank)
    return Trap(generation)

def train(trap):
    context = raylaunch.get_context()
    if context.generation == 1 and trap.generation == 2:
        say(f"up-{context.rank}-{os.getpid()}")
        wait_for("never")
    live(context.rank)

phase = sys.argv[4]
trap = Trap({"forming": 1, "re-forming": 2}.get(phase, 0))
raylaunch.run(
    train, args=(trap,), num_workers=2, spares=0, run_id=run_id, log_dir=log_dir,
    timeouts=raylaunch.Timeouts(stop=600),
)
"""


def pids_in(gates: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in gates.glob("pid-*") if path.suffix != ".part"]


def up(driver: Driver, number: int) -> list[Path]:
    """Wait until so many ranks, of all generations, have all their children."""
    return eventually(lambda: len(found := list(driver.gates.glob("up-*[0-9]"))) >= number and found, "ranks are up")


@pytest.mark.parametrize("stopped", [pytest.param("", id="all run"), pytest.param("stopped", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("forming", marks=pytest.mark.slow),
        "running",
        pytest.param("re-forming", marks=pytest.mark.slow),
        "tearing down",
    ],
)
def test_a_driver_that_is_killed_leaves_nothing(one_node, tmp_path, phase, stopped):
    driver = Driver(one_node, tmp_path, SCRIPT, arguments=(phase, stopped))
    try:
        ranks = up(driver, 2)
        if phase == "re-forming":
            os.kill(int(ranks[0].name.rpartition("-")[2]), signal.SIGKILL)
            up(driver, 4)
        if phase == "tearing down":
            driver.signal(signal.SIGINT)
            driver.wait_for_event("StopRequested")
        driver.signal(signal.SIGKILL)
        pids = pids_in(driver.gates)
        assert len(pids) == 8  # of each rank: itself, a program, a fork, a DataLoader's worker
        nothing_is_left(driver.log_dir, SECONDS, pids=pids)
        notes = Path(one_node.log_dir).parent / "raylaunch"
        eventually(lambda: not list(notes.glob(f"{driver.run_id}-*")), "the sweeper is done")
    finally:
        driver.end()
