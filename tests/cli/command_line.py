"""Commands for tests: run in processes of their own, and what they leave."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

OPTIMUM_CLI = Path(sys.executable).parent / "optimum-cli"
MODULE = (sys.executable, "-m", "optimum_prune")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def recipe_file(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def common(model, text, *more):
    """The flags of most runs here, and some more, which take the place of those of the same name."""
    flags = {"--model": model, "--text": text, "--samples": 6, "--length": 32, "--eval-samples": 3, "--device": "cpu"}
    return [part for flag, value in flags.items() if flag not in more for part in (flag, value)] + list(more)


def process(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, **options
    )


def one_sentence(error):
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert "Traceback" not in error
    assert re.search(r"error: \S|interrupted", lines[0])
    return lines[0]
