"""A training program with the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training import BATCH, SAVE_EVERY, Samples, account, as_script, in_step
from transformers import Trainer, TrainerCallback, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.linear(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


class Watch(TrainerCallback):
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.resumed_from = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.resumed_from = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        in_step(state.global_step + 1, self.folder)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, labels = zip(*samples, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def train(folder: str) -> dict[str, Any]:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_steps=SAVE_EVERY,
        report_to="none",
        disable_tqdm=True,
    )
    data = Samples(ranks=arguments.world_size)
    watch = Watch(folder)
    trainer = Trainer(Model(), arguments, data_collator=collate, train_dataset=data, callbacks=[watch])
    trainer.train(resume_from_checkpoint=newest(folder))
    return account(arguments.world_size, watch.resumed_from, trainer.state.global_step, trainer.model, data)


def newest(folder: str) -> str | None:
    # trainer_state.json is written last: a checkpoint without it was broken off
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


if __name__ == "__main__":
    as_script(train)
