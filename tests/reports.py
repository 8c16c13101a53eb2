"""An invented report of a run that pruned, quantized and exported, and what it looks like when it is written."""

from __future__ import annotations

from optimum_prune import Cuts, Outcome, Report, Stage
from optimum_prune.checkpoint.verification import Verification
from optimum_prune.evaluation.perplexity import Perplexity
from optimum_prune.passes.outcome import Artefact
from optimum_prune.report.report import Change

PROTOCOL = {"text": "the end of some.txt", "windows": 4, "length": 32, "tokens": 124, "bos": True, "dtype": "float16"}
VERSIONS = {"python": "3.12.3", "torch": "2.9.0"}

PRUNED = Outcome(
    "osscar",
    Stage.PRUNE,
    {"ratio": 0.25, "protect": [0, 3]},
    9.34,
    1_310_000_000,
    Cuts.from_json({"blocks": {"2": ["feed_forward"]}, "channels": {"1": "0-2,7"}}),
    ({"nats": {0: {8: 0.0, 4: 0.5}}}, {"layer": 1, "width": 4, "relative_error": 0.125}),
)
PACKED = Outcome(
    "gptq",
    Stage.QUANTIZE,
    {"bits": 4},
    33.4,
    1_260_000_000,
    evidence=({"quantized_layers": 28},),
    artefact=Artefact(
        folder=".",
        bytes=98_700_000,
        tolerance=0.25,
        difference=0.0625,
        with_cache=0.0,
        same_tokens=12,
        generated=16,
        perplexity=33.11,
        tokens_per_second=2777.7,
        dtype="float16",
        interpreter="there/bin/python",
        not_read_here="ImportError: No module named gptqmodel.",
        versions=VERSIONS,
    ),
)
EXPORTED = Outcome(
    "onnx",
    Stage.EXPORT,
    {},
    12.0,
    2_000_000_000,
    evidence=({},),
    artefact=Artefact(
        folder="onnx",
        bytes=540_000_000,
        tolerance=0.001,
        difference=0.0000012,
        with_cache=0.0,
        same_tokens=16,
        generated=16,
        perplexity=None,
        tokens_per_second=None,
        dtype=None,
        interpreter=None,
        not_read_here=None,
        versions={"python": "3.12.3"},
    ),
)
REPORT = Report(
    model="HuggingFaceTB/SmolLM2-135M",
    parameters=Change(134_515_008, 118_100_000),
    non_embedding_parameters=Change(106_203_456, 89_800_000),
    bytes=Change(269_030_016, 236_300_000),
    perplexity=Change(
        Perplexity(22.97, **PROTOCOL, tokens_per_second=2583.9),
        Perplexity(33.11, **PROTOCOL, tokens_per_second=2777.7),
    ),
    passes=(PRUNED, PACKED, EXPORTED),
    calibration={"text": "some.txt", "windows": 8, "length": 32, "bos": True, "seed": 0},
    verified=Verification(0.0, 1.5e-06, 2.5e-07),
    seconds=74.3,
    versions=VERSIONS,
)

WRITTEN = {
    "model": "HuggingFaceTB/SmolLM2-135M",
    "parameters": {"before": 134515008, "after": 118100000},
    "non_embedding_parameters": {"before": 106203456, "after": 89800000},
    "bytes": {"before": 269030016, "after": 236300000},
    "perplexity": {
        "before": 22.97,
        "after": 33.11,
        "protocol": PROTOCOL,
        "tokens_per_second": {"before": 2583.9, "after": 2777.7},
    },
    "calibration": {"text": "some.txt", "windows": 8, "length": 32, "bos": True, "seed": 0},
    "passes": [
        {
            "name": "osscar",
            "stage": "PRUNE",
            "options": {"ratio": 0.25, "protect": [0, 3]},
            "seconds": 9.34,
            "peak_memory": 1310000000,
            "decisions": [
                {"nats": {"0": {"8": 0.0, "4": 0.5}}},
                {"layer": 1, "width": 4, "relative_error": 0.125},
            ],
        },
        {
            "name": "gptq",
            "stage": "QUANTIZE",
            "options": {"bits": 4},
            "seconds": 33.4,
            "peak_memory": 1260000000,
            "decisions": [{"quantized_layers": 28}],
            "artefact": {
                "folder": ".",
                "bytes": 98700000,
                "tolerance": 0.25,
                "difference": 0.0625,
                "with_cache": 0.0,
                "same_tokens": 12,
                "generated": 16,
                "perplexity": 33.11,
                "tokens_per_second": 2777.7,
                "dtype": "float16",
                "interpreter": "there/bin/python",
                "not_read_here": "ImportError: No module named gptqmodel.",
                "versions": VERSIONS,
            },
        },
        {
            "name": "onnx",
            "stage": "EXPORT",
            "options": {},
            "seconds": 12.0,
            "peak_memory": 2000000000,
            "decisions": [{}],
            "artefact": {
                "folder": "onnx",
                "bytes": 540000000,
                "tolerance": 0.001,
                "difference": 1.2e-06,
                "with_cache": 0.0,
                "same_tokens": 16,
                "generated": 16,
                "perplexity": None,
                "tokens_per_second": None,
                "dtype": None,
                "interpreter": None,
                "not_read_here": None,
                "versions": {"python": "3.12.3"},
            },
        },
    ],
    "verified": {
        "max_logit_difference": 0.0,
        "max_logit_difference_with_cache": 1.5e-06,
        "cached_against_uncached": 2.5e-07,
    },
    "stock": True,
    "architecture": "",
    "served_by": [],
    "seconds": 74.3,
    "processes": 1,
    "versions": VERSIONS,
}
CUTS = [
    {"pass": "osscar", "blocks": {"2": ["feed_forward"]}, "channels": {"1": "0-2,7"}},
    {"pass": "gptq"},
    {"pass": "onnx"},
]
TABLE = """\
                          before     after   change
Parameters               134.5 M   118.1 M  -12.2 %
... without embeddings   106.2 M    89.8 M  -15.4 %
Size on disk            269.0 MB  236.3 MB  -12.2 %
Perplexity                 22.97     33.11  +44.1 %
"""
MARKDOWN = """\
|  | before | after | change |
|---|---|---|---|
| Parameters | 134.5 M | 118.1 M | -12.2 % |
| ... without embeddings | 106.2 M | 89.8 M | -15.4 % |
| Size on disk | 269.0 MB | 236.3 MB | -12.2 % |
| Perplexity | 22.97 | 33.11 | +44.1 % |
"""
NOTES = [
    "osscar: 9.3 s, peak memory 1.31 GB",
    "gptq: 33.4 s, peak memory 1.26 GB; 98.7 MB, logits differ by 0.062 of their spread (0.25 tolerated), 12 of 16 tokens generated "
    "alike, perplexity 33.11; it cannot be read in this environment (ImportError: No module named gptqmodel.)",
    "onnx: 12.0 s, peak memory 2.00 GB; 540.0 MB in onnx/, logits differ by 1.2e-06 of their spread (0.001 tolerated), 16 of 16 tokens "
    "generated alike",
    "Perplexity on the end of some.txt: 4 windows of 32 tokens, with a beginning-of-sequence token, mean over 124 predicted tokens, float16",
    "Reloaded with stock transformers: logits differ by 0, with a cache by 1.5e-06",
    "74.3 s in all",
]
