"""Fields that transformers 4 reads in a checkpoint's JSON files where transformers 5 writes something else.

A field is added only if a config that is read back with it says what it said without: transformers 5 reads some of them as well, and
`rope_scaling` before `rope_parameters`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum_prune.checkpoint.quiet import quietly

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
OLDER_NAMES = {
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""Fields of a config that transformers 4 knows by other names, by model type: its name, and that of transformers 5."""
APART = ("rope_theta", "partial_rotary_factor")
"""What stands beside `rope_scaling` in transformers 4, and within `rope_parameters` in transformers 5."""
LENGTH = "original_max_position_embeddings"
Addition = dict[str, Any]
"""Fields of a config, or of its `text_config`, that belong together."""


def add_older_fields(folder: Path) -> None:
    """Adds to the JSON files of a checkpoint what transformers 4 reads where transformers 5 writes something else."""
    plain = _read(folder / CONFIG)
    older = with_older_fields(plain)
    if older != plain:
        _write(folder / CONFIG, older)
    if (folder / TOKENIZER_CONFIG).is_file():
        _write(folder / TOKENIZER_CONFIG, _with_older_tokenizer_class(_read(folder / TOKENIZER_CONFIG)))


def with_older_fields(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The config in plain data, with the fields of transformers 4 that change nothing of what transformers 5 reads."""
    result = copy.deepcopy(dict(plain))
    parts = [part for part in ("", "text_config") if not part or isinstance(plain.get(part), Mapping)]
    additions = [(part, choices) for part in parts for choices in _additions(result[part] if part else result)]
    said = _read_back(result) if additions else None
    if said is None:
        return result
    for part, choices in additions:
        for choice in choices:
            tried = copy.deepcopy(result)
            (tried[part] if part else tried).update(choice)
            if _says_the_same(_read_back(tried), said, choice):
                result = tried
                break
    return result


def _additions(config: Mapping[str, Any]) -> Iterator[list[Addition]]:
    """What transformers 4 would read in a config, each in the forms that will do, the best first."""
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    names = OLDER_NAMES.get(config.get("model_type", ""), {})
    older = {older: place[name] for older, name in names.items() for place in (rope, config) if name in place}
    if older:
        yield [older]
    if rope:
        yield _older_rope(config, rope)


def _older_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[Addition]:
    """The rotary frequencies in the words of transformers 4, which ignores `rope_parameters` and would take a default instead."""
    plain = rope.get("full_attention") or rope
    fields = {"rope_theta": plain.get("rope_theta")}
    if "partial_rotary_factor" in plain:
        fields["partial_rotary_factor"] = plain["partial_rotary_factor"]
    if rope.get("sliding_attention"):
        fields["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    kind = plain.get("rope_type", "default")
    if kind == "default":
        return [fields]
    scaling = {name: value for name, value in plain.items() if name not in APART}
    forms = [scaling, {"type": kind, **scaling}]
    if kind == "longrope":
        length, longest = plain.get(LENGTH), config.get("max_position_embeddings")
        if LENGTH not in config and length and longest and plain.get("factor") in (None, longest / length):
            fields[LENGTH] = length  # where it is read; the factor is taken from it
        if str(config.get("model_type")).startswith("phi"):  # which takes these three and no others
            forms.insert(0, {"type": kind, **{name: plain.get(name) for name in ("short_factor", "long_factor")}})
    return [{**fields, "rope_scaling": form} for form in forms]


def _read_back(plain: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers says of a config that it reads; None if it reads none, such as one with code of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with quietly(), TemporaryDirectory() as aside:
            _write(Path(aside) / CONFIG, plain)
            found: dict[str, Any] = CONFIG_MAPPING[plain["model_type"]].from_pretrained(aside).to_dict()
    except Exception:  # whatever it does not like of it
        return None
    return found


def _says_the_same(found: Mapping[str, Any] | None, said: Mapping[str, Any], added: Mapping[str, Any]) -> bool:
    """Whether what was read back is what was said before, but for fields that nobody knew."""
    if found is None:
        return False
    return all(
        _same(found.get(name), value, added) for name, value in said.items()
    ) and found.keys() - said.keys() <= added.keys() | {"rope_scaling"}


def _same(found: Any, said: Any, added: Mapping[str, Any]) -> bool:
    if isinstance(found, Mapping) and isinstance(said, Mapping):
        new = found.keys() - said.keys()
        if new - added.keys() - {"type"} or ("type" in new and found["type"] != found.get("rope_type")):
            return False
        return all(_same(found.get(name), value, added) for name, value in said.items())
    return bool(found == said)


def _with_older_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for what 4 knows as
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config


def _read(file: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return plain


def _write(file: Path, plain: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
