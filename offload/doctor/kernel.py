"""The kernel, and how it is set to treat memory."""

import re

from offload.allocator.units import format_nbytes
from offload.doctor.finding import Finding
from offload.tiers.system import System, kernel_version, read_kernel, read_memory
from offload.tiers.topology import read_topology

_THP = "kernel/mm/transparent_hugepage"

# (since version, name, what is lost without it)
_FEATURES = (
    ((5, 14), "MADV_POPULATE", "reads of mapped tensors fault in page by page"),
    ((6, 7), "PAGEMAP_SCAN", "each release of a tensor reads one entry for each of its pages"),
    ((6, 9), "weighted interleave", "memory is striped over nodes evenly, whatever their speed"),
)


def examine_kernel(system: System) -> tuple[Finding, ...]:
    """Version and memory settings."""
    return (
        version(system),
        huge_pages(system),
        huge_page_defrag(system),
        overcommit(system),
        swap(system),
    )


def version(system: System) -> Finding:
    """The release, and what it has of the calls that Offload uses where it can."""
    release = read_kernel(system)
    several_nodes = len(read_topology(system.sys).nodes) > 1
    have, lost, needed = [], [], None
    for since, name, loss in _FEATURES:
        if kernel_version(release) >= since:
            have.append(name)
        elif name != "weighted interleave" or several_nodes:
            lost.append(f"no {name}: {loss}")
            needed = since
    return Finding(
        subject="kernel",
        value=f"Linux {release}",
        status="warn" if lost else "ok",
        detail="; ".join(lost) if lost else f"has {', '.join(have)}",
        mend=f"upgrade to Linux {needed[0]}.{needed[1]} or newer" if needed else "",
    )


def _chosen(text: str | None) -> str | None:
    """``madvise`` of ``always [madvise] never``."""
    match = re.search(r"\[(\S+)\]", text or "")
    return match[1] if match else None


def huge_pages(system: System) -> Finding:
    """Transparent huge pages: direct I/O to 4 KiB pages costs several times the CPU time."""
    chosen = _chosen(system.sys_text(f"{_THP}/enabled"))
    if chosen in {"always", "madvise"}:
        return Finding(subject="huge pages", value=chosen, detail="buffers of I/O get them")
    return Finding(
        subject="huge pages",
        value=chosen or "not supported by this kernel",
        status="warn",
        detail="direct I/O pins 512 times as many pages: more CPU time, and less bandwidth",
        mend=f"echo madvise | sudo tee /sys/{_THP}/enabled" if chosen else "",
    )


def huge_page_defrag(system: System) -> Finding:
    """Whether the kernel makes huge pages when they are asked for."""
    chosen = _chosen(system.sys_text(f"{_THP}/defrag"))
    if chosen in {"never", "defer"}:
        return Finding(
            subject="huge page defrag",
            value=chosen,
            status="warn",
            detail="buffers get huge pages only while free memory happens to be in one piece",
            mend=f"echo madvise | sudo tee /sys/{_THP}/defrag",
        )
    return Finding(subject="huge page defrag", value=chosen or "not told")


def overcommit(system: System) -> Finding:
    """Offload reserves addresses that it fills only in part, which mode 2 counts in full."""
    mode = system.proc_text("sys/vm/overcommit_memory")
    names = {"0": "heuristic (0)", "1": "always (1)", "2": "never (2)"}
    strict = mode == "2"
    return Finding(
        subject="overcommit",
        value=names.get(mode or "", "not told"),
        status="warn" if strict else "ok",
        detail=(
            "addresses that are reserved and not yet used count as memory: mapping may fail"
            if strict
            else ""
        ),
        mend="sudo sysctl vm.overcommit_memory=0" if strict else "",
    )


def swap(system: System) -> Finding:
    """The kernel's own swap, which Offload doesn't need."""
    memory = read_memory(system)
    if memory is None or memory.swap_nbytes == 0:
        return Finding(subject="swap", value="none", detail="not needed")
    used = memory.swap_nbytes - memory.swap_free_nbytes
    pressed = 2 * used > memory.swap_nbytes
    return Finding(
        subject="swap",
        value=f"{format_nbytes(memory.swap_nbytes)}, {format_nbytes(used)} used",
        status="warn" if pressed else "ok",
        detail="other programs were pushed out of memory: leave them more room" if pressed else "",
        mend="ps aux --sort -rss | head" if pressed else "",
    )
