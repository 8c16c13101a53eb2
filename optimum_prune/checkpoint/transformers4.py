"""Fields that transformers 4 reads in a checkpoint's JSON files where transformers 5 writes something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OLDER_NAMES = {
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""Fields of a config that transformers 4 knows by other names, by model type: its name, and that of transformers 5."""


def add_older_fields(folder: Path) -> None:
    """Adds to the JSON files of a checkpoint what transformers 4 reads where transformers 5 writes something else."""
    _edit_json(folder / "config.json", _with_older_rope)
    if (folder / "tokenizer_config.json").is_file():
        _edit_json(folder / "tokenizer_config.json", _with_older_tokenizer_class)


def _edit_json(file: Path, edit: Any) -> None:
    plain = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(edit(plain), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields of transformers 4, which ignores `rope_parameters` and would take a default frequency instead."""
    for text in (config, config.get("text_config") or {}):
        rope = text.get("rope_parameters")
        if rope:
            plain = rope.get("full_attention", rope)
            text["rope_theta"] = plain.get("rope_theta")
            if "partial_rotary_factor" in plain:
                text["partial_rotary_factor"] = plain["partial_rotary_factor"]
            if plain.get("rope_type", "default") != "default":
                text["rope_scaling"] = _older_scaling(plain)
            if "sliding_attention" in rope:
                text["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        for older, name in OLDER_NAMES.get(text.get("model_type", ""), {}).items():
            if name in text:
                text[older] = text[name]
    return config


def _older_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] == "longrope":  # Phi-3 wants these and no others
        return {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    apart = ("rope_theta", "partial_rotary_factor")
    return {"type": rope["rope_type"], **{name: value for name, value in rope.items() if name not in apart}}


def _with_older_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for what 4 knows as
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config
