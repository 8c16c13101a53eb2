"""What is published of a run: nothing of the machine or the person it ran on, and nothing that a reader's program takes for a command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from folder_passes import Archive
from reports import PACKED, REPORT

from optimum_prune import Depth, Pruner, Recipe, Settings, Text
from optimum_prune.cli.main import main
from optimum_prune.report.card import model_card
from optimum_prune.report.published import last_part, place, scrubbed
from optimum_prune.report.tables import escaped
from optimum_prune.report.written import published_recipe, write_beside

PERSON = "alice"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A person's home folder with a spaced name, in which a folder to work in is the current one."""
    folder = tmp_path / f"{PERSON} of x"
    (folder / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "work")
    return folder


def texts_in(folder):
    """All that is written in a folder, by file, but for weights and what they are told apart by."""
    kinds = (".json", ".yaml", ".md", ".py", ".jinja", ".txt")
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.suffix in kinds}


# Places


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("{home}/models/small", "./small"),
        ("{home}/models/small/", "./small"),
        ("~/models/small", "./small"),
        ("../models/small", "./small"),
        ("{home}/work/models/small", "./models/small"),
        ("models/small", "./models/small"),
        ("./models/../small", "./small"),
        ("{home}/work", "."),
        ("{home}", "./home"),
        ("/home/bob", "./home"),
        ("C:\\Users\\bob\\small", "./small"),
        ("\\\\host\\share\\small", "./small"),
        ("/models", "./models"),
    ],
)
def test_a_place_is_called_from_the_current_folder_or_by_its_name(name, published, home):
    assert place(name.format(home=home)) == published


def test_where_all_homes_lie_in_the_current_folder_only_names_are_told(home, monkeypatch):
    monkeypatch.chdir(home.parent.parent)
    assert place(str(home / "models" / "small")) == "./small"


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("read from {home}/work/b/c.txt, and", "read from ./b/c.txt, and"),
        ("read from {home}/b/c.txt, and", "read from ./c.txt, and"),
        ("'/opt/bob/x.py', line 3", "'./x.py', line 3"),
        ("see ../../bob/x (not /y)", "see ./x (not /y)"),
        ("at D:\\bob\\x.txt", "at ./x.txt"),
        ("https://host/a/b and a/b/c, 1/2, and/or N/A", None),
        ("/", None),
        ("osscar: layers.3 -> 4 ~ 5", None),
    ],
)
def test_a_text_with_a_place_in_it_tells_the_name_only(text, published, home):
    assert scrubbed({"a": [text.format(home=home)]}) == {"a": [published or text]}


# What a run leaves


