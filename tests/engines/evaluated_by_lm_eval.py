"""Lets lm-eval evaluate models on tasks of ours: python evaluated_by_lm_eval.py RESULT TASKS FOLDER ..., in an environment that has it."""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(result: str, tasks: str, *folders: str) -> None:
    """What each model says of each choice, as log-likelihoods, and its accuracy."""
    manager, told = TaskManager(include_path=tasks), []
    for folder in folders:
        asked = f"pretrained={folder},trust_remote_code=True,dtype=float32"
        found = simple_evaluate("hf", model_args=asked, tasks=["own"], task_manager=manager, device="cpu")
        likely = [[float(each[0][0]) for each in sample["resps"]] for sample in found["samples"]["own"]]
        told.append({"accuracy": found["results"]["own"]["acc,none"], "likely": likely})
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
