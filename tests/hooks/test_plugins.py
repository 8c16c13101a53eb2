from __future__ import annotations

import sys
from itertools import count
from types import SimpleNamespace

import pytest

from optimum_prune import OptimumPruneError, Recipe, Source, hookimpl
from optimum_prune.errors import PluginError
from optimum_prune.hooks.plugins import load

NUMBERS = count()

GOOD = '''
from dataclasses import dataclass
from typing import ClassVar
from optimum_prune import AxisKind, Family, FolderPass, Source, Stage, hookimpl, option

@dataclass(frozen=True, kw_only=True)
class Pack(FolderPass):
    """Packs weights."""

    name: ClassVar[str] = "pack"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    bits: int = option("Bits.", 8)

    def check(self, spec): ...
    def convert(self, job): ...
    def open(self, folder, device): ...

@hookimpl
def passes():
    yield Pack

@hookimpl
def families():
    yield Family(name="bloom", model_types=("bloom",))

@hookimpl
def axes():
    yield AxisKind("colours", lambda family, layer, config: None, "attention")

@hookimpl
def calibration_sources():
    yield Source("xml", lambda text: ["a"], (".xml",))
'''
HEAD = "from optimum_prune import *\nfrom optimum_prune import hookimpl\n@hookimpl\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with an entry point on the path, as pip would; the name of its module is returned."""
    monkeypatch.syspath_prepend(tmp_path)

    def _install(source, distribution="stranger", point=None):
        module = f"stranger_module_{next(NUMBERS):03}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.2.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
        (info / "entry_points.txt").write_text(f"[optimum_prune]\n{point or module} = {module}\n")
        return module

    yield _install
    for name in [name for name in sys.modules if name.startswith("stranger_module_")]:
        del sys.modules[name]


def test_what_is_built_in_comes_in_through_hooks(plugins):
    assert {"depth", "osscar"} <= set(plugins.passes)
    assert plugins.providers["depth"].distribution == "optimum-prune"
    known = {model_type for family in plugins.families for model_type in family.model_types}
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "opt"} <= known
    assert {"txt", "jsonl", "parquet", "hub"} <= set(plugins.sources)
    assert not any(family.axes for family in plugins.families)


def test_an_installed_plugin_brings_passes_families_axes_and_sources(install):
    install(GOOD)
    plugins = load()
    assert plugins.passes["pack"].summary() == "Packs weights."
    assert (plugins.providers["pack"].distribution, plugins.providers["pack"].version) == ("stranger", "1.2.3")
    assert any(family.name == "bloom" for family in plugins.families)
    assert {tuple(kind.name for kind in family.axes) for family in plugins.families} == {("colours",)}
    assert plugins.sources["xml"].suffixes == (".xml",)
    recipe = Recipe.from_dict({"passes": [{"depth": {"layers": 1}}, {"pack": {"bits": 4}}]}, plugins)
    assert recipe.passes[1].bits == 4


def test_a_plugin_that_is_gone_is_forgotten(install, tmp_path):
    install(GOOD)
    assert "pack" in load().passes
    sys.path.remove(str(tmp_path))
    assert "pack" not in load().passes


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_anywhere", "cannot be imported: ModuleNotFoundError: .*no_such_module_anywhere"),
        ("def passes(:", "cannot be imported: SyntaxError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        (
            HEAD + "def pases():\n    yield",
            r"a hook that does not exist. No hook is called 'pases'\. Did you mean 'passes'\?",
        ),
        (HEAD + "def before_pass(step, modle):\n    pass", "a hook with wrong arguments: .*modle"),
        ("def passes():\n    yield", "has no hook. Mark its functions with @hookimpl; hooks: .*passes.*before_pass"),
        (HEAD + "def passes():\n    yield 'depth'", "'passes' .* yields 'depth'"),
        (HEAD + "def passes():\n    yield Depth(layers=1)", r"yields Depth\("),
        (HEAD + "def families():\n    yield 'llama'", "'families' .* yields 'llama'"),
        (HEAD + "def families():\n    yield 1 / 0", "ZeroDivisionError"),
        (HEAD + "def families():\n    return None", None),
        (HEAD + "def families():\n    return Family(name='bloom', model_types=('bloom',))", None),
        (HEAD + "def passes():\n    class Nameless(PrunePass):\n        pass\n    yield Nameless", None),
        (HEAD + "def axes():\n    yield 'heads'", "'axes' .* yields 'heads'"),
        (HEAD + "def axes():\n    yield Axis('colours', 4, ())", r"'axes' .* yields Axis\("),
    ],
    ids=[
        "missing import",
        "syntax",
        "failing import",
        "misspelt hook",
        "wrong arguments",
        "no hook",
        "not a pass",
        "instance of a pass",
        "not a family",
        "failing hook",
        "nothing to iterate",
        "not iterable",
        "pass without a name",
        "not an axis",
        "an axis and not its kind",
    ],
)
def test_a_broken_plugin_is_named_with_its_distribution(source, why, install):
    module = install(source)
    with pytest.raises(PluginError, match=why) as caught:
        load()
    assert f"{module} (stranger)" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "what", "owner"),
    [
        (HEAD + "def passes():\n    yield Depth", "pass 'depth'", "prune.depth"),
        (
            HEAD + "def families():\n    yield Family(name='llama', model_types=('a',))",
            "family 'llama'",
            "families.llama",
        ),
        (
            HEAD + "def families():\n    yield Family(name='a', model_types=('a', 'qwen3'))",
            "architecture 'qwen3'",
            "families.qwen",
        ),
        (
            HEAD + "def calibration_sources():\n    yield Source('hub', list)",
            "calibration source 'hub'",
            "sources.hub",
        ),
        (
            HEAD + "def calibration_sources():\n    yield Source('a', list, ('.a', '.txt'))",
            "suffix '.txt'",
            "sources.files",
        ),
        (HEAD + "def axes():\n    yield AxisKind('heads', list)", "axis 'heads'", "optimum-prune"),
        (HEAD + "def axes():\n    yield AxisKind('hidden', list)", "axis 'hidden'", "optimum-prune"),
        (HEAD + "def axes():\n    yield AxisKind('layers', list)", "axis 'layers'", "optimum-prune"),
        (HEAD + "def axes():\n    yield AxisKind('pass', list)", "axis 'pass'", "optimum-prune"),
    ],
    ids=["pass", "family", "architecture", "source", "suffix", "axis", "axis of the model", "layers", "pass in cuts"],
)
def test_two_providers_of_one_name_are_both_named(source, what, owner, install):
    module = install(source)
    with pytest.raises(PluginError, match=rf"{what}.* two plugins: .*\b{owner}\b.* and {module} \(stranger\)"):
        load()


