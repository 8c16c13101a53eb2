"""Controls: the same cut chosen otherwise, treated alike, and measured beside the one that a pass chose."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Calibration, Cuts, Decoder, Depth, Osscar, Pruner, Recipe, Report, Settings, Text, compress
from optimum_prune import testing as conformance
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.experts import ExpertPruner
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.evaluation.perplexity import perplexity
from optimum_prune.machine.progress import Progress
from optimum_prune.refit.controls import Control, told
from optimum_prune.selection.divergence import split
from optimum_prune.selection.otherwise import at_random, by_magnitude, chosen_otherwise, zeros_otherwise


def controlled(dense: Decoder, cuts: Cuts, windows, decided=()):
    after = Decoder(copy.deepcopy(dense.model), dense.family)
    conformance.cut(after, cuts)
    return Control(dense, after, cuts, decided).evidence(Calibration(windows))["perplexity"]


def perplexity_of(model, windows):
    return perplexity(model, split(windows)[1], Progress()).value


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "mixtral", "deepseek_v3"])
def test_what_was_chosen_is_measured_as_a_model_that_is_cut_so(name, decoder):
    windows = tiny.windows(9, padded=True)
    everything = {"heads": 1, "channels": 29, "experts": 16, "whole_experts": 4}
    cuts = [Cuts(layers=(0, 2, 3)), Cuts(blocks={1: ("attention",), 2: ("feed_forward",)})]
    cuts += [conformance.cuts_to(decoder, conformance.at_random(3), everything)]
    for cut in cuts:
        if cut == Cuts():
            continue
        found = controlled(decoder, cut, windows)
        smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
        conformance.cut(smaller, cut)
        assert found["chosen"] == pytest.approx(perplexity_of(smaller.model, windows), rel=1e-4)
        assert found["dense"] == pytest.approx(perplexity_of(decoder.model, windows), rel=1e-4)


@pytest.mark.parametrize("name", ["llama"])
def test_units_that_do_nothing_are_a_better_choice_than_chance_and_than_magnitude(name, decoder, plugins):
    """Those that do nothing have the largest weights."""
    dead = range(0, tiny.WIDTH, 2)
    for layer in decoder.layers:
        for path in ("mlp.gate_proj", "mlp.up_proj"):
            layer.part(path).weight.data[list(dead)] *= 10
        layer.part("mlp.down_proj").weight.data[:, list(dead)] = 0
    kept = tuple(index for index in range(tiny.WIDTH) if index not in dead)
    cuts = Cuts.along("channels", dict.fromkeys(range(len(decoder)), kept))
    found = controlled(decoder, cuts, tiny.windows(9))
    assert found["chosen"] == pytest.approx(found["dense"], rel=1e-4)
    assert abs(found["random"] / found["dense"] - 1) > 1e-3
    by_size = chosen_otherwise(decoder, cuts, by_magnitude())
    assert by_size.kept(0, "channels") == tuple(dead)
    smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
    conformance.cut(smaller, by_size)
    assert found["magnitude"] == pytest.approx(perplexity_of(smaller.model, tiny.windows(9)), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_a_pass_refitted_is_refitted_for_every_choice(name, decoder):
    windows = tiny.windows(12)
    cuts = conformance.cuts_to(decoder, conformance.at_random(1), {"channels": 24, "experts": 16})
    decided = {f"{layer.prefix}{axis.output}" for layer in decoder.layers for axis in layer.axes.values()}
    raw, refitted = (controlled(decoder, cuts, windows, names) for names in ((), decided))
    assert raw["dense"] == refitted["dense"]
    assert all(raw[name] != refitted[name] for name in ("chosen", "random", "magnitude"))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("length", [4, 64], ids=["few tokens", "many"])
def test_a_refit_on_few_tokens_is_damped_by_as_much_as_it_has_features_for_each(name, length, decoder):
    windows, kept = tiny.windows(12, length), tuple(range(0, tiny.WIDTH, 3))
    fitted = split(windows)[0].tokens[:4]
    projection, inputs = decoder.layers[0].part("mlp.down_proj"), []
    handle = projection.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().flatten(0, 1)))
    decoder.model(input_ids=fitted)
    handle.remove()
    rows = torch.cat(inputs).double()
    gram, weight = rows.T @ rows, projection.weight.detach().double()
    gram += max(0.01, tiny.WIDTH / len(rows)) * gram.diagonal().mean() * torch.eye(tiny.WIDTH)
    solved = torch.linalg.solve(gram[kept, :][:, kept], gram[kept, :] @ weight.T).T
    smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
    cuts = Cuts(units={(0, "channels"): kept})
    conformance.cut(smaller, cuts)
    smaller.layers[0].part("mlp.down_proj").weight.data.copy_(solved)
    found = controlled(decoder, cuts, windows, {f"{decoder.layers[0].prefix}mlp.down_proj.weight"})
    assert found["chosen"] == pytest.approx(perplexity_of(smaller.model, windows), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("scorer", [at_random(0), by_magnitude()], ids=["random", "magnitude"])
def test_as_much_is_kept_of_each_part(name, decoder, scorer):
    units = conformance.cuts_to(decoder, conformance.first, {"channels": 24, "heads": 2, "experts": 16})
    other = chosen_otherwise(decoder, units, scorer)
    assert other.units.keys() == units.units.keys()
    for where, kept in units.units.items():
        if isinstance(kept[0], int):
            assert len(other.units[where]) == len(kept)
        else:
            assert [len(each) for each in other.units[where]] == [len(each) for each in kept]
    conformance.cut(Decoder(copy.deepcopy(decoder.model), decoder.family), other)
    window = chosen_otherwise(decoder, Cuts(layers=(0, 4, 5)), scorer).layers
    gone = sorted(set(range(len(decoder))) - set(window))
    assert gone == list(range(gone[0], gone[0] + 3))
    assert len(chosen_otherwise(decoder, Cuts(layers=(1, 3)), scorer).layers) == 2
    blocks = chosen_otherwise(decoder, Cuts(layers=(0, 1, 2), blocks={1: ("attention",)}), scorer)
    left = [blocks.blocks.get(index, ("attention", "feed_forward")) for index in blocks.layers]
    counts = [sum(block in kept for kept in left) for block in ("attention", "feed_forward")]
    assert counts == [3, 2]  # three layers stay, one of them without its FFN


@pytest.mark.parametrize("name", ["qwen3_moe"])
@pytest.mark.parametrize("kept", [(0, 1, 2), (0, 2, 4)], ids=["window", "apart"])
def test_layers_go_at_random_whatever_their_sizes(name, kept, decoder):
    """Of this mixture some layers are dense, and much smaller."""
    counts = torch.zeros(len(decoder))
    for seed in range(200):
        left = chosen_otherwise(decoder, Cuts(layers=kept), at_random(seed)).layers
        counts[list(left)] += 1
    if kept == (0, 2, 4):
        assert_close(counts / 200, torch.full_like(counts, 0.5), atol=0.12, rtol=0)
    else:  # four windows of three
        assert_close(counts / 200, torch.tensor([3, 2, 1, 1, 2, 3]) / 4, atol=0.12, rtol=0)


def test_as_many_zeros_as_the_pass_made_lie_where_a_pattern_has_them():
    torch.manual_seed(0)
    scores, row = torch.rand(6, 16), torch.rand(6, 16)
    pattern = row.view(6, 4, 4).argsort(-1).argsort(-1).lt(2).view(6, 16)
    found = zeros_otherwise(pattern, scores)
    assert (found.view(6, 4, 4).sum(-1) == 2).all()
    assert (found != pattern).any()
    for lost, score in zip(found.view(24, 4), scores.view(24, 4), strict=True):
        assert score[lost].max() < score[~lost].min()
    uneven = torch.arange(16) < torch.tensor([[1], [5], [9], [2], [0], [16]])
    found = zeros_otherwise(uneven, scores)
    assert_close(found.sum(1), uneven.sum(1))


def test_a_choice_that_is_no_better_is_said_to_be():
    assert told({"chosen": 10.0, "random": 11.0, "magnitude": 12.0}, 3).endswith("12.00 by magnitude")
    assert told({"chosen": 10.0, "random": 9.0, "magnitude": 12.0}, 3).endswith(
        "so the choice is no better than chance there"
    )
    line = told({"chosen": 13.0, "random": 12.0, "magnitude": 13.0}, 3)
    assert line.endswith("so the choice is no better than chance or magnitude there")


PASSES = {
    "depth": Depth(layers=2),
    "osscar": Osscar(ratio=0.25, head_ratio=0.5),
    "blocks": BlockPruner(blocks=2),
    "wanda": Wanda(pattern="2:4"),
}


def report_of(model: Path, text: Path, output: Path, step, **settings):
    evaluation = Text(samples=settings.pop("evaluated", 3))
    recipe = Recipe(
        passes=(step,),
        calibration=Text(text=str(text), samples=8, length=24),
        evaluation=evaluation,
        settings=Settings(model=str(model), device="cpu", **settings),
    )
    return compress(recipe, output, progress=Progress())


def controls(report):
    found = report.passes[0].controls
    return [found["perplexity"]] if found else []


@pytest.mark.parametrize("step", PASSES.values(), ids=PASSES)
def test_every_report_has_them_alike_whether_weights_stay_on_disk_or_not(step, llama, text_file, tmp_path):
    reports = [
        report_of(llama, text_file, tmp_path / str(offload), step, offload=offload) for offload in (False, True)
    ]
    (found,), (offloaded,) = map(controls, reports)
    assert set(found) == {"dense", "chosen", "random", "magnitude"}
    assert all(1 < value < 1e6 for value in found.values())
    assert found == pytest.approx(offloaded, rel=1e-5)
    assert any(
        "the choice alone, refitted on little, on 2 windows: perplexity" in note for note in reports[0].passes[0].notes
    )


def test_a_mixture_without_some_experts_has_them_too(checkpoints, text_file, tmp_path):
    (found,) = controls(report_of(checkpoints("mixtral"), text_file, tmp_path / "out", ExpertPruner(keep=3)))
    assert len(set(found.values())) > 1


def test_features_of_hidden_states_have_them_too(checkpoints, text_file, tmp_path):
    (found,) = controls(report_of(checkpoints("llama-tied"), text_file, tmp_path / "out", HiddenPruner(ratio=0.5)))
    assert len(set(found.values())) == 4
    rotated = report_of(checkpoints("llama"), text_file, tmp_path / "rotated", HiddenPruner(ratio=0.5))
    assert "perplexity" not in rotated.passes[0].controls
    assert any("no choice of features comes to as much" in note for note in rotated.passes[0].notes)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_features_into_which_nothing_is_written_are_the_best_choice(name, decoder, plugins):
    axis, dead = decoder.hidden(), list(range(8))
    for member in axis.members:
        value, module = (
            decoder.model.get_parameter(member.path).data,
            decoder.model.get_submodule(member.path.rpartition(".")[0]),
        )
        if isinstance(module, torch.nn.Embedding) or (value.ndim > 1 and member.dim == 0):
            value.index_fill_(member.dim, torch.tensor(dead), 0)
    before, windows = Decoder(copy.deepcopy(decoder.model), decoder.family), tiny.windows(9)
    outcome = conformance.pruned(HiddenPruner(size=24, keep="energy"), decoder, windows, plugins)
    found = Control(before, decoder, outcome.cuts, ()).evidence(Calibration(windows))["perplexity"]
    assert found["chosen"] == pytest.approx(found["dense"], rel=1e-3)
    assert abs(found["random"] / found["dense"] - 1) > 1e-2


def test_where_nothing_is_to_be_measured_they_are_not(llama, text_file, tmp_path):
    assert controls(report_of(llama, text_file, tmp_path / "out", Depth(layers=2), evaluated=0)) == []


def test_a_model_given_in_python_has_them(text_file, tmp_path):
    model = tiny.model("llama").eval()
    output = tmp_path / "out"
    Pruner.from_pretrained(model, tokenizer=tiny.tokenizer()).prune(
        Osscar(ratio=0.25),
        calibration=Text(text=str(text_file), samples=8, length=24),
        evaluation=Text(samples=2),
        save_dir=output,
    )
    (found,) = controls(Report.read(output))
    assert found["dense"] != found["chosen"]


def test_choices_beside_one_that_was_trained_are_said_not_to_be():
    found = {"chosen": 10.0, "random": 11.0, "magnitude": 12.0}
    assert told(found, 3, trained=True).startswith(
        "the choice alone, without any training, refitted on little, on 3 windows: "
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("seed", range(6))
def test_units_of_a_part_that_goes_otherwise_go_where_one_stays_for_it(name, seed, decoder):
    """Attention is missing in a layer, and narrower in others; by chance it may be missing in these."""
    narrower = {index: (0,) for index in range(len(decoder)) if index != 1}
    cuts = Cuts.along("heads", narrower).merge(Cuts(blocks={1: ("feed_forward",)}))
    decided = [f"{layer.prefix}{layer.output_of('attention')}" for layer in decoder.layers]
    otherwise = chosen_otherwise(decoder, cuts, at_random(seed))
    sizes = []
    for cut in (cuts, otherwise):
        smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
        conformance.cut(smaller, cut)
        sizes.append(smaller.shape().parameters)
    assert sizes[0] == sizes[1]
    windows = tiny.windows(9)
    dense = Decoder(copy.deepcopy(decoder.model), decoder.family)
    conformance.cut(decoder, cuts)
    found = Control(dense, decoder, cuts, decided).evidence(Calibration(windows), seed)["perplexity"]
    assert all(value > 0 for value in found.values())
