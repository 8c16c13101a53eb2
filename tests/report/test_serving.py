"""Who can serve a model, by its form."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from reports import REPORT

from optimum_prune.passes.base import Stage
from optimum_prune.report.card import model_card
from optimum_prune.report.report import Report
from optimum_prune.report.serving import ENGINES, who_serves

HERE = {"transformers": "transformers", "PEFT": "peft", "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def hows(model_type, *, stock):
    return {name: how for name, _, how in who_serves(model_type, stock=stock)}


PRUNED = replace(REPORT, passes=tuple(outcome for outcome in REPORT.passes if outcome.stage is Stage.PRUNE))


@pytest.mark.parametrize(
    ("model_type", "stock", "passes"),
    [
        ("llama", True, ["gguf", "onnx", "openvino"]),
        ("llama", False, ["gguf", "onnx", "openvino"]),
        ("qwen3", False, ["onnx", "openvino", "padded"]),
        ("gpt2", True, ["onnx", "openvino"]),
        ("gpt2", False, ["onnx", "openvino", "padded"]),
    ],
    ids=str,
)
def test_the_card_has_the_commands_that_work_with_such_a_model(model_type, stock, passes):
    card = model_card(replace(PRUNED, architecture=model_type, stock=stock), "")
    assert (
        re.findall(r"^optimum-cli compress export ([a-z]+) --model path/to/this/folder", card, re.MULTILINE) == passes
    )
    extras = ",".join(name for name in passes if name != "padded")
    assert f'pip install "optimum-prune[{extras}]"' in card


def test_the_card_of_what_is_quantized_says_what_loads_it_and_what_lies_beside_it():
    card = model_card(replace(REPORT, architecture="llama"), "")
    assert "What runs it" not in card
    assert "compress export" not in card
    assert "Its weights are quantized (by `gptq`), and so it loads with what quantized them: torch 2.9.0." in card
    exported = [outcome.name for outcome in REPORT.passes if outcome.stage is Stage.EXPORT]
    assert exported
    for name in exported:
        assert f"- `{name}/`, by the pass `{name}`; `{name}/example.py` runs it" in card


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("stock", [True, False])
def test_every_engine_says_how(model_type, stock):
    found = hows(model_type, stock=stock)
    assert list(found) == [engine.name for engine in ENGINES]
    assert all(found.values())


def test_it_depends_on_the_architecture_and_on_whether_layers_are_alike():
    assert hows("qwen3", stock=True)["llama.cpp"] == "a file by the pass `gguf`"
    assert "`padded`" in hows("qwen3", stock=False)["llama.cpp"]
    assert hows("qwen2", stock=False)["llama.cpp"] == "a file by the pass `gguf`"
    assert "--trust-remote-code" in hows("gemma3_text", stock=False)["vLLM"]
    assert "`padded`" in hows("gpt2", stock=False)["vLLM"]


@pytest.mark.parametrize("stock", [True, False])
def test_card_and_report_say_the_same(stock):
    report = replace(PRUNED, architecture="llama", stock=stock)
    card = model_card(report, "")
    told = json.loads(report.to_json())["served_by"]
    assert told == [{"engine": name, "version": version, "how": how} for name, version, how in report.served_by()]
    for each in told:
        assert f"| {each['engine']} | {each['version']} | {each['how']} |" in card
    assert Report.from_json(report.to_json()).architecture == "llama"
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_a_report_of_an_older_version_says_nothing_of_it():
    plain = REPORT.to_dict()
    del plain["architecture"], plain["served_by"]
    assert Report.from_dict(plain).served_by() == []
    assert "What runs it" not in model_card(REPORT, "")


def test_the_versions_are_those_that_tests_run():
    root = Path(__file__).parents[2]
    lines = [line for name in ("", "plugins/") for line in (root / f"{name}constraints.txt").read_text().split()]
    pins = dict(line.split("==") for line in lines if "==" in line)
    versions = {engine.name: engine.version for engine in ENGINES}
    for name, package in HERE.items():
        assert pins[package].startswith(versions[name]), name
