"""A limit that the kernel enforces: Offload trains inside it, plain PyTorch is killed by it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from cgroup import CgroupUnavailableError, MemoryCgroup  # noqa: E402  (tools/ is no package)

pytestmark = pytest.mark.fit
LIMIT_NBYTES = 900 << 20
JOB = [sys.executable, str(TOOLS / "fit_job.py"), "--size", "124M", "--steps", "2"]


@pytest.fixture
def limited() -> Iterator[MemoryCgroup]:
    try:
        with MemoryCgroup("offload-test", LIMIT_NBYTES) as group:
            yield group
    except CgroupUnavailableError as error:
        pytest.skip(str(error))


def test_124m_parameters_train_in_900_mib(limited: MemoryCgroup, tmp_path: Path) -> None:
    done = limited.run([*JOB, "--budget=host=840MiB", "--nvme", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["parameters"] == 134_125_056
    assert job["peak_nbytes"] <= 840 << 20  # the budget, by the kernel's own count
    assert len(job["losses"]) == 2


def test_plain_pytorch_is_killed_by_the_same_limit(limited: MemoryCgroup) -> None:
    assert limited.run(JOB).killed
