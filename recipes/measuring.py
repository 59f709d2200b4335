"""What a recipe measures of itself."""

import contextlib
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import nn

if TYPE_CHECKING:  # plain PyTorch is measured without loading the engine
    from offload.steplog import Stats

HASH_NBYTES = 4 << 20


def weights_xxh3(model: nn.Module) -> str:
    """Checksum over names and bytes of all weights, read a few MiB at a time."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        content = parameter.detach().contiguous().view(-1).view(torch.uint8)
        for piece in content.split(HASH_NBYTES):
            digest.update(piece.numpy())
    return digest.hexdigest()


def peak_resident_nbytes() -> int:
    """The kernel's peak resident set of this process so far, in bytes."""
    peaks_kib = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    with contextlib.suppress(OSError):  # only Linux has it
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        peaks_kib += [int(line.split()[1]) for line in status.splitlines() if "VmHWM:" in line]
    return max(peaks_kib) * 1024


def offload_figures(stats: "Stats") -> dict[str, Any]:
    """Seconds and bytes of a step (medians so far), as Offload recorded them."""
    return {
        "step_s": stats.step_s,
        "compute_s": stats.compute_s,
        "stall_s": stats.stall_s,
        "optimizer_s": stats.optimizer_s,
        "read_bytes_per_step": stats.read_bytes_per_step,
        "written_bytes_per_step": stats.written_bytes_per_step,
        "budget_bytes": stats.budget_nbytes,
    }


def plain_figures(timings: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The same of plain PyTorch, from (step, optimizer) seconds that the loop took itself."""
    step_s, optimizer_s = (statistics.median(column) for column in zip(*timings, strict=True))
    return {
        "step_s": step_s,
        "compute_s": step_s - optimizer_s,
        "stall_s": 0.0,
        "optimizer_s": optimizer_s,
        "read_bytes_per_step": 0,
        "written_bytes_per_step": 0,
        "budget_bytes": None,
    }
