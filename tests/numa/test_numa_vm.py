"""Boots the machines of tools/numa_vm: the tests under guest/ pass inside them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "tools" / "numa_vm" / "run.py"
UNFIT = 3

pytestmark = pytest.mark.numa_vm


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["--kernel", "6.12"], 78),
        (["--kernel", "6.1"], 78),
        (["--machine", "cxl"], 3),
    ],
    ids=["6.12", "6.1", "cxl"],
)
def test_placement_in_the_guest(options, least):
    done = subprocess.run(
        [sys.executable, RUN, *options], capture_output=True, text=True, check=False
    )
    if done.returncode == UNFIT:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr}"
    (passed,) = re.findall(r"= (\d+) passed in ", done.stdout)  # none failed, none skipped
    assert int(passed) >= least
