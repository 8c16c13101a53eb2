"""Runs that were killed when their output was in its place, and before what they had kept as unfinished was gone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from optimum_prune.errors import OutputError
from optimum_prune.machine.given_files import mapping_in
from optimum_prune.machine.whole_files import whole
from optimum_prune.run.fingerprints import files_fingerprint
from optimum_prune.run.known import unfinished_folder
from optimum_prune.run.ownership import check_unfinished
from optimum_prune.run.unfinished import Unfinished

FINISHED = "finished.json"
"""In a folder of what is unfinished: the fingerprint of the output that was about to get its place."""


def note_finished(unfinished: Path, result: Path) -> None:
    """Notes, in a folder of what is unfinished, which output it has led to; nothing if there is none."""
    with suppress(OSError):
        if unfinished.is_dir():
            with whole(unfinished / FINISHED) as partial:
                partial.write_text(json.dumps({"files": files_fingerprint(result)}), encoding="utf-8")


def remove_finished(output: Path) -> bool:
    """Removes what is called unfinished beside an output that it has led to; to be called by whoever holds the output's lock.

    Returns:
        Whether there was such.
    """
    folder = unfinished_folder(output)
    try:
        check_unfinished(folder)
        noted = mapping_in(folder / FINISHED).get("files")
        if noted is not None and output.is_dir() and not output.is_symlink() and files_fingerprint(output) == noted:
            Unfinished(output, {}).remove()
            return True
        (folder / FINISHED).unlink(missing_ok=True)  # of a run that was killed a moment earlier
    except (OSError, OutputError):
        pass
    return False
