"""The smallest memory in which models of 124M to 3B parameters train, and at what speed.

Every Offload run is a child process in a memory cgroup: the kernel enforces the limit, page
cache included. The smallest limit is the one that Offload's own errors lead to: a run with too
small a budget says which one fits, and that one is then tried under the kernel's limit. The plain
run's need is measured where this machine can hold it (the peak resident set of the same two steps
in memory) and otherwise computed from 16 bytes a parameter.

Efficiency = max(compute time of the step with everything resident, bytes moved / disk limit) /
step time. Resident compute is measured on a model of the same width with few blocks and scaled
by block; the disk limit is measured with the same proportion of reads to writes. Both are taken
right after the run that they are compared with. At the comfortable limit the optimizer steps
behind backward, as by default, then in it (``step_in_backward``), and in the next forward
(``step_in_forward``); ``--ways`` takes some of these alone, and leaves the smallest limit out.
Seconds and bytes of a step are medians of five behind a first one, which reads no states.

Efficiency does not count what the processors do beside the model: moving bytes, zeroing pages,
checksums. ``processors_s`` is all that they do in a step, busy waiting left out, over their number:
a second run of the same, in which threads that wait sleep (``OMP_WAIT_POLICY=passive``), tells it.
No schedule of the same work makes a step shorter than ``bound_s``, the longest of resident
compute, ``disk_s`` and ``processors_s``; ``passive_step_s`` is the step of the second run.
``halves_s`` is the same of forward alone (loss included) and of the rest alone, added up, with the
bytes that each moved: only what memory holds at the turn could have moved in the other half.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import Result, arguments, finish, quantiles
from cgroup import CgroupUnavailableError, Finished, MemoryCgroup
from iolimit import DiskLimit
from stepmeter import processors_s

_JOB = Path(__file__).with_name("fit_job.py")
_MIB = 1 << 20
_PLAIN_STATE_NBYTES = 16  # fp32 weight, gradient and two AdamW states
# Page tables, page cache of libraries and buffers in the kernel: what a cgroup counts beside the
# resident set that the budget bounds.
_KERNEL_NBYTES = 48 * _MIB


@dataclass(frozen=True)
class Size:
    """A model, a comfortable limit, and whether that limit is a promise to keep."""

    name: str
    parameters: int
    limit_mib: int
    promised: bool = False


SIZES = (
    Size("124M", 134_125_056, 900),
    Size("350M", 367_839_232, 900),
    Size("1.3B", 1_339_232_256, 1536, promised=True),
    Size("3B", 2_947_000_000, 1536),
)
_BEHIND, _IN_BACKWARD = "optimizer behind backward", "optimizer in backward"
_IN_FORWARD = "optimizer in forward"
_FLAGS = {_BEHIND: [], _IN_BACKWARD: ["--step-in-backward"], _IN_FORWARD: ["--step-in-forward"]}
_ADVICE = re.compile(r"host=(\d+)MiB")
_WARM_UP, _MEASURED = 1, 5  # steps
_MOST_ADVICE = 4  # errors in a row; each names a larger budget than the one before
# Gradients, and weights and states in one slot or in the two that commits take, with some air.
_DISK_NBYTES_PER_PARAMETER = {"never": 18, "step": 30}


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", nargs="*", choices=[size.name for size in SIZES])
    parser.add_argument("--ways", nargs="*", choices=list(_FLAGS), default=[])
    options = parser.parse_args()
    names = options.sizes or (["124M"] if options.quick else [size.name for size in SIZES])
    result = Result("Training within a memory limit that the kernel enforces")
    try:
        for size in SIZES:
            if size.name in names:
                _measure(size, options.nvme, result, options.ways, quick=options.quick)
    except CgroupUnavailableError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 1
    return finish(result, options.json)


def _measure(
    size: Size, directory: Path, result: Result, only: Sequence[str], *, quick: bool
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    needs = {key: size.parameters * each for key, each in _DISK_NBYTES_PER_PARAMETER.items()}
    commit = "step" if free >= needs["step"] else "never"
    if free < (needed := needs[commit]):
        result.notes.append(f"{size.name}: left out, needs {needed} bytes of disk, {free} are free")
        if size.promised:
            result.check(f"{size.name} trains in {size.limit_mib} MiB", 0.0, 1)
        return
    plain = _plain_need(size)
    runs = [(size.limit_mib, step) for step in only or _FLAGS]
    if not (quick or only):
        runs.append((_smallest_limit_mib(size, commit, directory), _BEHIND))
    passed: list[dict[str, Any]] = []
    for limit_mib, step in runs:
        done = _run(size, limit_mib, commit, directory, step)
        if done.returncode != 0:
            result.notes.append(f"{size.name} in {limit_mib} MiB, {step}: {_why(done)}")
            continue
        row = {"size": size.name, "commit": commit, "step": step}
        passed.append(row | _row(size, limit_mib, done, plain, directory))
        again = _run(size, limit_mib, commit, directory, step, OMP_WAIT_POLICY="passive")
        passed[-1] |= _bound(passed[-1], again)
        result.add(**passed[-1])
    if size.promised:
        _check(size, passed, only or _FLAGS, directory, result)


def _smallest_limit_mib(size: Size, commit: str, directory: Path) -> int:
    """The limit that leaves the budget which Offload's errors end at."""
    store, budget_mib = directory / "fit", 1
    for _ in range(_MOST_ADVICE):
        shutil.rmtree(store, ignore_errors=True)
        command = _command(size, f"host={budget_mib}MiB", store, steps=1)
        done = subprocess.run(
            [*command, "--commit", commit], capture_output=True, text=True, check=False
        )
        advice = _ADVICE.findall(done.stderr)
        if done.returncode == 0 or not advice:
            break
        budget_mib = int(advice[-1])
    shutil.rmtree(store, ignore_errors=True)
    return budget_mib + _KERNEL_NBYTES // _MIB


