"""What the tests of a failing store share: small disks, and folders that can't be written to."""

import os
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload.tiers.filetier import Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal

SMALL_DISK_NBYTES = 8 << 20


@pytest.fixture
def lanes():
    lanes = Lanes(Journal())
    yield lanes
    lanes.close()


@dataclass
class SmallDisk:
    """A folder that holds ``SMALL_DISK_NBYTES``: a mounted tmpfs, or else a limit on files."""

    folder: Path
    mounted: bool

    def fill(self):
        """Another process takes all the room that is left."""
        if self.mounted:
            fd = os.open(self.folder / "filler", os.O_WRONLY | os.O_CREAT)
            try:
                while True:
                    os.write(fd, bytes(PAGE))
            except OSError:
                os.close(fd)
        else:
            _limit_files(16)

    def free(self):
        """It gives the room back."""
        if self.mounted:
            (self.folder / "filler").unlink()
        else:
            _limit_files(SMALL_DISK_NBYTES)


def _limit_files(nbytes):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK_NBYTES}"]
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", *options, "offload-test", folder], stderr=subprocess.DEVNULL, check=False
    ).returncode  # fmt: skip
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        _limit_files(SMALL_DISK_NBYTES)
    yield SmallDisk(folder, mounted)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def read_only_folder(tmp_path):
    """A folder that can't be written to, whoever runs the tests."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere, nobody may not
    yield folder
    if user == 0:
        os.seteuid(0)
