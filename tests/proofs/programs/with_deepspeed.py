"""A training program with DeepSpeed: ZeRO, stage 1."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from training import BATCH, SAVE_EVERY, Samples, account, as_script, in_step

CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    # torch's own AdamW: DeepSpeed's would be compiled first
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def train(folder: str) -> dict[str, Any]:
    deepspeed.init_distributed()
    torch.manual_seed(0)
    data = Samples(ranks=deepspeed.comm.get_world_size())
    model = torch.nn.Linear(4, 1)
    engine, _, _, _ = deepspeed.initialize(model=model, config=CONFIG)
    loader = engine.deepspeed_io(data, num_local_io_workers=0)  # in this process, so that `data` knows what was taken

    engine.load_checkpoint(f"{folder}/checkpoints")  # the one that the file `latest` there names, if there is one
    resumed_from = engine.global_steps
    for batch, (inputs, targets) in enumerate(loader):
        if batch < resumed_from:
            continue
        in_step(engine.global_steps + 1, folder)
        engine.backward(torch.nn.functional.mse_loss(engine(inputs), targets))
        engine.step()
        if engine.global_steps % SAVE_EVERY == 0:
            engine.save_checkpoint(f"{folder}/checkpoints")
    return account(engine.world_size, resumed_from, engine.global_steps, engine.module, data)


if __name__ == "__main__":
    as_script(train)
