"""The model card of a compressed model: the README.md in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optimum_prune.machine import strict_yaml
from optimum_prune.passes.base import Stage
from optimum_prune.report.published import is_place, last_part
from optimum_prune.report.report import HEAD, Report
from optimum_prune.report.tables import escaped, markdown, of_markdown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The name of a model of the Hub, with that of its owner in front."""
PLAIN = re.compile(r"[\w.+@ /-]+")
"""Names that can stand in Markdown as they are."""

COLUMNS = ("engine", "run with", "how")
READY = ("a file by the pass", "a graph by the pass")
"""How the rows begin of what a pass writes something for from such a model as it is."""
STOCK = "padded"
"""The pass that writes a stock checkpoint for whatever reads no other."""


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
    """What runs such models, with the commands for what passes write, where that is known; of quantized ones, what loads them."""
    exported = ((name, _code(f"{name}/example.py")) for name in _exported(report))
    beside = "".join(
        f"\n- {_code(f'{name}/')}, by the pass {_code(name)}; {example} runs it" for name, example in exported
    )
    beside = f"\nBeside the weights:\n{beside}\n" if beside else ""
    if quantized := [outcome for outcome in report.passes if outcome.stage is Stage.QUANTIZE]:
        by, (*_, last) = ", ".join(_code(outcome.name) for outcome in quantized), quantized
        versions = last.artefact.versions if last.artefact else {}
        needed = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
        return f"\nIts weights are quantized (by {by}), and so it loads with what quantized them: {escaped(needed)}.\n{beside}"
    rows = report.served_by()
    if not rows:
        return beside
    return f"\nWhat runs it, before anything is quantized:\n\n{of_markdown(COLUMNS, rows)}\n{_commands(rows, report)}{beside}"


def _code(name: str) -> str:
    """A name in Markdown, as code if it can stand there as it is."""
    return f"`{name}`" if PLAIN.fullmatch(name) else escaped(name)


def _exported(report: Report) -> list[str]:
    """The folders of artefacts that lie in that of the model."""
    return [outcome.name for outcome in report.passes if outcome.stage is Stage.EXPORT and outcome.artefact]


def _commands(rows: Sequence[tuple[str, str, str]], report: Report) -> str:
    """The commands of passes that rows name and that can read this model; but for what is there already."""
    named = [re.findall("`([a-z-]+)`", how) for _, _, how in rows if how.startswith(READY) and f"`{STOCK}`" not in how]
    passes = list(dict.fromkeys(found[0] for found in named))
    passes += [STOCK for _, _, how in rows if f"`{STOCK}`" in how][:1]
    if not (passes := [name for name in passes if name not in _exported(report)]):
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
