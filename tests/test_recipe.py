from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml

from optimum_prune import Depth, FolderPass, Osscar, Recipe, Settings, Stage, Text, option
from optimum_prune.errors import OptimumPruneError, PluginError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Quantize(FolderPass):
    """A quantizer."""

    name: ClassVar[str] = "quantize-me"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    takes_quantized: ClassVar[bool] = True
    bits: int = option("Bits.", 8)
    unpacks = True

    def check(self, prospect): ...

    def convert(self, job): ...

    def open(self, folder, device): ...


@dataclass(frozen=True, kw_only=True)
class Export(FolderPass):
    """An exporter that needs what is not there."""

    name: ClassVar[str] = "export-me"
    stage: ClassVar[Stage] = Stage.EXPORT
    requires: ClassVar[dict[str, str]] = {"json": "json", "no_such_module_anywhere": "no-such-module>=2"}

    def check(self, prospect): ...

    def convert(self, job): ...

    def open(self, folder, device): ...


WHOLE = """
model: some/model
seed: 7
dtype: bfloat16
calibration: {dataset: "some/data:config:train", samples: 12, length: 64}
evaluation: {dataset: "some/data:config:test", samples: 3}
passes:
  - depth: {layers: 3}
  - depth: {drop: [1, 2]}
  - osscar: {ratio: 0.25, damping: 1e-2, multiple_of: 16}
"""


def read(text, plugins, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return Recipe.from_yaml(file, plugins)


def test_a_recipe_is_what_its_yaml_says(plugins, tmp_path):
    assert read(WHOLE, plugins, tmp_path) == Recipe(
        passes=(Depth(layers=3), Depth(drop=(1, 2)), Osscar(ratio=0.25, damping=0.01, multiple_of=16)),
        calibration=Text(dataset="some/data:config:train", samples=12, length=64),
        evaluation=Text(dataset="some/data:config:test", samples=3),
        settings=Settings(model="some/model", seed=7, dtype="bfloat16"),
    )


@pytest.mark.parametrize(
    "text",
    [WHOLE, "passes: [{depth: {layers: 1}}]", "passes:\n- osscar: {ratio: 0.1}\nmodel: ün"],
    ids=["whole", "least", "ün"],
)
def test_a_recipe_survives_yaml(text, plugins, tmp_path):
    recipe = read(text, plugins, tmp_path)
    assert read(recipe.to_yaml(), plugins, tmp_path) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml()), plugins) == recipe


