"""Lets trl train models: python trained_by_trl.py RESULT TEXTS FOLDER ..., in an environment that has it."""

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main(result: str, texts: str, *folders: str) -> None:
    """The losses of each model, step by step."""
    rows, told = Dataset.from_dict({"text": json.loads(Path(texts).read_text())}), []
    for folder in folders:
        with tempfile.TemporaryDirectory() as aside:
            asked = SFTConfig(
                output_dir=aside,
                max_steps=4,
                logging_steps=1,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                report_to="none",
                use_cpu=True,
                bf16=False,
                model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
            )
            trainer = SFTTrainer(folder, args=asked, train_dataset=rows)
            trainer.train()
            told.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
