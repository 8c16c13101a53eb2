"""The model card of a compressed model: the README.md in its folder."""

from __future__ import annotations

import re

from optimum_prune.machine import strict_yaml
from optimum_prune.passes.base import Stage
from optimum_prune.report.published import is_place, last_part
from optimum_prune.report.report import HEAD, Report
from optimum_prune.report.serving import STOCK, exporters
from optimum_prune.report.tables import escaped, markdown, of_markdown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The name of a model of the Hub, with that of its owner in front."""
PLAIN = re.compile(r"[\w.+@ -]+")
"""Names that can stand in Markdown as they are."""

COLUMNS = ("engine", "run with", "how")


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

Made from {_code(name)} by optimum-prune. {_how_it_loads(report.stock)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments}{"" if report.stock else ", trust_remote_code=True"})
tokenizer = AutoTokenizer.from_pretrained({arguments})
```

{markdown(HEAD, report.rows())}

{notes}
{_who_serves(report)}{_beside(report)}
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
    """What runs such models, with the commands for what passes write, where that is known; of quantized ones, what loads them."""
    if quantized := [outcome for outcome in report.passes if outcome.stage is Stage.QUANTIZE]:
        by, artefact = ", ".join(_code(outcome.name) for outcome in quantized), quantized[-1].artefact
        versions = artefact.versions.items() if artefact else ()
        needed = ", ".join(f"{name} {version}" for name, version in versions if name != "python")
        return f"\nIts weights are quantized (by {by}), and so it loads with what quantized them: {escaped(needed)}.\n"
    rows = report.served_by()
    if not rows:
        return ""
    return f"\nWhat runs it, before anything is quantized:\n\n{of_markdown(COLUMNS, rows)}\n{_commands(report)}"


def _beside(report: Report) -> str:
    """What lies beside the weights."""
    lines = "".join(
        f"\n- {_code(name, '/')}, by the pass {_code(name)}; {_code(name, '/example.py')} runs it"
        for name in _exported(report)
    )
    return f"\nBeside the weights:\n{lines}\n" if lines else ""


def _code(name: str, behind: str = "") -> str:
    """A name in Markdown, and what stands behind it, as code if it can stand there as it is."""
    return f"`{name}{behind}`" if PLAIN.fullmatch(name) else escaped(name + behind)


def _exported(report: Report) -> list[str]:
    """The folders of artefacts that lie in that of the model."""
    return [outcome.name for outcome in report.passes if outcome.stage is Stage.EXPORT and outcome.artefact]


def _commands(report: Report) -> str:
    """The commands of passes that write what engines read; but for what is there already."""
    able = exporters(report.architecture, stock=report.stock)
    if not (passes := [name for name in able if name not in _exported(report)]):
        return ""
    extras = ",".join(name for name in passes if name != STOCK)
    lines = [f'pip install "optimum-prune[{extras}]"' if extras else "pip install optimum-prune"]
    lines += [
        f"optimum-cli compress export {name} --model path/to/this/folder --text any.txt --output OUT-{name}"
        for name in passes
    ]
    example, commands = f"OUT-{passes[0]}/{passes[0]}", "\n".join(lines)
    return f"\nWhat passes write is in a folder of their name then, such as `{example}`:\n\n```bash\n{commands}\n```\n"


def _how_it_loads(stock: bool) -> str:
    if stock:
        return "It loads in stock transformers:"
    return "Its layers differ in shape: it loads by the code beside its weights, or after `import optimum_prune`:"
