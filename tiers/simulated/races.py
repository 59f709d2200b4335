"""Looking for races: one scenario under thousands of seeds, each compared with the order of calls.

    def scenario(device):           # any Accelerator
        tier = DeviceTier(device, 4096)
        ...
        return tensor_or_bytes      # what came out; the same bits under every seed if all is well

    assert_no_race(scenario)

The reference is the CPU as the device, on which each call is over when it returns. See
``timeline`` [Note: virtual time] for what a seed may reorder. A race is reported with its seed:
``SimulatedAccelerator(seed)`` repeats it exactly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from offload.tiers.accelerator import Accelerator
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.simulated.accelerator import SimulatedAccelerator

if TYPE_CHECKING:
    import torch

Outcome: TypeAlias = "torch.Tensor | bytes | list[torch.Tensor] | list[bytes]"
Scenario: TypeAlias = Callable[[Accelerator], Outcome]
DEFAULT_SEEDS = range(2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """The first seed under which a scenario came out differently.

    Attributes:
        seed: repeats it.
        what: how the outcome differs.
        log: the operations that ended last, in their order, where the device keeps a log.
    """

    seed: int
    what: str
    log: tuple[str, ...]

    def __str__(self) -> str:
        steps = "".join(f"\n  {line}" for line in self.log)
        return f"race under seed {self.seed}: {self.what}{steps}"


def find_race(
    scenario: Scenario,
    *,
    seeds: Iterable[int] = DEFAULT_SEEDS,
    open_device: Callable[[int], Accelerator] = SimulatedAccelerator,
    open_reference: Callable[[], Accelerator] = CpuAccelerator,
) -> Race | None:
    """The first of ``seeds`` under which ``scenario`` differs from the reference, bit by bit.

    Args:
        scenario: is given a fresh device each time; an error that it raises under a seed and
            not on the reference is a difference too.
        open_device: makes the device of a seed.
        open_reference: makes the device whose outcome is right.

    Raises:
        BaseException: what the scenario raises on the reference.
    """
    right = _outcome(scenario, open_reference())
    for seed in seeds:
        device = open_device(seed)
        try:
            difference = _difference(_outcome(scenario, device), right)
        except Exception as error:  # noqa: BLE001  reported
            difference = f"raised {type(error).__name__}: {error}"
        if difference:
            timeline = getattr(device, "timeline", None)
            log = tuple(timeline.log) if timeline is not None else ()
            return Race(seed=seed, what=difference, log=log)
    return None


def assert_no_race(scenario: Scenario, *, seeds: Iterable[int] = DEFAULT_SEEDS) -> None:
    """Run ``scenario`` on the simulated device under each of ``seeds``.

    Raises:
        AssertionError: telling the first race.
    """
    race = find_race(scenario, seeds=seeds)
    if race is not None:
        raise AssertionError(str(race))


def _outcome(scenario: Scenario, device: Accelerator) -> list[bytes]:
    with device:  # whose end raises what failed in work that nobody waited for
        return _bits(scenario(device))


def _bits(outcome: Outcome) -> list[bytes]:
    import torch

    parts = outcome if isinstance(outcome, list) else [outcome]
    return [
        part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(part, torch.Tensor)
        else bytes(part)
        for part in parts
    ]


def _difference(got: list[bytes], right: list[bytes]) -> str | None:
    for index, (one, other) in enumerate(zip(got, right, strict=True)):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            at = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
            return (
                f"part {index} of the outcome differs from byte {at} on: {one[at : at + 8].hex()} "
                f"instead of {other[at : at + 8].hex()}"
            )
    return None
