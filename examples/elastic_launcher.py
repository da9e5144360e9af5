"""ElasticLauncher: two ranks fit a line; the driver asks for a checkpoint on the way, and stops them when it is good.

With --eager the same script runs in one process, without Ray, as a debugger likes it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from raylaunch import ElasticLauncher
from raylaunch.elastic import split_batch

STEPS = 200_000  # far more than it needs


def fit(launcher: ElasticLauncher, checkpoint: Path) -> float:
    torch.manual_seed(0)
    device = launcher.assigned_device
    x = torch.linspace(-1, 1, 64, device=device).unsqueeze(1)
    model = DistributedDataParallel(torch.nn.Linear(1, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = split_batch(x)  # the process group is there already: each rank takes its part

    def save() -> None:
        if launcher.rank == 0:
            torch.save(model.module.state_dict(), checkpoint)

    step = 0
    while launcher.between_steps(step, STEPS, save=save):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(mine), 3 * mine + 1).backward()
        optimizer.step()
        step += 1
    return float(model.module.weight.item())


def direct(launcher: ElasticLauncher) -> None:
    """What the driver asks for while the ranks train; in a thread, since the launch has the main one."""
    events = launcher.events
    while events.iteration < 300:
        time.sleep(0.05)
    events.trigger_save_checkpoint.set()
    events.finished_save_checkpoint.wait(60)
    events.stop_all_tasks.set()


if __name__ == "__main__":
    eager = "--eager" in sys.argv
    if not eager:
        import ray

        # A Ray of its own on this machine. On a cluster leave this out, and choose devices="cuda:*" there.
        ray.init(address="local", num_cpus=2, include_dashboard=False)
    launcher = ElasticLauncher("cpu:0-1", max_restarts=3, on_interrupt="save_then_stop", eager_mode=eager).freeze()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "line.pt")
        threading.Thread(target=direct, args=(launcher,), daemon=True).start()
        slopes = launcher(fit, launcher, checkpoint)
        saved = float(torch.load(checkpoint)["weight"].item())
    print(f"slopes by rank: {[round(slope, 3) for slope in slopes]}; of the checkpoint: {saved:.3f}")
    assert all(abs(slope - 3) < 0.01 for slope in [*slopes, saved])
