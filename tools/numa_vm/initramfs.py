"""A small initramfs: busybox, the modules that the guest needs, and an init that runs one command.

The host's root is mounted read-only by 9p, so the guest runs the host's own Python and checkout.
"""

import lzma
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXIT = "numa_vm: the command ended with"  # and its exit code
# A module that a kernel has built in is missing on disk, and skipped.
MODULES = ("virtio_pci", "9pnet_virtio", "9p")
CXL_MODULES = ("cxl_acpi", "cxl_pci", "cxl_mem", "device_dax", "kmem", "dax_cxl")

_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
for module in {modules}; do $B insmod /modules/$module.ko || echo "insmod $module failed"; done
$B mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /host
for folder in proc sys dev; do $B mount --move /$folder /host/$folder; done
$B mkdir /host/dev/shm
$B mount -t tmpfs tmpfs /host/dev/shm
export {environment}
$B chroot /host /bin/sh -c {command}
echo "{exit} $?"
$B poweroff -f
"""


def build(
    target: Path,
    *,
    modules: Path,
    names: Sequence[str],
    busybox: Path,
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
) -> None:
    """Write the initramfs that runs ``command`` in ``cwd`` and powers the guest off."""
    loaded = _with_dependencies(modules, names)
    inside = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(command)}"
    init = _INIT.format(
        modules=" ".join(loaded),
        environment=" ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
        command=shlex.quote(inside),
        exit=EXIT,
    )
    files = {"init": init.encode(), "bin/busybox": busybox.read_bytes()}
    files |= {f"modules/{name}.ko": data for name, data in loaded.items()}
    with target.open("wb") as file:
        for folder in ("bin", "dev", "host", "modules", "proc", "sys"):
            file.write(_entry(folder, stat.S_IFDIR | 0o755, b""))
        for name, data in files.items():
            file.write(_entry(name, stat.S_IFREG | 0o755, data))
        file.write(_entry("TRAILER!!!", 0, b""))


def _with_dependencies(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Modules by name, each after those that it needs."""
    paths = {_module_name(path): path for path in folder.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in loaded or name not in paths:
            return
        path = paths[name]
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for needed in _dependencies(data):
            add(needed)
        loaded[name] = data

    for name in names:
        add(name)
    return loaded


def _dependencies(module: bytes) -> Iterator[str]:
    """The names in the ``depends=`` entry of a module's ``.modinfo`` section."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    for name in (found[1].decode() if found else "").split(","):
        if name:
            yield name.replace("-", "_")


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """One file of a cpio archive of the kind ``newc`` (Linux's early-userspace)."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
