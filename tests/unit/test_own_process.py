"""The marker ``own_process``: a test that runs elsewhere passes, fails and is skipped as here."""

import os
from types import SimpleNamespace

import pytest

from forked import run_alone

TESTS = """
import os
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError("not cleaned up")

def test_passes(tmp_path): (tmp_path / "file").touch()
def test_fails(): assert 1 + 1 == 3
def test_is_skipped(): pytest.skip("not here")
def test_dies(): os._exit(7)
def test_leaves_something(broken): pass
"""


@pytest.fixture
def alone(tmp_path):
    (tmp_path / "test_elsewhere.py").write_text(TESTS)

    def run(name):
        config = SimpleNamespace(rootpath=tmp_path)
        run_alone(SimpleNamespace(config=config, nodeid=f"test_elsewhere.py::{name}"))

    return run


def test_what_passes_there_passes(alone):
    alone("test_passes")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("test_fails", r"assert \(1 \+ 1\) == 3"),
        ("test_dies", "its process ended with exit code 7"),
        ("test_leaves_something", "not cleaned up"),
        ("test_that_is_not_there", "its process ended with exit code 4"),
    ],
)
def test_what_fails_there_fails(name, told, alone):
    with pytest.raises(pytest.fail.Exception, match=told):
        alone(name)


def test_what_is_skipped_there_is_skipped(alone):
    with pytest.raises(pytest.skip.Exception, match=r"^not here$"):
        alone("test_is_skipped")


@pytest.fixture(scope="module")
def pids():
    return []


@pytest.mark.own_process
def test_a_process_of_its_own(pids):
    pids.append(os.getpid())


def test_and_not_this_one(pids):
    assert pids == []  # that of the other process is another one, too