def test_a_written_recipe_says_its_defaults(plugins):
    plain = Recipe.from_dict({"passes": [{"osscar": {"ratio": 0.1}}]}, plugins).to_dict()
    options = plain["passes"][0]["osscar"]
    assert (options["ratio"], options["allocation"], options["step"]) == (0.1, "uniform", 1)
    assert plain["seed"] == 0
    assert plain["dtype"] == "auto"


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        (
            "passes: [{oscar: {ratio: 0.1}}]",
            PluginError,
            r"No pass is called 'oscar'\. Did you mean 'osscar'\? Installed: .*depth.*osscar",
        ),
        (
            "passes: [{osscar: {ration: 0.1}}]",
            RecipeError,
            r"No option of pass 'osscar' is called 'ration'\. Did you mean 'ratio'\?",
        ),
        ("passes: [{depth: {layer: 1}}]", RecipeError, r"'layer'\. Did you mean 'layers'\?"),
        ("passes: [osscar]", RecipeError, "osscar needs a target: 'ratio' or 'params'"),
        ("passes: [{osscar: }]", RecipeError, "osscar needs a target: 'ratio' or 'params'"),
        ("passes: [depth]", RecipeError, "exactly one of 'layers'"),
        ("passes: [{osscar: {ratio: 1.5}}]", RecipeError, "ratio 1.5"),
        ("passes: [{osscar: {ratio: 0}}]", RecipeError, "ratio 0"),
        ("passes: [{osscar: {ratio: -0.2}}]", RecipeError, "ratio -0.2"),
        (
            "passes: [{osscar: {ratio: much}}]",
            RecipeError,
            "'ratio' of pass 'osscar' is 'much', which is not a number",
        ),
        ("passes: [{osscar: {ratio: .nan}}]", RecipeError, "not a number"),
        ("passes: [{osscar: {ratio: .inf}}]", RecipeError, "not a number"),
        ("passes: [{osscar: {ratio: true}}]", RecipeError, "not a number"),
        ("passes: [{osscar: {ratio: 0.1, step: 2.5}}]", RecipeError, "not a whole number"),
        ("passes: [{depth: {layers: true}}]", RecipeError, "not a whole number"),
        ("passes: [{depth: {layers: '2'}}]", RecipeError, "not a whole number"),
        ("passes: [{depth: {drop: [1, x]}}]", RecipeError, "not a whole number"),
        ("passes: [{depth: {drop: {1: 2}}}]", RecipeError, "not a whole number"),
        ("passes: [{depth: [1]}]", RecipeError, "name: value"),
        ("passes: [{depth: {layers: 1}, osscar: {ratio: 0.1}}]", RecipeError, "this is neither"),
        ("passes: [[depth]]", RecipeError, "this is neither"),
        ("passes: []", RecipeError, "no pass"),
        ("passes: depth", RecipeError, "list of 'passes'"),
        ("model: a", RecipeError, "list of 'passes'"),
        ("pases: []", RecipeError, r"'pases'\. Did you mean 'passes'\?"),
        ("1: 2", RecipeError, "No part of a recipe is called '1'"),
        ("", RecipeError, "empty"),
        ("- depth", RecipeError, "list"),
        ("just words", RecipeError, "str"),
        ("passes: [depth: {layers: 1}]\nmodel: 7", RecipeError, "'model' .* not a text"),
        ("passes: [depth: {layers: 1}]\ndtype: float8", RecipeError, r"'float8'.*Choices: auto, bfloat16"),
        ("passes: [depth: {layers: 1}]\nseed: x", RecipeError, "'seed' .* not a whole number"),
        ("passes: [depth: {layers: 1}]\ncalibration: {sample: 1}", RecipeError, r"'sample'\. Did you mean 'samples'"),
        ("passes: [depth: {layers: 1}]\ncalibration: some.txt", RecipeError, "name: value"),
        ("passes: [depth: {layers: 1}]\ncalibration: {dataset: [a]}", RecipeError, "not a text"),
        (
            "passes: [depth: {layers: 1}]\ncalibration: {dataset: 'a:b'}\nevaluation: {dataset: 'a:b:train'}",
            RecipeError,
            "must not be what",
        ),
        ("passes: [", RecipeError, "not plain YAML"),
        ("a: b: c", RecipeError, "not plain YAML"),
        ("passes: !!python/object/apply:os.system ['touch {made}']", RecipeError, "not plain YAML"),
        ("!!python/object:optimum_prune.Recipe {{}}", RecipeError, "not plain YAML"),
        ("passes: !!python/name:os.system", RecipeError, "not plain YAML"),
        ("passes: !mine [depth]", RecipeError, "not plain YAML"),
        ("\x00", RecipeError, "not plain YAML"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_a_wrong_recipe_is_refused_and_the_culprit_named(text, error, why, plugins, tmp_path):
    with pytest.raises(error, match=why) as caught:
        read(text.replace("{made}", str(tmp_path / "made")), plugins, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_bytes_that_are_no_text_are_no_recipe(plugins, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match="not plain YAML"):
        Recipe.from_yaml(tmp_path / "recipe.yaml", plugins)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_recipe_that_cannot_be_read_is_named(name, plugins, tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / name, plugins)


@pytest.mark.parametrize(
    "wrong",
    [(Quantize(), Depth(layers=1)), (Depth(layers=1), Quantize(), Osscar(ratio=0.1))],
    ids=["first", "between"],
)
def test_stages_only_go_forward(wrong):
    with pytest.raises(RecipeError, match=r"'(depth|osscar)' \(PRUNE\) comes after 'quantize-me' \(QUANTIZE\).*first"):
        Recipe(passes=wrong)
    Recipe(passes=(Depth(layers=1), Osscar(ratio=0.1), Depth(layers=1), Quantize(), Quantize(bits=4)))


def test_a_pass_whose_libraries_are_missing_is_refused():
    with pytest.raises(
        RecipeError, match=r"'export-me' needs no_such_module_anywhere, .*pip install 'no-such-module>=2'"
    ):
        Recipe(passes=(Export(),))
    assert Export.missing() == ("no_such_module_anywhere",)


def test_every_mistake_is_the_users_and_can_be_caught_as_one_kind():
    assert issubclass(RecipeError, OptimumPruneError)
    assert issubclass(PluginError, OptimumPruneError)
