"""What the pass writes, in OpenVINO GenAI, as its users run it."""

from __future__ import annotations

import pytest
import tiny
from optimum_prune_openvino import OpenVino
from transformers import AutoTokenizer

from optimum_prune import load_model


@pytest.mark.parametrize("name", ["small", "heterogeneous"])
def test_openvino_genai_reads_the_folder(name, request, convert):
    genai = pytest.importorskip("openvino_genai")
    source = request.getfixturevalue(name)
    folder, made = convert(OpenVino(), source)
    assert made.evidence["openvino_genai"] is True
    text = tiny.text(words=6)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    asked = {"max_new_tokens": 8, "do_sample": False}
    expected = load_model(source).generate(tokens, **asked)[0, tokens.shape[1] :]
    pipeline = genai.LLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    found = pipeline.generate([text], apply_chat_template=False, **asked).texts[0]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)
