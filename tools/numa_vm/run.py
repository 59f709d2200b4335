"""Run the placement tests on a machine with several memory nodes, emulated by QEMU.

    python tools/numa_vm/run.py --kernel 6.12     # two nodes and one of ZONE_MOVABLE memory
    python tools/numa_vm/run.py --kernel 6.1      # the same; no weighted interleave
    python tools/numa_vm/run.py --machine cxl     # an emulated CXL type-3 memory device

Needs no KVM: software emulation. So what is right is tested, and what is fast is not.
Exit codes: 0 all passed, 1 something failed, 3 this machine can't run it.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import initramfs
import packages

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path("tests") / "numa" / "guest"
FAILED, UNFIT = 1, 3
# Tests look for this word in /proc/cmdline.
MARK = "offload_numa_vm"
WRITABLE = "/dev/shm"  # noqa: S108  (the guest's own; the host's root is read-only there)


@dataclass(frozen=True)
class Machine:
    """What QEMU emulates, which modules it needs, and which tests run on it."""

    arguments: str
    tests: tuple[str, ...]
    modules: tuple[str, ...] = initramfs.MODULES
    cpu: str = "Nehalem"  # the oldest that numpy runs on: fewer instructions to emulate


_HMAT = "-numa hmat-lb,initiator=0,hierarchy=memory"
MACHINES = {
    # Node 0: DRAM. Node 1: no CPUs, a quarter of the bandwidth. Node 2: small, ZONE_MOVABLE.
    "numa": Machine(
        "-machine q35,hmat=on -m 1536M,slots=2,maxmem=4G "
        "-object memory-backend-ram,id=m0,size=1G -object memory-backend-ram,id=m1,size=512M "
        "-object memory-backend-ram,id=m2,size=128M -device pc-dimm,memdev=m2,node=2 "
        "-numa node,nodeid=0,cpus=0-1,memdev=m0 -numa node,nodeid=1,memdev=m1,initiator=0 "
        "-numa node,nodeid=2,initiator=0 "
        "-numa dist,src=0,dst=1,val=20 -numa dist,src=0,dst=2,val=30 -numa dist,src=1,dst=2,val=40 "
        f"{_HMAT},target=0,data-type=access-latency,latency=100 "
        f"{_HMAT},target=0,data-type=access-bandwidth,bandwidth=200G "
        f"{_HMAT},target=1,data-type=access-latency,latency=250 "
        f"{_HMAT},target=1,data-type=access-bandwidth,bandwidth=50G",
        tests=("test_guest_placement.py", "test_guest_tier.py"),
    ),
    # The region can be committed only where the guest sees no hypervisor.
    "cxl": Machine(
        "-machine q35,cxl=on,cxl-fmw.0.targets.0=cxl.1,cxl-fmw.0.size=4G -m 1G,maxmem=8G,slots=8 "
        "-object memory-backend-ram,id=vmem0,share=on,size=256M "
        "-device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1 "
        "-device cxl-rp,port=0,bus=cxl.1,id=root_port13,chassis=0,slot=2 "
        "-device cxl-type3,bus=root_port13,volatile-memdev=vmem0,id=cxl-vmem0,sn=0x1",
        tests=("test_guest_cxl.py",),
        modules=initramfs.MODULES + initramfs.CXL_MODULES,
        cpu="max,la57=off,-hypervisor",
    ),
}


def main() -> int:
    """Boot, print what the guest prints, return its verdict."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=("6.12", "6.1"), default="6.12")
    parser.add_argument("--machine", choices=tuple(MACHINES), default="numa")
    parser.add_argument("--limit-s", type=float, default=280.0, help="end the guest after that")
    arguments, pytest_arguments = parser.parse_known_args()
    try:
        packages.check_machine()
        cxl = arguments.machine == "cxl"
        qemu = packages.emulator_with_cxl() if cxl else packages.emulator()
    except packages.UnfitMachineError as error:
        print(f"no virtual machine with memory nodes: {error}", file=sys.stderr)
        return UNFIT
    machine, kernel = MACHINES[arguments.machine], packages.kernel(arguments.kernel)
    with tempfile.TemporaryDirectory(prefix="numa_vm-") as folder:
        image = Path(folder) / "initramfs"
        initramfs.build(
            image,
            modules=kernel.modules,
            names=machine.modules,
            busybox=packages.busybox(),
            command=_guest_command(machine, pytest_arguments),
            cwd=ROOT,
            environment={
                "HOME": WRITABLE,
                "TMPDIR": WRITABLE,
                "PATH": "/usr/bin:/bin",
                "PYTHONDONTWRITEBYTECODE": "1",
                "NUMA_VM_KERNEL": arguments.kernel,
            },
        )
        return _watch(_qemu_command(qemu, machine, kernel.image, image), arguments.limit_s)


def _guest_command(machine: Machine, pytest_arguments: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-m", "numa_vm", f"--confcutdir={GUEST}", "-v",
        "--color=no", "-p", "no:cacheprovider", "-p", "no:hypothesispytest",
        f"--basetemp={WRITABLE}/pytest", *pytest_arguments,
        *(str(GUEST / name) for name in machine.tests),
    ]  # fmt: skip


def _qemu_command(
    qemu: packages.Emulator, machine: Machine, kernel: Path, image: Path
) -> list[str]:
    boot = (
        "console=ttyS0 quiet panic=-1 mitigations=off transparent_hugepage=madvise "
        f"memhp_default_state=online_movable {MARK}"
    )
    return [
        qemu.command, *qemu.arguments, *machine.arguments.split(),
        "-accel", "tcg,thread=multi", "-cpu", machine.cpu, "-smp", "2",
        "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,bus=pcie.0,fsdev=host,mount_tag=host",
        "-kernel", str(kernel), "-initrd", str(image), "-append", boot,
    ]  # fmt: skip


def _watch(command: list[str], limit_s: float) -> int:
    """Print the guest's console as it comes; the exit code of its command."""
    began = time.monotonic()
    code = FAILED
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as guest:
        signal.signal(signal.SIGALRM, lambda *_: guest.kill())
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        assert guest.stdout is not None
        for line in guest.stdout:
            print(line.rstrip(), flush=True)
            if initramfs.EXIT in line:
                code = int(line.split()[-1])
        signal.setitimer(signal.ITIMER_REAL, 0)
    took_s = time.monotonic() - began
    print(f"the guest ended after {took_s:.0f} s (limit {limit_s:.0f} s)", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
