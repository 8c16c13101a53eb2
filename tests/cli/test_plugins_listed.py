"""Plugins as the command line shows them, and refuses what does not fit."""

from __future__ import annotations

import re
import sys

import pytest
from command_line import common, names, one_sentence, recipe_file

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from optimum_prune import FolderPass, Stage, hookimpl

@dataclass(frozen=True, kw_only=True)
class Pack(FolderPass):
    \"\"\"Packs weights.\"\"\"

    name: ClassVar[str] = "pack"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[dict[str, str]] = {{{requires}}}

    def check(self, prospect): ...
    def convert(self, job): ...
    def open(self, folder, device): ...

@hookimpl
def passes():
    yield Pack
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs a plugin with a quantizer."""

    def install(requires="", source=PLUGIN):
        site = tmp_path / "site"
        (site / "stranger-0.3.dist-info").mkdir(parents=True)
        (site / "stranger-0.3.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: stranger\nVersion: 0.3\n"
        )
        (site / "stranger-0.3.dist-info" / "entry_points.txt").write_text(
            "[optimum_prune]\nstranger = stranger_plugin\n"
        )
        (site / "stranger_plugin.py").write_text(source.format(requires=requires))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "stranger_plugin", raising=False)

    yield install
    sys.modules.pop("stranger_plugin", None)


def test_stages_out_of_order_are_refused(stranger, cli, llama, text_file, tmp_path, work):
    stranger()
    file = recipe_file(tmp_path, "passes: [pack, {depth: {layers: 1}}]")
    code, _, error = cli("compress", "run", file, "--output", work / "out", *common(llama, text_file))
    assert code == 1
    assert "'depth' (PRUNE) comes after 'pack' (QUANTIZE)" in one_sentence(error)
    assert names(work) == []


def test_a_pass_whose_libraries_are_missing_is_listed_and_refused(stranger, cli, llama, text_file, tmp_path, work):
    stranger(requires="'no_such_module_anywhere': 'no-such-module'")
    assert re.search(
        r"^pack +QUANTIZE +stranger 0\.3 +no_such_module_anywhere +Packs weights\.$",
        cli("compress", "passes")[1],
        re.MULTILINE,
    )
    file = recipe_file(tmp_path, "passes: [{depth: {layers: 1}}, pack]")
    code, _, error = cli("compress", "run", file, "--output", work / "out", *common(llama, text_file))
    assert code == 1
    assert "no_such_module_anywhere" in one_sentence(error)
    assert names(work) == []


def test_a_broken_plugin_is_named(stranger, cli):
    stranger(source="1 / 0")
    code, _, error = cli("compress", "passes")
    assert code == 1
    assert "stranger (stranger)" in one_sentence(error)
