from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from optimum_prune import Outcome, Stage
from optimum_prune.errors import PassError
from optimum_prune.passes.evidence import LARGEST, plain_evidence


def outcome(*evidence):
    return Outcome("mine", Stage.PRUNE, {}, 1.0, 1, evidence=evidence)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (None, None),
        ("text", "text"),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        ((1, 2), [1, 2]),
        ([(1, [2])], [[1, [2]]]),
        ({3: 0.5, "a": (1,)}, {"3": 0.5, "a": [1]}),
        ({0.5: 1, True: 2, None: 3, np.int64(4): 5}, {"0.5": 1, "true": 2, "null": 3, "4": 5}),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor(3), 3),
        (torch.tensor([0.5, 0.25], dtype=torch.bfloat16), [0.5, 0.25]),
        (torch.zeros(2, requires_grad=True), [0.0, 0.0]),
        ({"deep": [torch.tensor(True)]}, {"deep": [True]}),
    ],
    ids=repr,
)
def test_evidence_is_made_plain(given, plain):
    found = plain_evidence({"it": given}, "mine")
    assert found == {"it": plain}
    assert json.dumps(found) == json.dumps({"it": plain})


def test_a_tensor_is_taken_up_to_a_size():
    assert plain_evidence({"it": torch.zeros(LARGEST)}, "mine") == {"it": [0.0] * LARGEST}


@pytest.mark.parametrize(
    ("evidence", "sentence"),
    [
        (
            {"scores": torch.zeros(64, 65)},
            r"'mine' gives as evidence, at 'scores', a tensor of 4,160 numbers, where at most 1,024",
        ),
        ({"all": {3: [{1, 2}]}}, r"'mine' gives as evidence, at 'all\.3', a set, which JSON cannot hold\. Give text"),
        ({"where": Path("here")}, r"'mine'.* at 'where', a \w*Path"),
        ({"rotated": np.complex64(1)}, r"'mine'.* at 'rotated', a complex"),
        ({"wide": np.longdouble(1)}, r"'mine'.* at 'wide', a \w+"),
        ({(1, 2): 0.5}, r"'mine'.* at '\(1, 2\)', a tuple as a name"),
        (["dropped", 3], r"'mine' gives as evidence a list\. Give a mapping"),
        (None, r"'mine' gives as evidence a NoneType\."),
    ],
)
def test_other_evidence_is_refused_in_a_sentence_that_names_the_pass(evidence, sentence):
    with pytest.raises(PassError, match=sentence):
        plain_evidence(evidence, "mine")
    with pytest.raises(PassError, match=sentence):
        outcome({}, evidence)


def test_an_outcome_has_its_evidence_as_the_pass_gave_it():
    given = {"scores": {3: 0.5}}
    assert outcome(given).evidence == (given,)
    assert outcome(given).to_plain()["decisions"] == [{"scores": {"3": 0.5}}]


def test_evidence_that_holds_itself_is_refused():
    evidence = {"name": []}
    evidence["name"].append(evidence)
    with pytest.raises(PassError, match=r"at 'name', lists or mappings that lie in one another without end"):
        plain_evidence(evidence, "mine")
