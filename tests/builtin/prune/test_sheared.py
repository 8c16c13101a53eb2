"""Masks learned with the weights to a target shape: exactly that shape comes out, computing what the gates made of the model."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close
from trained import digests, dying, trained

from optimum_prune import Osscar, compress, load_model
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.norms import norms_of
from optimum_prune.anatomy.workload import Workload
from optimum_prune.builtin.prune.bernoulli import Bernoulli
from optimum_prune.builtin.prune.sheared import Sheared
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import RecipeError
from optimum_prune.machine.progress import Progress
from optimum_prune.refit.first_cut import first_cut
from optimum_prune.refit.projecting import norms_behind
from optimum_prune.report.report import Report
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Decision
from optimum_prune.surgery.operation import carry_out, local_members
from optimum_prune.testing import check_pass, pruned
from optimum_prune.testing.models import logits
from optimum_prune.text.training import DomainText, Training
from optimum_prune.training.gates import FARTHEST, Gates, Row, drawn, likely, stretched
from optimum_prune.training.sheared import Shearing
from optimum_prune.training.watch import Watch

SHORT = {"steps": 12, "batch": 256, "learning_rate": 1e-3, "patience": 100}


# Gates


def rows(*sizes):
    return [Row(index, "channels", groups, units, keep) for index, (groups, units, keep) in enumerate(sizes)]


def test_as_many_gates_are_open_on_average_as_are_asked_for():
    generator = torch.Generator().manual_seed(0)
    made = rows((1, 64, 40), (3, 16, 2), (1, 2, 1), (1, 30, 29))
    scores = {row.key: torch.rand(row.groups, row.units, generator=generator) for row in made}
    gates = Gates(made, scores, 0.5)
    for part, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        gates.begin(0, part)
        for row in made:
            wanted = row.units - share * (row.units - row.keep)
            found = likely(gates.logits(row, share, gates.sharpness)).sum(1)
            assert_close(found, torch.full_like(found, wanted), atol=0.02 if share else 0.05, rtol=0)


def test_open_gates_are_as_frequent_as_they_are_likely():
    learned = torch.linspace(-4, 4, 9).repeat(20_000, 1)
    values = drawn(learned, torch.rand(learned.shape, generator=torch.Generator().manual_seed(0)))
    assert ((values >= 0) & (values <= 1)).all()
    assert_close((values > 0).float().mean(0), likely(learned)[0], atol=0.01, rtol=0)
    assert (values == 1).float().mean() > 0.1


def test_gradients_of_gates_are_along_the_constraint():
    (row,) = made = rows((1, 12, 7))
    gates = Gates(made, {row.key: torch.rand(1, 12, generator=torch.Generator().manual_seed(1))}, 0.5)
    weights = torch.rand(12, generator=torch.Generator().manual_seed(2))

    def total():
        return (stretched(gates.logits(row, 1.0, 1.0)) * weights).sum()

    total().backward()
    found = gates.learned[row.key].grad[0].clone()
    assert found.sum().abs() < 1e-4 * found.abs().max()  # whatever moves all alike is taken back by the shift
    with torch.no_grad():
        numeric = torch.zeros(12)
        for unit in range(12):
            for sign in (1, -1):
                gates.learned[row.key][0, unit] += sign * 1e-2
                numeric[unit] += sign * total().item() / 2e-2
                gates.learned[row.key][0, unit] -= sign * 1e-2
    assert_close(found, numeric, atol=2e-3, rtol=2e-2)


def test_the_likeliest_stay_in_the_order_of_scores():
    (row,) = made = rows((2, 5, 2))
    scores = torch.tensor([[3.0, 9.0, 1.0, 7.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    gates = Gates(made, {row.key: scores}, 0.2)
    assert [each.nonzero().flatten().tolist() for each in gates.open(row)] == [[1, 3], [3, 4]]
    assert gates.logits(row, 1.0, 1.0).abs().max() < FARTHEST


def test_gates_decide_in_the_end():
    (row,) = made = rows((1, 100, 60))
    gates = Gates(made, {row.key: torch.rand(1, 100, generator=torch.Generator().manual_seed(3))}, 0.2)

    def undecided(part):
        gates.begin(0, part)
        found = likely(gates.logits(row, 1.0, gates.sharpness))
        return ((found > 0.1) & (found < 0.9)).float().mean().item()

    assert undecided(0.2) > 0.3
    assert 0.05 < undecided(0.6) < 0.25
    assert undecided(1.0) == gates.undecided() < 0.06


# Gates in a model


def shorn(decoder: Decoder, step: Sheared, folder, seed: int = 0) -> Shearing:
    """A copy of a model with gates that were learned by chance."""
    found = step._rows(decoder)
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(found, {}, 0.2)
    for value in gates.learned.values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    copied, layer, axis = replace(decoder, model=copy.deepcopy(decoder.model)), decoder.layer(0), decoder.hidden()
    norms = [] if axis is None else norms_of(layer.module, local_members(axis, layer.prefix))
    behind = norms_behind(layer, Calibration(tiny.windows(2)).embed(decoder), norms)
    return Shearing(copied, folder, gates, behind, rate=0.1, float32=True)


SHAPES = {
    "llama": {"layers": 4, "heads": 1, "width": 40, "hidden_size": 24},
    "llama-tied": {"layers": 4, "width": 40, "hidden_size": 24},
    "gemma2": {"layers": 4, "heads": 1, "width": 40, "hidden_size": 24},
    "gemma3": {"layers": 4, "width": 40, "hidden_size": 24},
    "opt": {"layers": 5, "width": 40},
    "gpt2": {"layers": 4, "width": 40},
    "gpt_neox": {"layers": 4, "width": 40, "hidden_size": 24},
    "phi3": {"heads": 1, "width": 40},
    "cohere2": {"layers": 4, "width": 40, "hidden_size": 24},
    "mixtral": {"layers": 4, "width": 40, "hidden_size": 24},
    "qwen3_moe": {"heads": 1, "width": 16, "hidden_size": 24},
    "deepseek_v3": {"width": 16, "hidden_size": 24},
}


@pytest.mark.parametrize(("name", "options"), SHAPES.items(), ids=SHAPES)
def test_a_model_that_is_cut_computes_what_it_did_with_gates(name, options, plugins, tmp_path):
    decoder = Decoder.of(tiny.model(name), plugins.families)
    step, windows = Sheared(**options), tiny.windows(3)
    if "hidden_size" in options and "hidden" not in {axis.name for axis in decoder.shape().rest.axes}:
        step = replace(step, hidden_size=None)
    student = shorn(decoder, step, tmp_path)
    student.model.eval()
    with student.computing():
        gated = logits(student.model, windows)
    assert not torch.allclose(gated, logits(decoder.model, windows), atol=0.05)
    values = student.gates.values()
    assert any(((value > 0) & (value < 1)).any() for value in values.values())  # some are folded that are not 1
    cuts, foreseen = student.cuts(), step.foresee(decoder.shape())
    carry_out(decoder, Decision(cuts, student.folded(cuts)))
    sync_config(decoder)
    assert_close(logits(decoder.model, windows), gated, rtol=1e-3, atol=1e-4)
    assert decoder.shape() == foreseen


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_gates_get_gradients_and_the_dense_model_stays(name, plugins, tmp_path):
    decoder = Decoder.of(tiny.model(name), plugins.families)
    options, before = SHAPES[name], {key: value.clone() for key, value in decoder.model.state_dict().items()}
    student = shorn(decoder, Sheared(**options), tmp_path)
    student.model.train()
    tokens = tiny.windows(3).tokens
    for number in range(8):
        student.begin(number, 1.0)
        with student.computing():
            student.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for row in student.gates.rows:
        assert student.gates.learned[row.key].grad.abs().max() > 0, row
    missing = [name for name, value in student.model.named_parameters() if value.grad is None]
    assert missing == []
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


# The pass


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_exactly_the_shape_that_was_asked_for_comes_out_as_a_stock_checkpoint(name, recipe, tmp_path):
    options = SHAPES.get(name, {"layers": 3, "width": 24})
    report = compress(recipe(Sheared(**SHORT, **options, alpha=1.0), name=name), tmp_path / "out")
    config = load_model(tmp_path / "out").config
    said = {
        "layers": config.num_hidden_layers,
        "heads": config.num_key_value_heads,
        "width": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        "hidden_size": config.hidden_size,
    }
    assert {key: said[key] for key in options} == options
    assert report.stock
    evidence = report.passes[0].evidence[0]
    assert evidence["off_target"] < 0.01
    assert 0 < evidence["undecided"] < 0.05
    found = trained(report)
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert found["steps"] == 12
    assert not list(tmp_path.glob("*unfinished*"))


def test_what_the_last_look_saw_is_what_is_saved(recipe, tmp_path, monkeypatch):
    seen = []
    measured = Watch._measured

    def see(self, windows=None):
        seen.append((windows or self.lesson.held_out, measured(self, windows)))
        return seen[-1][1]

    monkeypatch.setattr(Watch, "_measured", see)
    report = compress(recipe(Sheared(**SHORT, **SHAPES["llama"])), tmp_path / "out")
    windows, value = seen[-1]
    assert value == trained(report)["held_out"]["after"]
    from optimum_prune.evaluation.perplexity import perplexity

    assert perplexity(load_model(tmp_path / "out"), windows, Progress()).value == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_it_keeps_the_contract_of_passes(name, tmp_path):
    check_pass(Sheared(layers=4, width=40, steps=3, batch=96, learning_rate=1e-3), tiny.model(name), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_begins_with_what_is_cut_at_once_and_refitted(name, recipe, tmp_path):
    """That is OSSCAR's choice, and nearly its perplexity: few gates are not quite open."""
    still = {"steps": 1, "batch": 256, "learning_rate": 1e-12, "gate_rate": 1e-12}
    at_once = compress(recipe(Osscar(ratio=0.25, multiple_of=8), name=name), tmp_path / "at-once")
    learned = compress(recipe(Sheared(width=tiny.WIDTH * 3 // 4, **still), name=name), tmp_path / "learned")
    assert learned.passes[0].cuts == at_once.passes[0].cuts
    assert learned.perplexity.after.value == pytest.approx(at_once.perplexity.after.value, rel=0.05)


def test_the_dense_model_is_in_no_way_changed_by_where_it_begins(plugins):
    decoder = Decoder.of(tiny.model("llama"), plugins.families)
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    found = first_cut(decoder, Calibration(tiny.windows(4)), [0, 1, 3, 5], {(1, "heads"): 1, (3, "channels"): 40})
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())
    assert set(found.units) == {(1, "heads"), (3, "channels")}
    kept = list(found.units[3, "channels"])
    gone = sorted(set(range(tiny.WIDTH)) - set(kept))
    name = "model.layers.3.mlp.down_proj.weight"
    healed = "model.layers.1.mlp.down_proj.weight"  # in front of a gap
    assert len(kept) == 40
    assert found.weights[name][:, gone].any()
    assert not torch.allclose(found.weights[name][:, kept], before[name][:, kept])
    assert not torch.allclose(found.weights[healed], before[healed])
    assert all(value.shape == before[key].shape for key, value in found.weights.items())


def test_gates_find_channels_that_do_nothing(plugins, tmp_path):
    decoder = Decoder.of(tiny.model("llama"), plugins.families)
    dead = torch.arange(tiny.WIDTH) % 4 == 1
    for layer in decoder.layers:
        layer.projection(layer.axes["channels"].output).maps[0].mul_(6)[:, dead] = 0
    windows = tiny.spoken(decoder.model, 40)
    step = Sheared(width=int((~dead).sum()), start="flat", gate_rate=0.5, steps=60, batch=480, learning_rate=1e-5)
    kept = pruned(step, decoder, windows, plugins).cuts.units
    gone = torch.ones(len(kept), tiny.WIDTH, dtype=torch.bool)
    for place, each in enumerate(kept.values()):
        gone[place, list(each)] = False
    assert (gone & dead).sum() > 0.9 * gone.sum()


def test_the_shape_of_another_model_may_be_the_target(recipe, checkpoints, tmp_path):
    small = tiny.model("llama")
    small.config.num_hidden_layers, small.config.intermediate_size, small.config.hidden_size = 3, 40, 24
    small.config.save_pretrained(tmp_path / "small")
    compress(recipe(Sheared(**SHORT, like=str(tmp_path / "small"))), tmp_path / "out")
    config = load_model(tmp_path / "out").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (3, 40, 24)
    assert config.num_key_value_heads == 2


def test_training_that_diverges_leaves_the_model_as_it_was_cut_at_first(recipe, tmp_path):
    report = compress(recipe(Sheared(**{**SHORT, "learning_rate": 1.0}, layers=4)), tmp_path / "out")
    found = trained(report)
    assert found["held_out"]["after"] == found["held_out"]["before"]
    dense, left = tiny.model("llama"), load_model(tmp_path / "out")
    queries = [layer.self_attn.q_proj.weight for layer in dense.model.layers]
    assert all(
        any(torch.equal(layer.self_attn.q_proj.weight, each) for each in queries) for layer in left.model.layers
    )


def test_the_less_the_text_counts_the_nearer_it_comes_to_the_dense_model(plugins):
    dense, apart = tiny.model("llama"), []
    spoken = tiny.spoken(dense, 80)
    told, other = spoken.part(slice(60)), spoken.part(slice(60, 80)).tokens
    wanted = dense(other).logits.log_softmax(-1)
    for alpha in (0.0, 1.0):
        decoder = Decoder.of(tiny.model("llama"), plugins.families)
        pruned(Sheared(**{**SHORT, "steps": 60}, layers=4, width=48, alpha=alpha), decoder, told, plugins)
        found = decoder.model(other).logits.log_softmax(-1)
        apart.append(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item())
    assert apart[0] < 0.9 * apart[1]


def test_the_plan_counts_that_the_dense_model_is_asked(plugins):
    shape, work = Decoder.of(tiny.model("llama"), plugins.families).shape(), Workload(32, tiny.VOCABULARY, 4, 8, 64)
    asked, alone = (Sheared(steps=100, layers=4, alpha=alpha).estimate(shape, work).products for alpha in (0.5, 1.0))
    assert alone < asked < 4 / 3 * alone  # a forward more than forward, backward and what it begins with


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_was_killed_goes_on(step, recipe, tmp_path):
    wanted = recipe(Sheared(**SHORT, **SHAPES["llama"], checkpoint_minutes=0))
    compress(wanted, tmp_path / "whole")
    with dying(step):
        compress(wanted, tmp_path / "out")
    compress(wanted, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert trained(Report.read(tmp_path / "out")) | {"seconds": 0, "tokens_per_second": 0} == trained(
        Report.read(tmp_path / "whole")
    ) | {"seconds": 0, "tokens_per_second": 0}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "whole"]


def test_batches_are_loaded_dynamically_while_it_learns(recipe, text_file, other_text_file, tmp_path):
    other = tmp_path / "third.txt"
    other.write_text(tiny.text(1500, seed=3))
    domains = (DomainText(name="one", text=str(other_text_file)), DomainText(name="two", text=str(other)))
    training = Training(domains=domains, dynamic=True, update_every=4, length=32)
    report = compress(recipe(Sheared(**SHORT, layers=4), training=training), tmp_path / "out")
    found = trained(report)["domains"]
    assert found["names"] == ["one", "two"]
    assert all(reference > 0 for reference in found["references"])
    assert [step for step, _, _ in found["moves"]] == [4, 8, 12]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are started as POSIX does")
def test_two_processes_learn_what_one_does(recipe, tmp_path):
    wanted = recipe(Sheared(**SHORT, **SHAPES["llama"]))
    one = compress(wanted, tmp_path / "one")
    file = tmp_path / "recipe.yaml"
    file.write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "optimum_prune", "compress", "run", str(file), "--output", str(tmp_path / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    two = Report.read(tmp_path / "two")
    losses = [[loss for _, loss, _ in trained(report)["losses"]] for report in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert two.passes[0].cuts == one.passes[0].cuts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs a target: some of 'layers', 'heads', 'width' and 'hidden_size', or 'like'"),
        ({"layers": 3, "like": "x"}, "is given layers and the shape of x. Give one of them"),
        ({"layers": 3, "steps": 3, "minutes": 1.0}, "is given steps and minutes. Give one of them"),
    ],
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=why):
        Sheared(**options)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("llama", {"layers": 7}, "is to leave 7 layers of 6. Ask for fewer"),
        ("llama", {"layers": 6}, "is to leave the shape that the model has. Ask for less"),
        ("llama", {"heads": 5}, "has heads 5, and there are 2 key-value heads. Ask for fewer"),
        ("llama", {"width": 64, "heads": 2}, "is to leave the shape that the model has"),
        ("llama", {"width": 100}, "has width 100, and there are 64 channels of the FFN. Ask for fewer"),
        ("gpt2", {"heads": 1}, "config of this architecture cannot say how many there are. Leave heads out"),
        ("gpt2", {"hidden_size": 8}, "config of this architecture cannot say another size"),
        ("llama", {"like": "/nowhere/at/all"}, "the shape of /nowhere/at/all, which cannot be read"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, options, why, plugins):
    with pytest.raises(RecipeError, match=why):
        Sheared(**options).foresee(Decoder.of(tiny.model(name), plugins.families).shape())


def like(config, folder, plugins, of="llama"):
    """What a model foresees that is to be like another."""
    config.save_pretrained(folder)
    return Sheared(like=str(folder)).foresee(Decoder.of(tiny.model(of), plugins.families).shape())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_a_model_is_like_itself_and_narrower_ones(name, plugins, tmp_path):
    config = tiny.model(name).config
    with pytest.raises(RecipeError, match="is to leave the shape that the model has"):
        like(config, tmp_path, plugins, name)
    config.num_hidden_layers = 5
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:5]
    foreseen = like(config, tmp_path / "shorter", plugins, name)
    assert len(foreseen.layers) == 5
    assert foreseen.layers == Decoder.of(tiny.model(name), plugins.families).shape().layers[:5]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama", {"num_key_value_heads": 1, "head_dim": 8}, "whose key-value heads are of another size"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "heads are of another size"),
        (
            "llama",
            {"intermediate_size": 80},
            "has width like .* 80, and there are 64 channels of the FFN. Ask for fewer",
        ),
        ("llama", {"intermediate_size": 40, "mlp_bias": False}, "whose layers have .* parameters, and would leave"),
        ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 2}, "has 2 experts where this model has 4"),
    ],
)
def test_a_model_that_no_cut_leaves_is_no_target(name, changes, why, plugins, tmp_path):
    config = tiny.model(name).config
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(RecipeError, match=why):
        like(config, tmp_path, plugins, name)


@pytest.mark.parametrize("start", ["refitted", "metric"])
@pytest.mark.parametrize("budget", [{"ramp": 1.0}, {"steps": 1}, {"ramp": 0.9, "steps": 4}], ids=str)
def test_what_was_learned_is_kept_however_late_the_target_is_reached(budget, start, recipe, tmp_path):
    report = compress(recipe(Sheared(**{**SHORT, "width": 40, "start": start, **budget})), tmp_path / "out")
    found = trained(report)
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert found["held_out"]["after"] == pytest.approx(min(value for _, value in found["looks"]), rel=1e-5)


def test_layers_that_differ_become_alike(recipe, tmp_path):
    uneven = Bernoulli(ratio=0.25, steps=2, batch=64, multiple_of=4)
    report = compress(recipe(uneven, Sheared(**SHORT, width=16, heads=1, hidden_size=16)), tmp_path / "out")
    config = load_model(tmp_path / "out").config
    assert (config.intermediate_size, config.num_key_value_heads, config.hidden_size) == (16, 1, 16)
    assert report.stock
