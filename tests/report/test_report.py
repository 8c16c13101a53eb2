from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from reports import CUTS, EXPORTED, NOTES, PACKED, REPORT, TABLE, WRITTEN

from optimum_prune import Report
from optimum_prune.checkpoint.verification import Verification
from optimum_prune.errors import CheckpointError
from optimum_prune.report.report import Change


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read_again(report):
    return Report.from_json(report.to_json(), json.dumps(report.cuts()))


def measured(**after):
    return Change(REPORT.perplexity.before, replace(REPORT.perplexity.after, **after))


VARIANTS = {
    "whole": REPORT,
    "not evaluated": replace(REPORT, perplexity=None),
    "nothing done": replace(REPORT, passes=()),
    "of several processes": replace(REPORT, processes=4, stock=False),
    "another dtype after": replace(REPORT, perplexity=measured(dtype="bfloat16")),
    "infinite perplexity": replace(REPORT, perplexity=measured(value=math.inf)),
    "artefact of infinite perplexity": replace(
        REPORT, passes=(replace(PACKED, artefact=replace(PACKED.artefact, perplexity=math.inf)),)
    ),
}


def test_what_is_written_has_the_same_keys_in_the_same_order_as_ever():
    assert REPORT.to_json() == json.dumps(WRITTEN, indent=2)
    assert REPORT.cuts() == CUTS


def test_what_is_written_long_ago_can_be_read():
    assert Report.from_json(json.dumps(WRITTEN), json.dumps(CUTS)) == REPORT


@pytest.mark.parametrize("report", VARIANTS.values(), ids=VARIANTS)
def test_a_report_reads_back_as_it_was(report):
    assert read_again(report) == report


@pytest.mark.parametrize("report", VARIANTS.values(), ids=VARIANTS)
def test_a_report_goes_through_the_state_of_a_run_that_goes_on_later(report):
    state = json.loads(json.dumps(report.to_state(), allow_nan=False))
    assert Report.from_state(state) == report


@pytest.mark.parametrize("report", VARIANTS.values(), ids=VARIANTS)
def test_a_report_that_was_read_is_shown_and_written_as_before(report):
    again = read_again(report)
    assert again.table() == report.table()
    assert again.to_json() == report.to_json()


def test_figures_that_are_not_finite_are_null_and_read_back_as_nan_or_infinity():
    far = replace(EXPORTED, artefact=replace(EXPORTED.artefact, difference=math.nan, with_cache=math.nan))
    strange = replace(
        REPORT, perplexity=measured(value=math.inf), verified=Verification(0.0, math.nan, 0.0), passes=(far,)
    )
    written = json.loads(strange.to_json(), parse_constant=refuse)
    assert written["perplexity"]["after"] is None
    assert written["verified"]["max_logit_difference_with_cache"] is None
    found = read_again(strange)
    assert found.perplexity.after.value == math.inf
    assert math.isnan(found.verified.max_logit_difference_with_cache)
    assert math.isnan(found.passes[0].artefact.difference)
    assert math.isnan(found.passes[0].artefact.with_cache)
    assert found.passes[0].artefact.perplexity is None


def test_without_its_cuts_a_report_says_that_nothing_was_cut():
    found = Report.from_json(REPORT.to_json())
    assert found.cuts() == [{"pass": "osscar"}, {"pass": "gptq"}, {"pass": "onnx"}]
    assert found.to_dict() == REPORT.to_dict()


def test_a_perplexity_in_another_dtype_keeps_its_protocol():
    written = replace(REPORT, perplexity=measured(dtype="bfloat16")).to_dict()["perplexity"]
    assert written["protocol"]["dtype"] == "bfloat16"
    assert written["protocol_before"] == {**written["protocol"], "dtype": "float16"}


def test_the_evidence_in_a_report_is_what_json_holds():
    evidence = REPORT.passes[0].evidence
    assert evidence[0] == {"nats": {"0": {"8": 0.0, "4": 0.5}}}
    assert json.loads(json.dumps(evidence)) == list(evidence)


def test_the_versions_are_those_of_the_run_that_makes_the_report(monkeypatch):
    made = replace(REPORT, versions=Report.__dataclass_fields__["versions"].default_factory())
    monkeypatch.setattr("platform.python_version", lambda: "another")
    assert made.to_dict()["versions"]["python"] != "another"
    assert {"torch", "transformers"} <= made.versions.keys()
    assert read_again(made).versions == made.versions


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("", "[]"),
        ("[]", "[]"),
        ("{}", "[]"),
        (json.dumps(WRITTEN)[:-20], "[]"),
        (json.dumps({**WRITTEN, "verified": {}}), "[]"),
        (json.dumps({**WRITTEN, "passes": [{**WRITTEN["passes"][0], "stage": "BREW"}]}), "[]"),
        (json.dumps(WRITTEN), json.dumps(CUTS[:2])),
        (json.dumps(WRITTEN), "nothing"),
    ],
)
def test_what_is_no_report_is_refused(text, cuts):
    with pytest.raises(CheckpointError, match=r"no report as a run writes it.*output folder"):
        Report.from_json(text, cuts)


def test_the_table_has_figures_and_how_they_came_about():
    assert REPORT.table() == "\n".join([TABLE, *NOTES])


def test_the_table_of_a_run_that_evaluated_nothing_has_sizes_only():
    report = replace(REPORT, perplexity=None, stock=False)
    assert [row[0] for row in report.rows()] == ["Parameters", "... without embeddings", "Size on disk"]
    assert "Reloaded with optimum_prune (its layers differ in shape): logits" in report.table()
    assert "Perplexity on" not in report.table()