def _check(
    size: Size,
    passed: list[dict[str, Any]],
    ways: Collection[str],
    directory: Path,
    result: Result,
) -> None:
    """The figures that are promised at one limit."""
    limit_mib = size.limit_mib
    kept = {row["step"]: row for row in passed if row["limit_nbytes"] == limit_mib * _MIB}
    for step, efficiency in ((_BEHIND, 0.6), (_IN_BACKWARD, 0.85)):
        if step not in ways:
            continue
        name = f"{size.name} in {limit_mib} MiB, {step}"
        result.check(f"{name}: trains", float(step in kept), 1)
        if step in kept:
            result.check(f"{name}: efficiency", kept[step]["efficiency"], efficiency)
    with MemoryCgroup("offload-fit-plain", limit_mib * _MIB) as group:
        killed = group.run(_command(size, None, directory)).killed
    result.check(f"the same limit kills plain {size.name}", float(killed), 1)


def _row(
    size: Size, limit_mib: int, done: Finished, plain: tuple[str, int], directory: Path
) -> dict[str, Any]:
    job = json.loads(done.stdout)
    compute_s = json.loads(_child(["--size", size.name, "--compute"]).stdout)["compute_s"]
    step_s, read, written = (
        statistics.median(job[name][_WARM_UP:])
        for name in ("steps_s", "read_nbytes", "written_nbytes")
    )
    moved = read + written
    disk = DiskLimit(directory, 4 << 30)
    rate = disk.mixed_bytes_per_s(read / moved, 8 << 30)
    disk.close()
    return {
        "limit_nbytes": limit_mib * _MIB,
        "cgroup_peak_nbytes": done.peak_nbytes,
        "resident_peak_nbytes": job["peak_nbytes"],
        "plain_nbytes": plain[1],
        "plain": plain[0],
        "step_s": step_s,
        "steps_s": quantiles(job["steps_s"][_WARM_UP:]),
        "optimizer_s": job["stats"]["optimizer_s"],
        "moved_nbytes": moved,
        "disk_bytes_per_s": rate,
        "disk_s": moved / rate,
        "resident_compute_s": compute_s,
        "efficiency": max(compute_s, moved / rate) / step_s,
    }


def _bound(row: dict[str, Any], again: Finished) -> dict[str, Any]:
    """What the run of ``row`` could not go below; ``again`` is the same without busy waiting."""
    if again.returncode:
        return {}
    job = json.loads(again.stdout)
    work_s = processors_s(job["processor_s"][_WARM_UP:])
    return {
        "processors_s": work_s,
        "bound_s": max(row["resident_compute_s"], row["disk_s"], work_s),
        "halves_s": sum(_halves_s(job, row["disk_bytes_per_s"])),
        "passive_step_s": statistics.median(job["steps_s"][_WARM_UP:]),
    }


def _halves_s(job: dict[str, Any], disk_bytes_per_s: float) -> tuple[float, float]:
    """The longer of processors' work and bytes' way: in forward, and in the rest of the step."""
    forward = job["forward"]

    def longer_s(of: Callable[[str], list[float]]) -> float:
        moved = map(sum, zip(of("read_nbytes"), of("written_nbytes"), strict=True))
        return max(processors_s(of("processor_s")), statistics.median(moved) / disk_bytes_per_s)

    def rest(name: str) -> list[float]:
        pairs = zip(job[name], forward[name], strict=True)
        return [whole - part for whole, part in pairs][_WARM_UP:]

    return longer_s(lambda name: forward[name][_WARM_UP:]), longer_s(rest)


def _run(
    size: Size, limit_mib: int, commit: str, directory: Path, step: str, **environment: str
) -> Finished:
    store = directory / "fit"
    shutil.rmtree(store, ignore_errors=True)
    budget = f"host={(limit_mib * _MIB - _KERNEL_NBYTES) // _MIB}MiB"
    try:
        with MemoryCgroup("offload-fit", limit_mib * _MIB) as group:
            command = [*_command(size, budget, store), "--commit", commit]
            return group.run([*command, *_FLAGS[step]], env={**os.environ, **environment})
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _command(
    size: Size, budget: str | None, store: Path, steps: int = _WARM_UP + _MEASURED
) -> list[str]:
    command = [sys.executable, str(_JOB), "--size", size.name, "--steps", str(steps)]
    return command if budget is None else [*command, "--budget", budget, "--nvme", str(store)]


def _child(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(_JOB), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _plain_need(size: Size) -> tuple[str, int]:
    computed = size.parameters * _PLAIN_STATE_NBYTES
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if computed + (2 << 30) > memory:
        return "computed", computed
    done = _child(["--size", size.name, "--steps", "2"])
    return "measured", int(json.loads(done.stdout)["peak_nbytes"])


def _why(done: Finished) -> str:
    if done.killed:
        return "killed by the kernel"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
