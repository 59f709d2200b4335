"""One store has one user at a time."""

import signal
import subprocess
import sys

import pytest

from offload.allocator.errors import StoreInUseError
from offload.tiers.filetier import Lanes
from offload.tiers.journal import Journal
from offload.tiers.store import Store

HOLDER = """
import os, sys
from pathlib import Path
from offload.tiers.filetier import Lanes
from offload.tiers.journal import Journal
from offload.tiers.store import Store

store = Store(Path(sys.argv[1]), Lanes(Journal()))
store.commit(1, {}, {})
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_a_second_opener_in_the_same_process_is_refused(tmp_path, lanes):
    store = Store(tmp_path, lanes)
    store.commit(1, {}, {})
    before = (store.directory / "commit.json").read_bytes()
    with pytest.raises(StoreInUseError, match=r"offload-store is in use by process \d+"):
        Store(tmp_path, lanes)
    assert (store.directory / "commit.json").read_bytes() == before
    store.close()
    Store(tmp_path, lanes).close()


def test_a_second_opener_in_another_process_is_refused_until_the_first_is_gone(tmp_path, lanes):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        holder = child.stdout.readline().strip()
        for _ in range(2):  # the refused one must not take the holder's name off
            with pytest.raises(StoreInUseError, match=rf"in use by process {holder}: .*nvme="):
                Store(tmp_path, lanes)
        with pytest.raises(StoreInUseError):
            Store(tmp_path, lanes, discard_damaged=True)
        child.send_signal(signal.SIGKILL)
    store = Store(tmp_path, lanes)
    assert store.committed.step == 1
    store.close()


def test_the_lock_is_not_inherited_by_children(tmp_path, lanes):
    """A worker of a data loader that outlives its parent must not keep the store."""
    store = Store(tmp_path, lanes)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    store.close()
    other = Lanes(Journal())
    Store(tmp_path, other).close()
    other.close()
    child.communicate()
    assert child.returncode == 0
