"""The layout: imports run down, files and functions stay small, and only the axes' maker knows heads, channels and experts."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_prune

ROOT = Path(optimum_prune.__file__).parent
ORDER = (
    "errors",
    "bounds",
    "options",
    "machine",
    "text",
    "anatomy",
    "checkpoint",
    "calibration",
    "surgery",
    "evaluation",
    "selection",
    "refit",
    "training",
    "passes",
    "hooks",
    "conversion",
    "recipe",
    "builtin",
    "plan",
    "report",
    "run",
    "pruner",
    "cli",
    "testing",
    "__init__",
    "__main__",
)
"""Each imports only what stands before it."""
BESIDE_WEIGHTS = ("configuration_pruned", "modeling_pruned")
"""Modules of which copies lie beside weights, and are fetched with each other from there."""
LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS, MANY_ARGUMENTS = 300, 45, 5, 10


def modules(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(root.rglob("*.py")):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Everything that a module imports, at any place and for annotations too: dotted names and lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in BESIDE_WEIGHTS:
            assert node.level == 1, f"line {node.lineno}: it is found beside it, wherever that is"
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def arrows_up(root: Path) -> list[str]:
    """Imports of what does not stand below."""
    found = []
    for file, tree in modules(root):
        place = file.relative_to(root).with_suffix("").parts[0]
        for name, line in imported(tree):
            package, *rest = name.split(".")
            if package != root.name or not rest or rest[0] == place or rest[0] not in ORDER:
                continue
            if ORDER.index(rest[0]) >= ORDER.index(place):
                found.append(f"{file.relative_to(root)}:{line} {place} -> {rest[0]}")
    return found


def circles(root: Path) -> list[str]:
    """Modules that come back to themselves by what they import, annotations included."""
    names = {
        ".".join((root.name, *file.relative_to(root).with_suffix("").parts)): tree for file, tree in modules(root)
    }
    arrows = {name: {target for target, _ in _targets(tree, names)} for name, tree in names.items()}
    found, done = [], set[str]()

    def follow(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
            return
        if name in done:
            return
        for target in sorted(arrows[name]):
            follow(target, (*path, name))
        done.add(name)

    for name in names:
        follow(name, ())
    return found


def _targets(tree: ast.Module, names: dict[str, ast.Module]) -> Iterator[tuple[str, int]]:
    for name, line in imported(tree):
        for candidate in (name, name.rpartition(".")[0]):
            if candidate in names and not candidate.endswith("__init__"):
                yield candidate, line
                break


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{file.relative_to(root)}:{node.lineno} {node.name}", node


def test_every_folder_has_its_place():
    places = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert places <= set(ORDER)


def test_imports_run_down():
    assert arrows_up(ROOT) == []


def test_no_module_comes_back_to_itself():
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("anatomy/shape.py", "from optimum_prune.surgery.cuts import Cuts", "anatomy -> surgery"),
        ("machine/memory.py", "import optimum_prune.text.windows", "machine -> text"),
        ("plan/plan.py", "def f():\n    from optimum_prune import cli", "plan -> cli"),
        ("refit/solving.py", "if TYPE_CHECKING:\n    from optimum_prune.run.run import Run", "refit -> run"),
        ("passes/base.py", "from optimum_prune.builtin.prune import depth", "passes -> builtin"),
    ],
)
def test_an_import_that_runs_up_is_found(file, line, arrow, tmp_path):
    copied = shutil.copytree(ROOT, tmp_path / ROOT.name)
    (copied / file).write_text((copied / file).read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    (found,) = arrows_up(copied)
    assert found.endswith(arrow)


def test_a_circle_within_a_folder_is_found(tmp_path):
    copied = shutil.copytree(ROOT, tmp_path / ROOT.name)
    file = copied / "surgery" / "modeling_pruned.py"
    file.write_text(
        file.read_text(encoding="utf-8") + "\nfrom optimum_prune.surgery.config import sync_config\n", encoding="utf-8"
    )
    assert circles(copied)


def test_nothing_imports_what_is_built_in_but_the_package_itself():
    importers = [
        str(file.relative_to(ROOT))
        for file, tree in modules(ROOT)
        for name, _ in imported(tree)
        if name.startswith("optimum_prune.builtin.")
    ]
    assert set(importers) <= {"__init__.py"}


def test_files_and_functions_stay_small():
    files = [
        f"{file.relative_to(ROOT)}: {len(file.read_text(encoding='utf-8').splitlines())}" for file, _ in modules(ROOT)
    ]
    assert [each for each in files if int(each.rpartition(" ")[2]) > LONGEST_FILE] == []
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions(ROOT)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_few_functions_take_many_arguments():
    many = []
    for name, node in functions(ROOT):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len([each for each in arguments if each.arg not in ("self", "cls")]) > MOST_ARGUMENTS:
            many.append(name)
    assert len(many) <= MANY_ARGUMENTS, many


# Who knows what


AXES = {"heads", "head", "channels", "channel", "experts", "expert"}
MAKERS = (
    *("anatomy/axes.py", "anatomy/routing.py", "anatomy/matrices.py", "anatomy/family.py", "builtin/families"),
    *("builtin/prune/experts.py", "builtin/prune/sheared.py", "selection/mixtures.py", "checkpoint/transformers4.py"),
    "surgery/configuration_pruned.py",
)
"""What finds axes and matrices, the data from which it does, a method for one of them alone or whose options name a shape, and the names of
config fields in another version of transformers, and as engines ask for them."""
SAID_TO_USERS = {
    "head_ratio",
    "takes_experts",
    "Heads",
    "Experts",
    "experts_implementation",
    "_experts_implementation",
}
"""An option, an attribute of passes, what families are written with, and fields of configs."""


def words_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The names in a module's code, and its texts that are no sentences."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield word, getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            yield node.value, node.lineno


def test_only_the_axes_maker_knows_heads_channels_and_experts():
    found = [
        f"{file.relative_to(ROOT)}:{line} {word}"
        for file, tree in modules(ROOT)
        if not str(file.relative_to(ROOT)).startswith(MAKERS)
        for word, line in words_of(tree)
        if word not in SAID_TO_USERS and AXES & set(word.replace(".", "_").lower().split("_"))
    ]
    others = ("head", "lm_head")  # the output head of a model, and that of a table
    assert [each for each in found if each.rpartition(" ")[2].lower() not in others] == []


def test_stages_are_asked_and_not_classes():
    kinds = {"PrunePass", "RecoverPass", "FolderPass"}
    for file, tree in modules(ROOT):
        if file.parent.name == "hooks":  # where a class that does not fit its stage is refused
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                named = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                assert not named & kinds, f"{file.relative_to(ROOT)}:{node.lineno}"
