"""Placements that are refused, and what the checker sees."""

import dataclasses
import re

import pytest
from placing_cases import (
    GIB,
    MIB,
    block,
    placed,
    small_machine,
    small_network,
    small_work,
    steppers,
)

from offload.allocator.bilevel import plan_memory
from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.extent import Extent
from offload.swap.planning.placing.check import check
from offload.swap.planning.placing.choices import REBUILD, Rules
from offload.swap.planning.placing.network import make_network
from offload.swap.planning.placing.placement import Share
from offload.swap.planning.placing.schedule import schedule_of
from offload.swap.planning.placing.solve import least_budget, place
from offload.swap.planning.placing.work import Work


def test_an_impossible_budget_names_the_tier_and_the_smallest_change():
    work, network = small_work(), small_network(device_0=GIB)
    with pytest.raises(BudgetError, match=r"device:0 has 1\.00 GiB") as refused:
        place([work], network)
    assert "backward of stage" in str(refused.value)
    mib = int(re.findall(r"The smallest change that fits: device=(\d+)MiB", str(refused.value))[0])
    assert refused.value.needed_nbytes == mib * MIB
    placed(work, network.with_budget("device:0", mib * MIB))
    with pytest.raises(BudgetError):
        place([work], network.with_budget("device:0", (mib - 1) * MIB))


def test_the_smallest_of_several_changes_is_named_first():
    work = small_work()
    network = small_network(host=20 * GIB, file_a=0, device_0=6 * GIB)
    with pytest.raises(BudgetError) as refused:
        place([work], network)
    named = {
        name.replace("device", "device:0"): mib
        for name, mib in re.findall(r"([a-z]+:?\w*)=(\d+)MiB", str(refused.value))
    }
    assert len(named) >= 2
    for tier_name, mib in named.items():
        placed(work, network.with_budget(tier_name, int(mib) * MIB))
    first, *others = [
        int(mib) * MIB - network.budgets[tier_name] for tier_name, mib in named.items()
    ]
    assert all(first <= other for other in others)


def test_where_no_tier_alone_would_do_that_is_told():
    kind = block(saved=(), forward_workspace_nbytes=4 * GIB)
    work = Work(kinds=(kind,), order=(0, 0), fixed_nbytes={"host": 4 * GIB})
    network = small_network(device_0=2 * GIB, host=2 * GIB)
    with pytest.raises(BudgetError, match="no tier alone would mend it"):
        place([work], network)
    assert least_budget([work], network, "host") is None


def test_missing_links_and_tiers_are_told_at_once():
    machine = small_machine(*(one for one in small_machine().links if one.target != "file:a"))
    budgets = {"device:0": GIB, "file:a": GIB, "file:z": GIB}
    with pytest.raises(ConfigError) as refused:
        make_network(machine, budgets, compute="device:0", steppers=steppers())
    text = str(refused.value)
    assert "a budget of host" in text
    assert "the link host → file:a was not measured" in text
    assert "no tier 'file:z'" in text


def test_rules_that_leave_no_place_are_refused():
    with pytest.raises(ConfigError, match="leave no place for its states"):
        place([small_work()], small_network(), Rules(homes={"states": ()}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ()}, "needs blocks"),
        ({"order": (0, 1)}, "of a kind that is given"),
        ({"passes": 0}, "0 passes"),
        ({"kinds": (block(trained_nbytes=-1),)}, "below zero"),
        ({"kinds": (block(forward_s=-1.0),)}, "below zero"),
    ],
)
def test_work_that_is_none_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small_work(), **changes)


# What the checker sees.


def _with(found, role, *shares, part=None):
    classes = tuple(
        dataclasses.replace(one, shares=shares) if (one.role, one.part) == (role, part) else one
        for one in found.classes
    )
    return dataclasses.replace(found, classes=classes)


def test_the_checker_finds_what_is_wrong():
    work, network = small_work(), small_network(device_0=8 * GIB)
    found = place([work], network)
    check(found, work, network)
    forward, *others = found.phases
    steppers = {share.stepper for share in found.of(0, "weights")}
    other = "device" if "cpu" in steppers else "cpu"
    wrong = {
        "each byte goes to one place": _with(
            found, "weights", Share(where="host", fraction=0.5, stepper="cpu")
        ),
        "device:0 holds": _with(found, "saved", Share(where="device:0", fraction=1.0), part="rows"),
        "is no place for it": _with(
            found, "weights", Share(where=REBUILD, fraction=1.0, stepper="cpu")
        ),
        "would step": _with(found, "states", Share(where="host", fraction=1.0, stepper=other)),
        "nobody of that name": _with(
            found, "gradients", Share(where="host", fraction=1.0, stepper="clerk")
        ),
        "classes are": dataclasses.replace(found, classes=found.classes[1:]),
        "forward takes": dataclasses.replace(
            found, phases=(dataclasses.replace(forward, seconds=0.9 * forward.seconds), *others)
        ),
        "are exposed": dataclasses.replace(found, exposed_s=found.exposed_s + 1),
    }
    for message, placement in wrong.items():
        with pytest.raises(ValueError, match=message):
            check(placement, work, network)


def test_addresses_are_checked_where_there_are_some():
    work, network = small_work(6), small_network(device_0=6 * GIB)
    found = place([work], network)
    lifetimes = schedule_of(found, work, network).lifetimes("device:0")
    packing = plan_memory(lifetimes).packing
    check(found, work, network, packings={"device:0": packing})
    first = lifetimes[0]
    other = next(one for one in lifetimes[1:] if one.meets(first))
    at = packing.extents[first.key].offset
    extents = {**packing.extents, other.key: Extent(at, other.nbytes)}
    broken = dataclasses.replace(packing, extents=extents, peak_nbytes=packing.peak_nbytes * 9)
    with pytest.raises(ValueError, match="overlap while both are alive"):
        check(found, work, network, packings={"device:0": broken})


def test_every_use_has_its_fetch():
    work, network = small_work(), small_network(device_0=3 * GIB)
    schedule = schedule_of(place([work], network), work, network)
    fetched = {move.key for move in schedule.moves if move.target == "device:0"}
    visiting = {one.key for one in schedule.holdings if one.source not in {one.tier, "made"}}
    assert fetched
    assert {one.key for one in schedule.uses} & visiting <= fetched
