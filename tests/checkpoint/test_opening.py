from __future__ import annotations

import pytest
from harms import edit

from optimum_prune.anatomy.family import find_family
from optimum_prune.checkpoint import opening
from optimum_prune.errors import CheckpointError, FamilyError


def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        opening.open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/nowhere/model", "does not exist"),
        ("./nowhere", "does not exist"),
        ("~/nowhere/at/all", "does not exist"),
        ("nowhere/at/all", "does not exist"),
        ("", "is no model"),
        ("/tmp/nowhere.gguf", "does not exist"),
        ("nobody/no-such-model", "cannot be opened from the Hub, and no folder is called so"),
    ],
)
def test_a_model_that_is_not_there_is_refused_in_one_line(name, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        opening.open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no model: it has no config\.json"):
        opening.open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"is a file, but no \.gguf file"):
        opening.open_checkpoint(str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be opened as a model"):
        opening.open_checkpoint(str(folder))


def test_an_architecture_that_transformers_does_not_know_is_named(folder):
    edit(folder / "config.json", model_type="never_heard_of")
    with pytest.raises(FamilyError, match="does not know the architecture 'never_heard_of'"):
        opening.open_checkpoint(str(folder))


def test_an_architecture_that_no_family_knows_gets_the_lines_of_a_plugin(folder, plugins):
    edit(folder / "config.json", model_type="bloom")
    with pytest.raises(FamilyError, match=r"'bloom'.*Known: .*llama") as caught:
        find_family(opening.open_checkpoint(str(folder)).config, plugins.families)
    assert 'model_types=("bloom",)' in str(caught.value)
    assert "[project.entry-points.optimum_prune]" in str(caught.value)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be read") as caught:
        opening.open_checkpoint(str(folder)).tokenizer()
    assert "\n" not in str(caught.value)
