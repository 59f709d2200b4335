"""These tests change and fill memory nodes: they run in the virtual machine only."""

from pathlib import Path

IN_GUEST = "offload_numa_vm" in Path("/proc/cmdline").read_text().split()
collect_ignore_glob = [] if IN_GUEST else ["test_*"]
