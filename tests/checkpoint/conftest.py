from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def folder(llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(llama, tmp_path / "copy")
