"""lm-eval measures every form that is written, in the environment that OPTIMUM_PRUNE_PYTHON_TOOLS names; `make test-engines` makes one."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from forms import CUTS, save, told_by

PYTHON = os.environ.get("OPTIMUM_PRUNE_PYTHON_TOOLS")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="OPTIMUM_PRUNE_PYTHON_TOOLS does not name where lm-eval is"),
]
TASK = """task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


def test_it_measures_what_transformers_computes(tmp_path):
    words = tiny.text(900).split()
    rows = [
        {"query": " ".join(words[start : start + 12]), "choices": words[start + 12 : start + 15], "gold": start % 3}
        for start in range(0, 800, 40)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(questions=questions))
    models = {kind: save("llama", kind, tmp_path / kind) for kind in CUTS}
    given, sets = [tmp_path / "tasks", *(tmp_path / kind for kind in CUTS)], str(tmp_path / "sets")
    found = told_by(PYTHON, "evaluated_by_lm_eval.py", tmp_path, *given, HF_DATASETS_CACHE=sets)
    tokenizer = tiny.tokenizer()
    for model, told in zip(models.values(), found, strict=True):
        expected = torch.tensor(
            [[_likely(model, tokenizer, row["query"], each) for each in row["choices"]] for row in rows]
        )
        torch.testing.assert_close(torch.tensor(told["likely"]), expected, rtol=1e-4, atol=1e-4)
        right = expected.argmax(1) == torch.tensor([row["gold"] for row in rows])
        assert told["accuracy"] == pytest.approx(right.double().mean().item())


@torch.no_grad()
def _likely(model, tokenizer, query: str, choice: str) -> float:
    """Log-likelihood of a choice behind a query."""
    before = tokenizer(query, return_tensors="pt").input_ids
    whole = tokenizer(f"{query} {choice}", return_tensors="pt").input_ids
    scores = model(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
    return scores[before.shape[1] - 1 :].sum().item()
