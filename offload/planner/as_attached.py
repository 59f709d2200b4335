"""A placement as ``attach`` runs it on a GPU, and which setting of its step is the fastest one.

``attach`` keeps gradients and states below the device, and has tiles of the step put together in
host memory whoever steps them; states that are rounded or have masters stay in the store. It gives
the device the same share of all parameters (``swap.tile_share``), and rebuilds nothing by default.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_seconds
from offload.swap.planning.placing.choices import Rules
from offload.swap.planning.placing.network import Network
from offload.swap.planning.placing.placement import Placement
from offload.swap.planning.placing.solve import place
from offload.swap.planning.placing.work import STEPPED, Work
from offload.swap.tile_share import parse_share

WORTH = 0.97  # a change that saves less is none
_HOST, _DEVICE = "cpu", "device"  # the steppers, by name
Value: TypeAlias = Literal["host", "device"] | float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSetting:
    """What ``optimizer_device`` should be.

    Attributes:
        value: ``host``, ``device``, or the device's share of the tiles.
        step_s: of a step with it.
        host_s: of a step that the host steps alone, as it does by default; ``device_s`` likewise.
    """

    value: Value
    step_s: float
    host_s: float
    device_s: float

    @property
    def told(self) -> str:
        """In words, with what it is held against."""
        alone = f"the host alone {format_seconds(self.host_s)}"
        if self.value == "host":
            alone = f"the GPU alone {format_seconds(self.device_s)}"
        return (
            f"--optimizer-device {self.value}: attach takes {format_seconds(self.step_s)} a step, "
            f"{alone}"
        )


def choose_setting(works: Sequence[Work], network: Network) -> StepSetting | None:
    """The fastest of these; the host alone, then the device alone, where it is hardly slower.

    Args:
        works: of a step; only the whole batch is what ``attach`` runs.

    Returns:
        None where nothing is stepped, or where it does not fit.
    """
    whole = [work for work in works if work.passes == 1]
    best_of_all = _placed(whole, network)
    if best_of_all is None or (share := _share(best_of_all)) is None:
        return None
    fraction = parse_share(share)
    seconds = {
        round(float(each), 4): _step_s(whole, network, float(each))  # enough digits to name it
        for each in dict.fromkeys((Fraction(0), Fraction(1), fraction))
    }
    best = 0.0
    for value, step_s in seconds.items():
        if step_s < WORTH * seconds[best]:
            best = value
    names: dict[float, Value] = {0.0: "host", 1.0: "device"}
    return StepSetting(
        value=names.get(best, best),
        step_s=seconds[best],
        host_s=seconds[0.0],
        device_s=seconds[1.0],
    )


def _step_s(works: Sequence[Work], network: Network, share: float) -> float:
    placement = _placed(works, network, share)
    return math.inf if placement is None else placement.step_s


def _placed(
    works: Sequence[Work], network: Network, share: float | None = None
) -> Placement | None:
    """What ``attach`` does; the device steps ``share`` of the tiles, or whatever is best."""
    below = tuple(tier for tier in network.budgets if tier != network.compute)
    rules = Rules(
        rebuild=False,
        homes={"gradients": below, "states": below},
        recoded_homes=_stores(works),
        even=True,
        shares={} if share is None else {_HOST: 1 - share, _DEVICE: share},
        staged=True,
    )
    try:
        return place(works, network, rules)
    except BudgetError:
        return None


def _stores(works: Sequence[Work]) -> tuple[str, ...] | None:
    """Where states are that are always stepped by tile; None: nothing has a store."""
    stores = [work.store for work in works if work.store is not None]
    return tuple(dict.fromkeys(stores)) or None


def _share(placement: Placement) -> float | None:
    """That the device steps, which is the same of all; None if nothing is stepped."""
    for one in placement.classes:
        if one.role in STEPPED:
            fractions = (share.fraction for share in one.shares if share.stepper == _DEVICE)
            return min(sum(fractions), 1.0)
    return None
