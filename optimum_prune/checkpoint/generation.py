"""Generation configs: the defaults with which a model generates, made valid before a run, since transformers saves no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_prune.errors import CheckpointError, reason

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Fields on which it depends whether others mean anything."""
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config_of(folder: Path) -> GenerationConfig:
    """The generation config of a folder, or, where it has none, what its config says of generation.

    Raises:
        Exception: what transformers raises where a file cannot be read.
    """
    from transformers import GenerationConfig

    if (folder / FILE).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def check_generation(file: Path, name: str) -> str:
    """Refuses a file that is no generation config, or one that cannot be made valid; returns what `settle` does.

    Raises:
        CheckpointError: it is not.
    """
    from transformers import GenerationConfig

    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(plain, dict):
            raise TypeError("it is no JSON object")
        config = GenerationConfig.from_dict(plain)
    except Exception as error:  # whatever is not as transformers expects it
        raise CheckpointError(
            f"The {FILE} of {name} cannot be read: {reason(error)} Mend it, or take it away."
        ) from error
    return settle(config, name)


def settle(config: GenerationConfig, name: str) -> str:
    """Makes a generation config valid, in place.

    Sampling is switched on where its settings are given and nothing says that they are not to be used; whatever else has no effect, or
    cannot be, is left to the default.

    Returns:
        What was changed, as a sentence; empty if nothing was.

    Raises:
        CheckpointError: it stays invalid.
    """
    if not (flaw := _flaw(config)):
        return ""
    changed: dict[str, object] = {}
    while flaw:
        named = [field for field in re.findall(r"`(\w+)`", flaw) if field not in MODES]
        named = [field for field in named if getattr(config, field, None) is not None]
        if config.do_sample is None and set(named) & set(SAMPLING):
            config.do_sample = changed["do_sample"] = True
        elif named:
            for field in named:
                setattr(config, field, None)
                changed[field] = None
        else:
            raise CheckpointError(
                f"The {FILE} of {name} is not valid, and cannot be saved: {reason(ValueError(flaw))} Mend it."
            )
        flaw = _flaw(config)
    done = ", ".join(f"'{field}' is {'left out' if value is None else value}" for field, value in changed.items())
    return f"The {FILE} of {name} is not valid; as it is saved, {done}."


def _flaw(config: GenerationConfig) -> str:
    """Why a generation config is not valid, in the words of transformers; empty if it is."""
    try:
        config.validate(strict=True)
    except Exception as error:  # a ValueError; a TypeError where a number should be
        return str(error) or reason(error)
    return ""