def model_with_traces(folder):
    """A model whose files say where they once were, and name code that is not there."""
    tiny.save("llama", folder)
    code = {"auto_map": {"AutoConfig": "configuration_x.Config", "AutoTokenizer": ["tokenization_x.Tokenizer", None]}}
    traces = {
        "_name_or_path": f"/home/{PERSON}/base",
        "cache_dir": f"/data/{PERSON}/cache",
        "deep": [{"at": f"/home/{PERSON}/x"}],
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = folder / name
        plain = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**plain, **traces, **code, "inner": {**traces, **code}, "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("where", ["elsewhere", "work"])
def test_no_file_of_an_output_tells_where_it_was_made_or_names_code_that_is_not_there(where, home, text_file):
    model = model_with_traces(home / where / "small")
    shutil.copy(text_file, home / where / "some.txt")
    text = Text(text=str(home / where / "some.txt"), samples=2, length=24)
    pruner = Pruner.from_pretrained(model, device="cpu")
    pruner.prune(Depth(drop=(1,), heal=False), calibration=text, evaluation=Text(samples=1), save_dir="out")
    for file, written in texts_in(Path("out")).items():
        for trace in (PERSON, str(home), str(home.parent), "auto_map", "configuration_x"):
            assert trace not in written, (file, trace)
    assert json.loads(Path("out/preprocessor_config.json").read_text())["inner"]["deep"] == [{"at": "x"}]
    again = ["compress", "run", "out/compression/recipe.yaml", "--output", "again", "--quiet"]
    assert (main(again) == 0) == (where == "work")
    if where == "elsewhere":
        assert main([*again, "--model", str(model), "--text", text.text]) == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_words_of_a_tokenizer_stay_as_they_are(tmp_path):
    words = {"additional_special_tokens": ["/home/x/y"], "chat_template": "/home/{{ x }}", "eos_token": "/home/x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    (tmp_path / "broken.json").write_text("{")
    write_beside(tmp_path, Recipe(passes=(Depth(layers=1),)), REPORT)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == words


def test_an_interpreter_elsewhere_is_not_told_but_how_to_name_one(home):
    for folder in (home / "envs", home / "work"):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/true")
    here, there = Archive(python="bin/python"), Archive(python=str(home / "envs/bin/python"))
    assert "python: bin/python" in published_recipe(Recipe(passes=(here,)))
    text = published_recipe(Recipe(passes=(there,)))
    assert "OPTIMUM_PRUNE_PYTHON_ARCHIVE" in text.split("\n")[0]
    assert "python:" not in text


def test_evidence_options_and_artefacts_of_a_report_tell_no_place(home):
    artefact = dataclasses.replace(
        PACKED.artefact, interpreter=f"{home}/bin/python", not_read_here=f"no {home}/x/y.so"
    )
    step = dataclasses.replace(
        PACKED, options={"of": f"{home}/x"}, evidence=({f"{home}/a/b": [f"{home}/c"]},), artefact=artefact
    )
    report = dataclasses.replace(REPORT, model=f"{home}/small", passes=(step,)).published()
    assert PERSON not in report.to_json()
    assert report.model == "./small"
    assert report.published() == report


# Names that mean something else to a reader's program

HOSTILE = [
    "a|b",
    "```",
    "x\n---\nlicense: mit",
    "<script>alert(1)</script>",
    "---",
    "a: b",
    "[x](http://y)",
    "\u202etxt.exe",
    "\x1b[2J",
    "*x*_y_",
    "{{x}}",
    "-",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("owner", ["", "owner/", "/folder/"])
def test_a_card_shows_any_name_as_it_is(name, owner):
    perplexity = REPORT.perplexity
    after = dataclasses.replace(perplexity.after, text=name)
    report = dataclasses.replace(
        REPORT,
        model=f"{owner}{name}",
        perplexity=dataclasses.replace(perplexity, after=after),
        passes=(dataclasses.replace(PACKED, name=name),),
    )
    recipe = published_recipe(Recipe(passes=(Depth(layers=1),), settings=Settings(model=f"{owner}{name}")))
    card = model_card(report.published(), recipe)
    _, head, rest = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "tags": ["optimum-prune", "pruned"]}
    assert card.replace("\n", "").isprintable()
    before, _, yaml_text = rest.partition("The recipe:\n\n")
    marks = yaml_text.split("yaml\n")[0]
    assert set(marks) == {"`"}
    assert yaml_text.count(f"\n{marks}\n") == 1
    assert "<" not in before
    assert all(line.count("|") == 5 for line in before.split("\n") if line.startswith("|"))
    assert before.count("```") == 2


def test_a_local_folder_is_no_model_of_the_hub(home):
    Path("owner/small").mkdir(parents=True)
    for model, base in (("owner/small", None), ("owner/other", "owner/other")):
        for report in (dataclasses.replace(REPORT, model=model), dataclasses.replace(REPORT, model=model).published()):
            head = yaml.safe_load(model_card(report, "").split("---")[1])
            assert head.get("base_model") == base
    assert "model: ./owner/small\n" in published_recipe(
        Recipe(passes=(Depth(layers=1),), settings=Settings(model="owner/small"))
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_for_a_terminal_holds_nothing_that_a_terminal_obeys(name):
    report = dataclasses.replace(REPORT, passes=(dataclasses.replace(PACKED, name=name),))
    assert report.table().replace("\n", "").isprintable()


def test_markdown_keeps_plain_words():
    plain = "osscar: 9.3 s, peak memory 1.31 GB; in optimum_prune (4 of 5)"
    assert escaped(plain) == plain
    assert last_part("owner/small") == "small"


def test_speed_from_one_timing_is_not_published():
    published = model_card(REPORT, "") + REPORT.table()
    assert "tokens per second" not in published
    assert "Seconds for" not in published
