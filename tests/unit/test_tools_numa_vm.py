"""A machine that can't run the virtual machine is told why, apart from a failure."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tools" / "numa_vm" / "run.py"


def test_a_machine_without_debian_packages_can_not_run_it(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("no virtual machine with memory nodes: ")
    told = done.stderr.removeprefix("no virtual machine with memory nodes: ").strip()
    assert f'"no virtual machine with memory nodes: {told.split(",")[0]}' in (
        ROOT / ".ci" / "run"
    ).read_text("utf-8")
