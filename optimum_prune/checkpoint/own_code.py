"""Code that comes with a checkpoint: which files it lies in, by what the checkpoint's JSON files name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from optimum_prune.machine.given_files import mapping_in

NAMED_MODULE = re.compile(r"(?:.*--)?([A-Za-z_]\w*)\.\w+")
"""What `auto_map` says: a module of the folder, and what is in it."""
IMPORTED = re.compile(r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+(\w+)", re.MULTILINE)


def code_files(configs: Iterable[Path], file_of: Callable[[str], Path | None]) -> set[str]:
    """The names of the files that JSON files name as code, and of those that these import of their like; they need not be there.

    Args:
        file_of: where a file of a name is, if it is there.
    """
    named = [mapping_in(file).get("auto_map") for file in configs]
    values = [value for each in named if isinstance(each, dict) for value in each.values()]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    ahead = [match[1] for match in map(NAMED_MODULE.fullmatch, map(str, names)) if match]
    found: set[str] = set()
    while ahead:
        name = f"{ahead.pop()}.py"
        if name in found:
            continue
        found.add(name)
        with suppress(OSError, ValueError):
            file = file_of(name)
            text = "" if file is None or not file.is_file() else file.read_text(encoding="utf-8")
            ahead += [match[1] or match[2] for match in IMPORTED.finditer(text)]
    return found
