"""Writes what the code knows into the README: `python -m optimum_prune.cli.readme README.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from optimum_prune.hooks.plugins import BUILT_IN, Plugins, extras, load
from optimum_prune.options import options_of

NO_PLUGINS = ("demo", "test", "lint")
"""Extras that bring no pass."""


def passes_table(plugins: Plugins, *, of_extras: bool = False) -> str:
    """The built-in passes as a Markdown table, or those that the extras bring."""
    rows = ["| pass | stage | what it does | options |", "|---|---|---|---|"]
    for name, step in sorted(plugins.passes.items(), key=lambda item: (item[1].stage, item[0])):
        if name in extras() if of_extras else plugins.providers[name].distribution == BUILT_IN:
            options = ", ".join(f"`{option}`" for option in options_of(step))
            rows.append(f"| `{name}` | {step.stage.name} | {step.summary()} | {options} |")
    return "\n".join(rows)


def extras_missing(plugins: Plugins) -> list[str]:
    """The extras whose plugins are not installed."""
    return [extra for extra in extras() if extra not in (*NO_PLUGINS, *plugins.passes)]


def families_table(plugins: Plugins) -> str:
    """The families as a Markdown table."""
    rows = ["| family | `model_type` |", "|---|---|"]
    rows += [
        f"| {family.name} | {', '.join(f'`{kind}`' for kind in family.model_types)} |" for family in plugins.families
    ]
    return "\n".join(rows)


def filled_in(readme: str, plugins: Plugins, own_method: str) -> str:
    """The README with its tables as the code has them now, and with the example of a method of one's own."""
    parts = {
        "passes": passes_table(plugins),
        "families": families_table(plugins),
        "own-method": f"```python\n{own_method.rstrip()}\n```",
    }
    if extras_missing(plugins) == []:
        parts["plugin-passes"] = passes_table(plugins, of_extras=True)
    for name, text in parts.items():
        before, begin, rest = readme.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        readme = f"{before}{begin}{text}\n{end}{after}" if begin and end else readme
    return readme


if __name__ == "__main__":
    path = Path(sys.argv[1])
    example = path.parent / "examples" / "own_method" / "every_other.py"
    text = filled_in(path.read_text(encoding="utf-8"), load(), example.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
