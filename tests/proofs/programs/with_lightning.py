"""A training program with Lightning."""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import BATCH, SAVE_EVERY, Samples, account, as_script, in_step


class Model(lightning.LightningModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.folder = folder
        self.resumed_from = 0

    def on_train_start(self) -> None:
        self.resumed_from = self.global_step

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        in_step(self.global_step + 1, self.folder)
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.linear(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def train(folder: str) -> dict[str, Any]:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        # Lightning 2.6 counts neither: on CPUs devices="auto" is one process that trains alone
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=1,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
    )
    data = Samples(ranks=trainer.world_size)
    model = Model(folder)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True), ckpt_path="last")
    return account(trainer.world_size, model.resumed_from, trainer.global_step, model, data)


if __name__ == "__main__":
    as_script(train)
