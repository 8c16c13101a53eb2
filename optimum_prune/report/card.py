"""The model card of a compressed model: the README.md in its folder."""

from __future__ import annotations

from optimum_prune.report.report import HEAD, Report
from optimum_prune.report.tables import markdown


def model_card(report: Report, recipe: str) -> str:
    """The model card of what a run made.

    Args:
        recipe: as YAML.
    """
    name = report.model.rstrip("/").split("/")[-1]
    arguments = '"path/to/this/folder"'
    notes = "\n".join(f"- {note}" for note in report.notes())
    return f"""{_header(report.model)}

# {name}, compressed

Made from `{name}` by optimum-prune. {_how_it_loads(report.stock)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments}{"" if report.stock else ", trust_remote_code=True"})
tokenizer = AutoTokenizer.from_pretrained({arguments})
```

{markdown(HEAD, report.rows())}

{notes}

The recipe:

```yaml
{recipe.rstrip()}
```

`compression/report.json` holds every figure, `compression/cuts.json` what was kept.
"""


def _header(model: str) -> str:
    """The card's metadata, as the Hub reads it; a model of the Hub is named as the base."""
    lines = ["---", "library_name: transformers", "tags:", "- optimum-prune", "- pruned"]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".gguf"):
        lines.append(f"base_model: {model}")
    return "\n".join([*lines, "---"])


def _how_it_loads(stock: bool) -> str:
    if stock:
        return "It loads in stock transformers:"
    return "Its layers differ in shape: it loads by the modelling file beside its weights, or after `import optimum_prune`:"
