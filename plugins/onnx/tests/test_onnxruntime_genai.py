"""What the pass writes, in onnxruntime-genai, as its users run it."""

from __future__ import annotations

import pytest
import tiny
import torch
from optimum_prune_onnx import Onnx

from optimum_prune import load_model


def test_onnxruntime_genai_reads_the_folder(small, convert):
    genai = pytest.importorskip("onnxruntime_genai")
    folder, made = convert(Onnx(), small)
    assert made.evidence["onnxruntime_genai"] is True
    tokens = tiny.windows(count=1, length=9, seed=3).tokens
    expected = load_model(small).generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    options = genai.GeneratorParams(model := genai.Model(str(folder)))
    options.set_search_options(max_length=tokens.shape[1] + 12, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(tokens[0].tolist())
    while not generator.is_done() and len(generator.get_sequence(0)) < len(expected):
        generator.generate_next_token()
    found = torch.tensor(generator.get_sequence(0))
    assert torch.equal(found, expected[: len(found)])
    assert len(found) > tokens.shape[1]


def test_where_layers_have_other_caches_there_is_no_config_for_it(heterogeneous, convert):
    folder, made = convert(Onnx(), heterogeneous)
    assert made.evidence["onnxruntime_genai"] is False
    assert not (folder / "genai_config.json").exists()
