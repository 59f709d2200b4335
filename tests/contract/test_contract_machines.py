"""Random use of each tier, engine and wrapper against a dictionary: 10,000 steps on each."""

import pytest
import test_contract_device
import test_contract_engines
import test_contract_tiers

from offload.tiers.testing import TierContract, machine_of

CONTRACTS = {
    name.removeprefix("Test"): contract
    for module in (test_contract_device, test_contract_engines, test_contract_tiers)
    for name, contract in vars(module).items()
    if name.startswith("Test") and issubclass(contract, TierContract)
}

for name, contract in CONTRACTS.items():
    for title, steps, marks in (("Few", 300, []), ("Many", 10_000, [pytest.mark.slow])):
        case = machine_of(contract, steps=steps)
        case.pytestmark = [*getattr(contract, "pytestmark", []), *marks]
        globals()[f"Test{name}{title}Steps"] = case

del case


def test_every_engine_and_wrapper_is_driven():
    names = {name for name in CONTRACTS if name.endswith("Tier")}
    assert names >= {f"{name}Tier" for name in ("Ram", "File", "Aiofiles", "Throttled", "Faulty")}
    assert names >= {f"{name}Tier" for name in ("Numa", "Striped", "Pinned", "Locked")}
    assert {name for name in CONTRACTS if name.startswith("Device")}
    assert names >= {f"{name}Tier" for name in ("Recording", "Composed", "Deepspeed", "Kvikio")}
