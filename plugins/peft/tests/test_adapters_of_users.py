"""PEFT as its users call it, on models whose layers differ in shape."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from optimum_prune import Cuts, Decoder, load_model
from optimum_prune import testing as conformance
from optimum_prune.hooks.plugins import load

KINDS = {
    "widths": Cuts.along("channels", {1: tuple(range(24)), 3: tuple(range(40))}),
    "heads": Cuts.along("heads", {1: (0,), 3: (1,)}),
    "blocks": Cuts(blocks={0: ("feed_forward",), 2: ("attention",)}),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_adapters_go_where_they_go_in_the_stock_model(name, kind, tmp_path):
    decoder = Decoder.of(tiny.model(name), load().families)
    conformance.cut(decoder, KINDS[kind])
    decoder.model.save_pretrained(tmp_path / "small")
    model = get_peft_model(load_model(tmp_path / "small"), LoraConfig(task_type="CAUSAL_LM", r=2))
    stock = get_peft_model(tiny.model(name), LoraConfig(task_type="CAUSAL_LM", r=2))
    assert model.peft_config["default"].target_modules == stock.peft_config["default"].target_modules
    windows = tiny.windows(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=windows.tokens, labels=windows.tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    found = PeftModel.from_pretrained(load_model(tmp_path / "small"), tmp_path / "adapter").eval()
    expected = model.eval()(input_ids=windows.tokens).logits
    torch.testing.assert_close(found(input_ids=windows.tokens).logits, expected)
