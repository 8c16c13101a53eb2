"""The model card of a compressed model: the README.md in its folder."""

from __future__ import annotations

import re

from optimum_prune.machine import strict_yaml
from optimum_prune.report.published import is_place, last_part
from optimum_prune.report.report import HEAD, Report
from optimum_prune.report.tables import escaped, markdown, of_markdown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The name of a model of the Hub, with that of its owner in front."""
PLAIN = re.compile(r"[\w.+@ -]+")
"""Names that can stand in Markdown as they are."""

COLUMNS = ("engine", "run with", "how")
PASSES = """
Passes are of optimum-prune, and write what they are named after beside a copy of this model, in `OUT/gguf` for example:

```bash
pip install "optimum-prune[gguf]"
optimum-cli compress export gguf --model path/to/this/folder --text any.txt --output OUT
```
"""


def model_card(report: Report, recipe: str) -> str:
    """The model card of what a run made.

    Args:
        recipe: as YAML.
    """
    name = last_part(report.model)
    arguments = '"path/to/this/folder"'
    notes = "\n".join(f"- {escaped(note)}" for note in report.notes())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    return f"""{_header(report.model)}

# {escaped(name)}, compressed

Made from {f"`{name}`" if PLAIN.fullmatch(name) else escaped(name)} by optimum-prune. {_how_it_loads(report.stock)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments}{"" if report.stock else ", trust_remote_code=True"})
tokenizer = AutoTokenizer.from_pretrained({arguments})
```

{markdown(HEAD, report.rows())}

{notes}
{_who_serves(report)}
The recipe:

{fence}yaml
{recipe.rstrip()}
{fence}

`compression/report.json` holds every figure, `compression/cuts.json` what was kept.
"""


def _header(model: str) -> str:
    """The card's metadata, as the Hub reads it; a model of the Hub is named as the base."""
    head: dict[str, object] = {"library_name": "transformers", "tags": ["optimum-prune", "pruned"]}
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf") and not is_place(model):
        head["base_model"] = model
    return f"---\n{strict_yaml.dump(head).rstrip()}\n---"


def _who_serves(report: Report) -> str:
    """A table of what runs such models; nothing where that is not known."""
    rows = report.served_by()
    return f"\nWhat runs it, before anything is quantized:\n\n{of_markdown(COLUMNS, rows)}\n{PASSES}\n" if rows else ""


def _how_it_loads(stock: bool) -> str:
    if stock:
        return "It loads in stock transformers:"
    return "Its layers differ in shape: it loads by the code beside its weights, or after `import optimum_prune`:"
