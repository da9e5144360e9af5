"""A training program with Hugging Face Accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from training import BATCH, SAVE_EVERY, Samples, account, as_script, in_step


def train(folder: str) -> dict[str, Any]:
    accelerator = Accelerator()
    set_seed(0)
    data = Samples(ranks=accelerator.num_processes)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = resume(accelerator, folder)
    resumed_from = step
    for inputs, targets in accelerator.skip_first_batches(loader, step):
        in_step(step + 1, folder)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SAVE_EVERY == 0:
            save(accelerator, folder, step)
    accelerator.end_training()
    return account(accelerator.num_processes, resumed_from, step, accelerator.unwrap_model(model), data)


def resume(accelerator: Accelerator, folder: str) -> int:
    newest = [max((int(path.name[5:]) for path in Path(folder).glob("step-*")), default=0)]
    broadcast_object_list(newest)  # rank 0 says which
    if newest[0]:
        accelerator.load_state(f"{folder}/step-{newest[0]}")
    return newest[0]


def save(accelerator: Accelerator, folder: str, step: int) -> None:
    accelerator.save_state(f"{folder}/unfinished")
    accelerator.wait_for_everyone()  # each rank has written its part
    if accelerator.is_main_process:
        os.replace(f"{folder}/unfinished", f"{folder}/step-{step}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    as_script(train)
