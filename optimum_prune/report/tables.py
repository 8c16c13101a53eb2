"""Tables of figures, for a terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from optimum_prune.errors import printable

Row = tuple[str, str, str, str]
"""The name of a figure, what it was before, what it is after, and the change."""
SPECIAL = re.compile(r"[\\`*\[\]|~#!]|(?<![^\W_])_|_(?![^\W_])")
"""What means something in Markdown where it stands."""


def compared(name: str, before: float, after: float, show: Callable[[float], str]) -> Row:
    """A row of a figure, with the change in percent of what it was before.

    Args:
        show: writes the figure.
    """
    percent = f"{100 * (after / before - 1):+.1f} %" if before else ""
    return name, show(before), show(after), percent


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as columns for a terminal; the columns after the first to the right if they are figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = ["<", *(">" if right else "<" for _ in widths[1:])]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A head and rows as a Markdown table, which shows them as they are."""
    return of_markdown(list(map(escaped, head)), [list(map(escaped, row)) for row in rows])


def of_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same of cells that are Markdown already."""
    first, *rest = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, f"|{'---|' * len(head)}", *rest])


def escaped(text: str) -> str:
    """A text as Markdown that shows it as it is, in one line, whatever it is."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\g<0>", plain)
