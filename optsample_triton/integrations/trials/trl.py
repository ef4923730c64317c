"""One step of the trainer for TRL."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from optsample_triton.integrations.trials import tiny
from optsample_triton.integrations.trl import ISReshapeGRPOTrainer


def _lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def try_installed() -> str:
    """Train a tiny model for a step; what was tried, or an error."""
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = ISReshapeGRPOTrainer(
            model=tiny.save(Path(folder) / "model", seed=0),
            reward_funcs=_lengths,
            args=options,
            train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e"]}),
        )
        loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the first step is {loss}")
    return "one step of ISReshapeGRPOTrainer"


if __name__ == "__main__":
    print(try_installed())