PASS = """
from dataclasses import dataclass
from typing import ClassVar
from optimum_prune import FolderPass, PrunePass, RecoverPass, Stage, hookimpl

@dataclass(frozen=True, kw_only=True)
class Mine({base}):
    name: ClassVar[str] = "mine"
    {body}

@hookimpl
def passes():
    yield Mine
"""


@pytest.mark.parametrize(
    ("base", "body", "why"),
    [
        ("FolderPass", "", "'mine' of the plugin .* has no stage. Make it a PrunePass, a RecoverPass or a FolderPass"),
        ("FolderPass", "stage = 'quantize'", "has no stage"),
        ("FolderPass", "stage = Stage.PRUNE", "has the stage PRUNE and is no PrunePass"),
        ("PrunePass", "stage = Stage.RECOVER", "has the stage RECOVER and is no RecoverPass"),
        ("RecoverPass", "stage = Stage.EXPORT", "has the stage EXPORT and is no FolderPass"),
        (
            "PrunePass",
            "def decide(self, model, family, calibration, progress): ...",
            r"another version of optimum-prune: its decide takes \(model, family, calibration, progress\), and is called with "
            r"\(decoder, calibration\)",
        ),
        ("RecoverPass", "def recover(self, decoder, calibration): ...", r"its recover takes \(decoder, calibration\)"),
        ("FolderPass", "stage = Stage.EXPORT\n    def check(self): ...", r"its check takes \(\)"),
        (
            "FolderPass",
            "stage = Stage.EXPORT\n    takes_odd = True",
            "Mine says takes_odd, .* takes_heterogeneous now",
        ),
    ],
    ids=["none", "no Stage", "prune", "recover", "export", "decide", "recover's", "check", "renamed"],
)
def test_a_pass_that_could_not_be_carried_out_is_refused_with_its_plugin(base, body, why, install):
    module = install(PASS.format(base=base, body=body or "pass"))
    with pytest.raises(PluginError, match=why) as caught:
        load()
    assert f"{module} (stranger)" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("from optimum_prune.hookspecs import hookimpl", "hooks.marker"),
        ("from optimum_prune.passes import PrunePass\nfrom optimum_prune.cuts import Cuts", None),
        ("from optimum_prune.cuts import Cuts", "surgery.cuts"),
        ("import optimum_prune.layerwise", "calibration.stream"),
        ("from optimum_prune.methods.depth import Depth", "builtin.prune"),
    ],
)
def test_what_an_older_plugin_imports_is_said_to_lie_elsewhere(line, place, install):
    install(line)
    with pytest.raises(
        PluginError, match="another version of optimum-prune; what it needs is to be imported from optimum_prune"
    ) as caught:
        load()
    assert place is None or f"optimum_prune.{place} now" in str(caught.value)


def test_two_strangers_that_clash_are_both_named(install):
    names = [install(GOOD, "first"), install(GOOD, "second")]
    with pytest.raises(PluginError, match=rf"pass 'pack' .*{names[0]} \(first\) and {names[1]} \(second\)"):
        load()


def test_two_distributions_may_name_their_entry_points_alike(install):
    install(GOOD, "first", point="plugin")
    install(HEAD + "def pass_finished(outcome):\n    pass", "second", point="plugin")
    assert load().providers["pack"].distribution == "first"


def test_hooks_given_by_the_caller_are_plugins_too():
    class Mine:
        @hookimpl
        def calibration_sources(self):
            yield Source("mine", lambda text: ["a"])

    assert "mine" in load([Mine()]).sources
    assert "mine" not in load().sources


@pytest.mark.parametrize("hook", [SimpleNamespace(), object()], ids=["namespace", "object"])
def test_a_given_object_without_a_hook_is_refused(hook):
    with pytest.raises(PluginError, match=f"{type(hook).__name__} given as hook 1 has no hook"):
        load([hook])


def test_a_miss_names_the_nearest_and_all(plugins):
    with pytest.raises(
        OptimumPruneError, match=r"No pass is called 'dept'\. Did you mean 'depth'\? Installed: .*depth, .*osscar"
    ):
        plugins.pass_named("dept")
    with pytest.raises(PluginError, match=r"No pass is called 'xyz'\. Installed"):
        plugins.pass_named("xyz")
