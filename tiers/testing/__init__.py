"""The contracts of ``Tier`` and ``FileEngine`` as tests: subclass one, and pytest does the rest.

    class TestMyTier(TierContract):
        @contextmanager
        def open_tier(self, directory): ...
        def peek(self, tier, block, offset, nbytes): ...
        def poke(self, tier, block, offset, data): ...

    TestMyTierMachine = machine_of(TestMyTier)

    class TestMyEngine(EngineContract):
        def open_engine(self, file): ...

``peek`` and ``poke`` reach the bytes around the tier's own methods, so that a fault in ``write``
can't be hidden by the same fault in ``read``. ``machine_of`` drives the backend at random against
a dictionary of bytes.

``assert_no_race`` and ``find_race`` run code that moves bytes to and from a device under thousands
of orders of its transfers (``simulated.races``).
"""

from offload.tiers.simulated.races import Race, assert_no_race, find_race
from offload.tiers.testing.engine import EngineContract
from offload.tiers.testing.machine import TierMachine, machine_of
from offload.tiers.testing.memory import Memory, get, pattern, put
from offload.tiers.testing.tier import TierContract

__all__ = [
    "EngineContract",
    "Memory",
    "Race",
    "TierContract",
    "TierMachine",
    "assert_no_race",
    "find_race",
    "get",
    "machine_of",
    "pattern",
    "put",
]
