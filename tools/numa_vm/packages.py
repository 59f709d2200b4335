"""What the virtual machine is made of, from Debian's packages: kernels, busybox, QEMU.

Packages are unpacked under ``build/numa_vm``, not installed; only an emulator that is missing is
installed, for its libraries. The archive is the one that the machine's own apt uses.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "numa_vm"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# The cloud flavour has no 9p client, so it is the ordinary one.
_KERNELS = {
    "6.1": r"linux-image-6\.1\.[0-9.+~-]+-amd64",
    "6.12": r"linux-image-6\.12\.[0-9.]+\+deb12(\.\d+)?-amd64",
}
_QEMU_10 = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


class UnfitMachineError(RuntimeError):
    """This machine can't run the virtual machine, whatever is installed."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    image: Path
    modules: Path


@dataclass(frozen=True)
class Emulator:
    """QEMU and, where it is not installed, its folder of firmware."""

    command: str
    arguments: tuple[str, ...] = ()


def check_machine() -> None:
    """Raise ``UnfitMachineError`` where the virtual machine can't run."""
    if platform.machine() != "x86_64":
        raise UnfitMachineError(f"it emulates x86_64, this machine is {platform.machine()}")
    if shutil.which("apt-get") is None or not _KEYRING.exists():
        raise UnfitMachineError("its kernels are Debian packages, this machine has no Debian apt")
    if shutil.which("qemu-system-x86_64") is None and os.geteuid() != 0:
        raise UnfitMachineError("qemu-system-x86_64 is missing, and only root can install it")


def kernel(version: str) -> Kernel:
    """Debian 12's kernel of that version, 6.1 or 6.12."""
    folder = _unpacked(f"linux-{version}", lambda: [_newest(_KERNELS[version])])
    (image,) = folder.glob("boot/vmlinuz-*")
    (modules,) = folder.glob("lib/modules/*")
    return Kernel(image=image, modules=modules)


def busybox() -> Path:
    """A static busybox."""
    return _unpacked("busybox", lambda: ["busybox-static"]) / "bin" / "busybox"


def emulator() -> Emulator:
    """The machine's QEMU; it is installed if it is missing."""
    if shutil.which("qemu-system-x86_64") is None:
        _run("apt-get", "update")
        _run(
            "apt-get", "install", "--yes", "--no-install-recommends", "qemu-system-x86",
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
    return Emulator("qemu-system-x86_64")


def emulator_with_cxl() -> Emulator:
    """QEMU 10, which emulates volatile CXL memory: the installed one, or Debian's backport.

    Raises:
        UnfitMachineError: the backport does not run on this machine's libraries.
    """
    installed = emulator()
    if _major_version(installed.command) >= 10:
        return installed
    folder = _unpacked("qemu", lambda: [f"{name}/bookworm-backports" for name in _QEMU_10])
    command = str(folder / "usr/bin/qemu-system-x86_64")
    if _major_version(command) < 10:
        raise UnfitMachineError("QEMU 10 is not available: Debian's backport does not run here")
    shares = (folder / "usr/share/qemu", folder / "usr/share/seabios", Path("/usr/share/qemu"))
    return Emulator(command, tuple(part for share in shares for part in ("-L", str(share))))


def _major_version(command: str) -> int:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)", done.stdout)
    return int(found[1]) if found else 0


def _unpacked(name: str, packages: Callable[[], list[str]]) -> Path:
    """The folder ``name`` of the cache; downloaded and unpacked whole, or not at all."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    partial = CACHE / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    downloads = partial / "downloads"
    downloads.mkdir(parents=True)
    _update()
    _run("apt-get", *_options(), "download", *packages(), cwd=downloads)
    for archive in downloads.glob("*.deb"):
        _run("dpkg-deb", "--extract", str(archive), str(partial))
    shutil.rmtree(downloads)
    partial.rename(folder)
    return folder


def _newest(pattern: str) -> str:
    """The newest package whose whole name matches."""
    names = _run("apt-cache", *_options(), "pkgnames", "linux-image-6.").split()
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise RuntimeError(f"Debian 12's archive has no package {pattern}")
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _update() -> None:
    """Fetch the lists of Debian 12 and its backports, apart from the machine's own."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (CACHE / "apt" / folder).mkdir(parents=True, exist_ok=True)
    archive = _archive()
    (CACHE / "apt" / "sources.list").write_text(
        "".join(
            f"deb [signed-by={_KEYRING}] {archive} {suite} main\n"
            for suite in ("bookworm", "bookworm-backports")
        )
    )
    _run("apt-get", *_options(), "update", "-o", "APT::Update::Error-Mode=any")


def _archive() -> str:
    """The address of the Debian archive that this machine's apt uses."""
    lines = _run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)",
        "Created-By: Packages", "Component: main",
    ).splitlines()  # fmt: skip
    for line in lines:
        address, *rest = line.split()
        if rest == ["Debian", "Debian"]:
            return address
    raise RuntimeError("apt knows no Debian archive: run apt-get update, then try again")


def _options() -> list[str]:
    apt = CACHE / "apt"
    settings = {
        "APT::Sandbox::User": "root",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
