"""Source that reads datasets of the Hugging Face Hub, streamed where they are large."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.errors import TextError, reason
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.text.source import Source, check_column
from optimum_prune.text.text import Text

STREAMED_FROM = 1024**3
"""A dataset whose download is this large, in bytes, is streamed."""
WITHOUT_CODE = 4
"""The version of datasets from which on a dataset has no code of its own, which earlier ones ask whether to run."""


def _read_hub(text: Text) -> Iterator[str | None]:
    import datasets

    name, config, split = text.dataset_parts
    no_code = {} if int(datasets.__version__.split(".")[0]) >= WITHOUT_CODE else {"trust_remote_code": False}
    try:
        builder = datasets.load_dataset_builder(name, config, **no_code)
        size = builder.info.download_size
        streaming = size is None or size >= STREAMED_FROM
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming, **no_code)
    except Exception as error:  # whatever the Hub, the network or a dataset's own code may raise
        raise TextError(
            f"The dataset {text.describe()} cannot be loaded: {reason(error)} Check its name, config and split and the "
            f"network, or name a text file."
        ) from error
    names = rows.column_names
    if names is not None:
        check_column(text.column, names, text)
    for row in rows:
        if names is None:  # older datasets tell no names of what is streamed
            names = list(row)
            check_column(text.column, names, text)
        yield row[text.column]


@hookimpl
def calibration_sources() -> Iterator[Source]:
    yield Source("hub", _read_hub)
