from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request):
    return tiny.tokenizer(request.param)


@pytest.fixture(scope="module")
def plain():
    return tiny.tokenizer(bos=False)


@pytest.fixture
def sources(plugins):
    return plugins.sources


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A text in which no two windows are alike."""
    file = tmp_path_factory.mktemp("counting") / "counting.txt"
    file.write_text(" ".join(str(number) for number in range(10_000, 10_400)), encoding="utf-8")
    return file
