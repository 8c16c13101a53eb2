from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from reports import MARKDOWN, NOTES, REPORT

from optimum_prune.report.card import model_card
from optimum_prune.report.tables import aligned, compared, markdown

CARD = f"""\
---
library_name: transformers
tags:
- optimum-prune
- pruned
base_model: HuggingFaceTB/SmolLM2-135M
---

# SmolLM2-135M, compressed

Made from `SmolLM2-135M` by optimum-prune. It loads in stock transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{MARKDOWN}
{"".join(f"- {note}" + chr(10) for note in NOTES)}
Its weights are quantized (by `gptq`), and so it loads with what quantized them: torch 2.9.0.

Beside the weights:

- `onnx/`, by the pass `onnx`; `onnx/example.py` runs it

The recipe:

```yaml
passes:
- osscar
```

`compression/report.json` holds every figure, `compression/cuts.json` what was kept.
"""


def test_the_card_has_figures_notes_and_recipe():
    assert model_card(REPORT, "passes:\n- osscar\n") == CARD


def test_the_card_of_a_model_whose_layers_differ_says_how_it_loads():
    card = model_card(replace(REPORT, stock=False), "")
    assert "by the code beside its weights, or after `import optimum_prune`:" in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert "stock transformers" not in card


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("owner/name", "owner/name"),
        ("/models/small", None),
        ("models/small.gguf", None),
        ("./small", None),
        ("~/small", None),
        ("small", None),
        ("a/b/c", None),
    ],
)
def test_the_card_names_a_model_of_the_hub_as_its_base(model, base):
    head = yaml.safe_load(model_card(replace(REPORT, model=model), "").split("---")[1])
    assert head.pop("base_model", None) == base
    assert head == {"library_name": "transformers", "tags": ["optimum-prune", "pruned"]}


def test_the_card_names_a_folder_by_its_last_part():
    assert "# small, compressed" in model_card(replace(REPORT, model="/my/models/small/"), "")


def test_a_row_has_the_change_in_percent_unless_it_was_nothing():
    assert compared("it", 200, 150, str) == ("it", "200", "150", "-25.0 %")
    assert compared("it", 0, 150, str) == ("it", "0", "150", "")


def test_figures_are_aligned_to_the_right_and_words_to_the_left():
    rows = [("", "n"), ("one", "1"), ("a hundred", "100")]
    assert aligned(rows, right=True).split("\n") == ["             n", "one          1", "a hundred  100"]
    assert aligned(rows).split("\n") == ["           n", "one        1", "a hundred  100"]


def test_a_markdown_table_has_a_line_below_its_head():
    assert markdown(("", "n"), [("one", "1")]) == "|  | n |\n|---|---|\n| one | 1 |"
