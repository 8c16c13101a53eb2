"""What a library changes within `isolated` is as before afterwards."""

import logging
import os
import sys
import warnings

import pytest
import torch

from optimum_prune.machine.isolation import isolated

LIBRARY = """
import logging, os
logging.root.setLevel(logging.DEBUG)
os.environ["LOUD_LIBRARY"] = "set when it is imported"
print("loud_library is here")
"""


@pytest.fixture
def loud(tmp_path, monkeypatch):
    """The name of a library that changes the process when it is imported."""
    (tmp_path / "loud_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "loud_library"
    sys.modules.pop("loud_library", None)


def state():
    return dict(os.environ), logging.root.level, list(logging.root.handlers), list(warnings.filters)


def change():
    os.environ["HOME"] = "elsewhere"
    os.environ.pop("PATH")
    logging.root.setLevel(logging.CRITICAL)
    logging.root.addHandler(logging.NullHandler())
    warnings.simplefilter("always")
    print("noise")


def test_all_is_put_back(loud, capsys):
    before = state()
    with isolated(loud):
        assert "LOUD_LIBRARY" in os.environ
        assert logging.root.level == before[1]
        change()
    assert state() == before
    assert not capsys.readouterr().out


def test_all_is_put_back_after_an_error(loud, capsys):
    before = state()

    @isolated(loud, seed=0, silent=True)
    def fail():
        change()
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="broke"):
        fail()
    assert state() == before
    assert logging.root.manager.disable == 0
    assert not capsys.readouterr().out


def test_random_numbers_follow_from_the_seed_and_go_on_afterwards():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn = []
    for _ in range(2):
        with isolated(seed=7):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(2), expected)


def test_random_numbers_are_left_alone_without_a_seed():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with isolated():
        torch.rand(4)
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_silence_is_only_while_it_lasts(caplog):
    with isolated(silent=True):
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("library").warning("noise")
        logging.getLogger("library").error("trouble")
    assert [record.message for record in caplog.records] == ["trouble"]
    with pytest.raises(UserWarning, match="noise"):
        warnings.warn("noise", stacklevel=1)
