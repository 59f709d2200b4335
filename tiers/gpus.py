"""NVIDIA GPUs as ``nvidia-smi`` tells of them: no torch, no driver calls of our own."""

from dataclasses import dataclass

from offload.tiers.system import System, read_text

_QUERY = (
    "index,name,driver_version,memory.total,memory.free,compute_cap,"
    "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
)
_COLUMNS = 10
_MIB = 1 << 20
_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the driver serves; PCIe figures are None where it doesn't tell them."""

    index: int
    name: str
    driver: str
    memory_nbytes: int
    free_nbytes: int
    capability: str  # sm_90
    pcie_gen: int | None
    pcie_gen_max: int | None
    pcie_width: int | None
    pcie_width_max: int | None


def read_gpus(system: System) -> tuple[Gpu, ...]:
    """The GPUs that ``nvidia-smi`` lists; empty without a driver."""
    answer = system.run(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"])
    if answer is None or answer.code != 0:
        return ()
    rows = [[word.strip() for word in line.split(",")] for line in answer.text.splitlines()]
    return tuple(_gpu(row) for row in rows if len(row) == _COLUMNS and row[0].isdigit())


def _gpu(row: list[str]) -> Gpu:
    def number(word: str) -> int | None:
        return int(word) if word.isdigit() else None  # "[N/A]" on some boards

    return Gpu(
        index=int(row[0]),
        name=row[1],
        driver=row[2],
        memory_nbytes=(number(row[3]) or 0) * _MIB,
        free_nbytes=(number(row[4]) or 0) * _MIB,
        capability="sm_" + row[5].replace(".", ""),
        pcie_gen=number(row[6]),
        pcie_gen_max=number(row[7]),
        pcie_width=number(row[8]),
        pcie_width_max=number(row[9]),
    )


def count_nvidia_cards(system: System) -> int:
    """NVIDIA display and compute cards on the PCI bus, with or without a driver."""
    devices = system.sys / "bus" / "pci" / "devices"
    if not devices.is_dir():
        return 0
    return sum(
        read_text(device / "vendor") == _NVIDIA
        and (read_text(device / "class") or "").startswith(_DISPLAY_CLASSES)
        for device in devices.iterdir()
    )
