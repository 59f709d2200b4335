"""``offload run`` and ``offload report`` on scripts that know nothing of Offload."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forked import Forked
from forked import python as run
from offload.cli import main
from offload.tiers.machine import read_machine

SCRIPT = """
import sys, torch, hashlib
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(300, 500)
        self.d = nn.Dropout(0.2)
        self.b = nn.Linear(500, 300)
    def forward(self, x):
        return self.b(self.d(torch.relu(self.a(x))))
model = Net()
with torch.no_grad():
    print(model(torch.ones(2, 300)).sum().item())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
for step in range(10):
    x = torch.randn(64, 300)
    loss = ((model(x) - x) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
digest = hashlib.sha1()
for parameter in model.parameters():
    digest.update(parameter.detach().numpy().tobytes())
print(sys.argv[1:], __name__, digest.hexdigest(), loss.item())
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.usefixtures("several_threads")
def test_an_unmodified_script_gives_the_same_bits(script: Path, tmp_path: Path) -> None:
    plain = run(script, "7", "--flag")
    record = tmp_path / "record"
    options = ["--budget=8GiB", "--nvme", tmp_path / "nvme", "--record", record]
    command = [sys.executable, "-m", "offload", "run", *options, script, "7", "--flag"]
    offloaded = subprocess.run(command, capture_output=True, text=True, check=False)
    assert offloaded.returncode == plain.returncode == 7
    assert offloaded.stdout == plain.stdout
    assert f"offload report {record}" in offloaded.stderr
    machine = read_machine(record / "machine.json")
    assert machine.tier(f"file:{tmp_path.resolve()}/nvme").kind == "file"
    report = run("-m", "offload", "report", "--json", record)
    document = json.loads(report.stdout)
    assert document["headline"]["steps"] == 10
    assert {row["role"] for row in document["lanes"]} >= {"weight", "gradient", "state"}
    assert "10 steps; done" in run("-m", "offload", "report", record).stdout
    other = run("-m", "offload", "run", *options, script, "0")
    assert other.returncode == 2
    assert "another command" in other.stderr


@pytest.mark.parametrize("stopped", [[], ["--stop-after", "2"]], ids=["to its end", "stopped"])
def test_a_full_disk_for_the_record_ends_no_run(stopped: list[str], tmp_path: Path) -> None:
    script, record = tmp_path / "train.py", tmp_path / "record"
    script.write_text(SCRIPT)
    record.mkdir()
    (record / "rank0.jsonl").symlink_to("/dev/full")
    options = ["--budget=8GiB", "--nvme", tmp_path / "nvme", "--record", record, *stopped]
    done = run("-m", "offload", "run", *options, script, "0")
    assert done.returncode == 0, done.stderr
    assert f"the record in {record} ends early (No space left on device)" in done.stderr


def test_a_record_that_cannot_be_told_whose_it_is(script: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "command.json").write_text("")
    assert main(["run", "--budget=8GiB", "--record", str(tmp_path), str(script)]) == 2
    assert "command.json can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["step", "never"])
def test_a_script_is_stopped_right_behind_a_step(
    commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what it does at its end happens, not even behind a bare except."""
    script = tmp_path / "train.py"
    body = SCRIPT.partition("digest =")[0].replace("\n", "\n    ")
    script.write_text(
        "import atexit, contextlib\natexit.register(print, 'at exit')\n"
        f"try:\n    {body.replace('range(10)', 'range(100)')}\n"
        "except:\n    print('caught')\nfinally:\n    print('finally')\n"
    )
    nvme, record = tmp_path / "nvme", tmp_path / "record"
    options = ["--budget=8GiB", "--nvme", nvme, "--record", record, "--commit", commit]
    command = ["-m", "offload", "run", *options, "--stop-after", "3", script]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "stopped behind step 3" in done.stderr
    assert len(done.stdout.splitlines()) == 1  # flushed, and no more than the loop's own
    again = run(*command)  # goes on where there is something to go on from
    assert f"stopped behind step {6 if commit == 'step' else 3}" in again.stderr
    assert main(["report", str(record)]) == 0
    assert "6 steps, started 2 times; stopped" in capsys.readouterr().out
    assert not (nvme / "offload-store" / "commit.json").exists() or commit == "step"


def test_an_arena_of_the_device_needs_one(script: Path, tmp_path: Path) -> None:
    done = run(
        *("-m", "offload", "run", "--budget=8GiB", "--nvme", tmp_path / "nvme", "--device-arena"),
        *(script, "0"),
    )
    assert done.returncode == 2
    assert "device_arena needs a CUDA device, and the model computes on the CPU" in done.stderr


def test_states_may_be_kept_in_bf16(script: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    options = ["--budget=8GiB", "--nvme", tmp_path / "nvme", "--record", record]
    command = ["-m", "offload", "run", *options, "--state-precision=bf16", script, "0"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads((record / "config.json").read_text())["state_precision"] == "bf16"
    commit = (tmp_path / "nvme" / "offload-store" / "commit.json").read_bytes()
    stored = json.loads(commit.partition(b"\n")[2])["tensors"]
    assert stored["a.weight#exp_avg_sq"]["dtype"] == "bfloat16"
    assert stored["a.weight"]["dtype"] == "float32"


def test_bf16_weights_may_have_masters(script: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.py"
    half.write_text(
        script.read_text()
        .replace("model = Net()", "model = Net().bfloat16()")
        .replace("300)", "300).bfloat16()")
        .replace("Linear(500, 300).bfloat16()", "Linear(500, 300)")
        .replace("detach().numpy()", "detach().float().numpy()")
    )
    options = ["--budget=8GiB", "--nvme", tmp_path / "nvme", "--master-weights=fp32"]
    done = run("-m", "offload", "run", *options, half, "0")
    assert done.returncode == 0, done.stderr
    commit = (tmp_path / "nvme" / "offload-store" / "commit.json").read_bytes()
    stored = json.loads(commit.partition(b"\n")[2])["tensors"]
    kinds = {name: entry["dtype"] for name, entry in stored.items() if name.startswith("a.weight")}
    assert kinds == {  # though the weights were built in the store as float32
        "a.weight": "bfloat16",
        "a.weight#exp_avg": "float32",
        "a.weight#exp_avg_sq": "float32",
        "a.weight#master_low": "int16",
    }


def test_nvme_may_be_given_more_than_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\nm = torch.nn.Linear(999, 999)\no = torch.optim.SGD(m.parameters(), 0.1)\n"
        "m(torch.ones(1, 999)).sum().backward(); o.step()\n"
    )
    a, b, record = tmp_path / "a", tmp_path / "b", tmp_path / "record"
    paths = [f"--nvme={a}", f"--nvme={b}"]
    done = run("-m", "offload", "run", "--budget=8GiB", *paths, f"--record={record}", script)
    assert done.returncode == 0, done.stderr
    assert all((path / "offload-store" / "part.json").exists() for path in (a, b))
    assert main(["report", "--json", str(record)]) == 0
    notices = json.loads(capsys.readouterr().out)["notices"]
    assert sum("stripes; measured reading" in notice for notice in notices) == 2
    assert sum("is on the same file system as" in notice for notice in notices) == 1
    (tmp_path / "link").symlink_to(a)
    for wrong, code, message in [
        ([f"--nvme={b}", f"--nvme={a}"], 1, f"nvme={a},{b} in that order"),
        ([f"--nvme={a},{a}"], 2, "is given twice"),
        ([f"--nvme={tmp_path / 'link'}"], 2, "symbolic link"),
    ]:
        assert main(["run", "--budget=8GiB", *wrong, str(script)]) == code
        assert message in capsys.readouterr().err


def test_a_module_and_a_script_that_fails(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    options = ["-m", "offload", "run", "--budget=8GiB", "--nvme", tmp_path]
    done = run(*options, "-m", "job", "a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "__main__ ['a']\n")
    for given, taken in (("--lr 1", "--lr 1"), ("-- --lr 1", "--lr 1"), ("a -- -m", "a -- -m")):
        done = run(*options, "-m", "job", *given.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"__main__ {taken.split()}\n")
    (tmp_path / "bad.py").write_text("raise KeyError('mine')\n")
    failed = run(*options, tmp_path / "bad.py")
    assert failed.returncode == 1
    assert "KeyError: 'mine'" in failed.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_end_cleanly_and_the_run_continues(
    number: int, code: int, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.replace("range(10)", "range(100_000)").replace(
            "    schedule.step()", "    schedule.step()\n    print(step, flush=True)"
        )
    )
    options = ["--budget=8GiB", "--nvme", str(tmp_path), "--record", str(tmp_path / "record")]
    child = Forked("-m", "offload", "run", *options, script, "0")
    for _ in range(4):
        child.output.readline()
    os.kill(child.pid, number)
    done = child.wait()
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    record = json.loads(
        (tmp_path / "offload-store" / "commit.json").read_bytes().partition(b"\n")[2]
    )
    assert record["step"] >= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "needs a script"),
        (["run", "missing.py"], "can't read the script missing.py"),
        (["run", "--budget", "much", "x.py"], "'much' is not a size"),
        (["run", "--budget", "24", "x.py"], "host=24: 24 bytes of memory hold nothing; a size has"),
        (["run", "--budget", "device=8,host=4GiB", "x.py"], "a size has a unit: 8GiB?"),
        (["run", "-m", "no.such.module"], "no module named"),
        (["run", "-m", "no.such.module", "--lr", "1"], "no module named"),
        (["run", "-m"], "-m needs the name of a module"),
        (["run", "--stop-after", "0", "x.py"], "--stop-after 0: at least 1"),
        (["run", "--alpha", "0.5", "x.py"], "only recompute='tokenwise' uses alpha"),
        (["run", "--recompute", "tokenwise", "--alpha", "2", "x.py"], "is no fraction of the rows"),
        (["report", "nowhere"], "not a run directory"),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_help_is_instant_because_torch_stays_out() -> None:
    code = (
        "import sys\nfrom offload.cli import build_parser\nbuild_parser().format_help()\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    assert "report" in run("-m", "offload", "--help").stdout
