"""What a pass from folder to folder wrote is completed: with the tokenizer, and with what transformers 4 reads."""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from folder_passes import Archive, Halve
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_prune import FolderPass, Job, Progress, Windows, load_model
from optimum_prune.checkpoint import saving
from optimum_prune.conversion.conversion import convert, convert_and_judge
from optimum_prune.errors import PassError, PluginError
from optimum_prune.evaluation.comparison import ReferenceOutputs
from optimum_prune.evaluation.runtime import TransformersRuntime
from optimum_prune.passes.folder import tolerance_by_bits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkpoint of a model whose rotary frequency transformers 4 would miss, with its tokenizer."""
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    folder = tmp_path_factory.mktemp("source") / "model"
    saving.save(
        LlamaForCausalLM(LlamaConfig(**tiny.SIZES, rope_parameters=rope)), tiny.tokenizer(), folder, Progress()
    )
    return folder


@pytest.fixture
def job(source, tmp_path):
    (tmp_path / "target").mkdir()
    return Job(source, tmp_path / "target", tiny.windows(4, 16, padded=True), "cpu", Progress())


@dataclass(frozen=True, kw_only=True)
class WithItsOwn(Halve):
    """Writes a tokenizer of its own."""

    name: ClassVar[str] = "with-its-own"

    def convert(self, job):
        tokenizer = job.tokenizer()
        tokenizer.model_max_length = 7
        tokenizer.save_pretrained(job.target)
        return super().convert(job)


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("step", [Halve(), Archive()], ids=["quantize", "export"])
def test_the_tokenizer_is_there(step, job):
    convert(step, job)
    text = tiny.text(20)
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(text) for folder in (job.source, job.target))
    assert ours == theirs


def test_a_tokenizer_that_the_pass_wrote_stays(job):
    convert(WithItsOwn(), job)
    assert AutoTokenizer.from_pretrained(job.target).model_max_length == 7


@pytest.fixture
def with_companions(source, tmp_path):
    """A checkpoint with what belongs beside it, and what does not."""
    folder = shutil.copytree(source, tmp_path / "with-companions")
    for name in ("LICENSE", "tokenizer.model", "chat_template.json", "processing_own.py", "stray.py", "notes.txt"):
        (folder / name).write_text("of the source")
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoProcessor": "processing_own.Own"}}')
    return folder


COMPANIONS = ["LICENSE", "chat_template.json", "preprocessor_config.json", "processing_own.py", "tokenizer.model"]


@pytest.mark.parametrize("step", [Halve(), WithItsOwn()], ids=lambda step: step.name)
def test_what_belongs_beside_a_checkpoint_is_carried_along(step, job, with_companions):
    before = {entry.name for entry in job.target.iterdir()}
    convert(step, Job(with_companions, job.target, job.calibration, "cpu", Progress()))
    assert before == set()
    assert [name for name in COMPANIONS if not (job.target / name).is_file()] == []
    assert not (job.target / "stray.py").exists()
    assert not (job.target / "notes.txt").exists()


def test_an_export_is_no_checkpoint_that_anything_is_put_beside(job, with_companions):
    convert(Archive(), Job(with_companions, job.target, job.calibration, "cpu", Progress()))
    assert [name for name in COMPANIONS if (job.target / name).exists()] == []


def test_without_a_tokenizer_there_is_none_to_put_there(job, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(job.source, bare, ignore=shutil.ignore_patterns("*token*"))
    convert(Halve(), Job(bare, job.target, job.calibration, "cpu", Progress()))
    assert not list(job.target.glob("*token*"))


def test_a_checkpoint_says_what_transformers_4_reads_and_an_export_is_left_as_its_pass_wrote_it(job, tmp_path):
    convert(Halve(), job)
    assert config(job.target)["rope_theta"] == 50_000.0
    (tmp_path / "export").mkdir()
    convert(Archive(), Job(job.source, tmp_path / "export", job.calibration, "cpu", Progress()))
    written = tmp_path / "written"
    load_model(job.source).save_pretrained(written)
    assert config(tmp_path / "export").keys() == config(written).keys()


def test_an_error_on_the_way_names_the_pass(job, monkeypatch):
    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(Job, "tokenizer", fail)
    with pytest.raises(PassError, match=r"'halve' failed: OSError: no space left"):
        convert(Halve(), job)


def test_examples_are_windows_without_padding(job):
    windows = job.calibration
    for example, tokens, mask in zip(job.examples(), windows.tokens, windows.mask, strict=True):
        assert torch.equal(example["input_ids"], tokens[mask][None])
        assert torch.equal(example["attention_mask"], torch.ones_like(example["input_ids"]))


def test_a_conversion_knows_what_it_ran_with(job):
    windows = Windows.from_tokens(tiny.windows(4, 16).tokens)
    expected = ReferenceOutputs.of(TransformersRuntime(load_model(job.source)), windows.tokens)
    made = convert_and_judge(Halve(), job, expected, None)
    assert made.versions["torch"] == torch.__version__
    assert made.versions.keys() >= {"python", "transformers"}


def test_a_pass_that_speaks_of_odd_checkpoints_is_told_what_they_are_called_now():
    with pytest.raises(PluginError, match="Older says takes_odd, which is called takes_heterogeneous now: rename it"):

        class Older(FolderPass):
            takes_odd = True


def test_fewer_bits_are_tolerated_further():
    tolerances = [tolerance_by_bits(bits) for bits in (2, 3, 4, 8)]
    assert tolerances == sorted(tolerances, reverse=True)
