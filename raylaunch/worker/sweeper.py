"""The sweeper: a plain process beside each node agent; it sees that nothing of a run stays on its node, whatever dies.

It waits until the agent is gone, however it went; one that stays stopped (SIGSTOP) for a lease it ends, so that there
can be another. From then on it ends what a worker has left when the worker is gone; and when the raylet goes, which
would have ended the workers, it ends them too, stopped ones included. It goes when nothing of the run is left here.
Standard library only, no Ray, no threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import Watch, end_process, forget_last_words, strays, wait_for_end, workers_in

#: How long one process may take to be gone after its SIGKILL, in seconds.
END_SECONDS = 3.0


def start_sweeper(token: str, directory: str, *, raylet: Process, agent: Process, lease: float) -> None:
    """Start one, in a session of its own, for a node's agent, which may be stopped for `lease` seconds."""
    # Without the run's variables: it is no process of the run.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAYLAUNCH_")}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    starter = subprocess.Popen(
        [sys.executable, "-S", "-m", __name__, json.dumps([token, directory, asdict(raylet), asdict(agent), lease])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=environ,
    )
    starter.wait()


def sweep(token: str, directory: str, raylet: Process) -> None:
    """End what is left of a run, as soon as it may be ended; returns when nothing is."""
    with Watch(raylet) as ray_lives, contextlib.ExitStack() as held:
        watches: dict[Process, Watch] = {}
        while True:
            found = strays(token, directory)  # first: whoever started one of them is in the directory by now
            for worker in workers_in(directory):
                if worker not in watches:
                    watches[worker] = held.enter_context(Watch(worker))
            if not ray_lives.alive():
                for watch in watches.values():
                    watch.kill()
            gone = {worker for worker, watch in watches.items() if watch.wait(0 if ray_lives.alive() else END_SECONDS)}
            for process, worker in found:
                with Watch(worker) as watch:  # it may be another node's: several may be on one machine
                    ended = not watch.alive()
                if ended:
                    end_process(process, END_SECONDS)
            for worker in gone:
                forget_last_words(directory, worker)
                watches.pop(worker).close()
            if not watches:
                break
            poller = select.poll()
            for watch in (*watches.values(), *([ray_lives] if ray_lives.alive() else [])):
                poller.register(watch.fileno(), select.POLLIN)
            poller.poll()
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """The process's own beginning and end."""
    token, directory, raylet, agent, lease = json.loads(sys.argv[1])
    if os.fork():  # nobody's child: Ray 2.60 kills a worker's children when the worker leaves in order
        os._exit(0)
    wait_for_end(Process(**agent), lease)
    sweep(token, directory, Process(**raylet))


if __name__ == "__main__":
    main()
