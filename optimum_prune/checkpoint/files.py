"""Files of a checkpoint, in a folder or on the Hub, by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_prune.checkpoint.quiet import quietly

CONFIG = "config.json"
QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def file_names(source: str) -> list[str]:
    """The names of the files of a folder, or of a model on the Hub as far as they are known."""
    from huggingface_hub import HfApi

    folder = Path(source)
    if not folder.is_dir():
        try:
            return sorted(HfApi().list_repo_files(source))
        except Exception:  # no network: what was fetched is there
            config = cached(source, CONFIG)
        if config is None:
            return []
        folder = config.parent
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def cached(source: str, name: str) -> Path | None:
    """A file of a model on the Hub, fetched if it is not here yet; None if it is not there, or nobody can say."""
    from transformers.utils import cached_file

    try:
        with quietly():
            found = cached_file(source, name, **QUIETLY)
    except Exception:  # no such model, which is said where its config is read
        return None
    return None if found is None else Path(found)
