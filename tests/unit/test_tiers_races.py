"""The race detector finds every planted race, and does not cry wolf."""

from functools import partial

import pytest
import torch

from offload.tiers import device as device_module
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.pinned import PinnedTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.scenarios import RACY, RIGHT
from offload.tiers.testing import assert_no_race, find_race


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_is_right_under_every_seed(name):
    assert_no_race(partial(RIGHT[name], pinners=()), seeds=range(500))


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_code_is_right_under_very_many_seeds(name):
    assert_no_race(partial(RIGHT[name], pinners=()), seeds=range(500, 5000))


@pytest.mark.parametrize("name", RACY)
def test_a_planted_race_is_found_soon(name):
    race = find_race(partial(RACY[name], pinners=()), seeds=range(100))
    assert race is not None
    assert race.what.startswith("part 0 of the outcome differs from byte")
    assert race.log


@pytest.mark.parametrize("name", RACY)
def test_a_planted_race_does_not_show_where_calls_block(name):
    assert find_race(partial(RACY[name], pinners=()), seeds=[0], open_device=_cpu) is None


def _cpu(seed):
    return CpuAccelerator()


def _nothing(*args, **kwargs):
    return []


def _view_without_waits(tier, block, dtype, shape, *, read_only=False):
    edges = tier._edges[block.generation]
    edges.streams = [tier.accelerator.current_stream()]
    return tier._memory.view(block.extent.offset, dtype, shape)


def _copies_only(edges):
    return [*edges.writes, *edges.reads]


def _without_evictions(edges):
    return [*edges.writes, *(stream.record() for stream in edges.streams)]


_tensor = DeviceTier.tensor


def _view_to_read(tier, block, dtype, shape, *, read_only=False):
    return _tensor(tier, block, dtype, shape, read_only=True)


# What DeviceTier and PinnedTier do for an edge, left out: each must matter to right code.
OMISSIONS = {
    "a view waits for the fetch": (DeviceTier, "tensor", _view_without_waits),
    "a view that is written waits for evictions": (DeviceTier, "tensor", _view_to_read),
    "a fetch waits for evictions": (device_module._Edges, "all", _without_evictions),
    "bytes are inherited with their events": (DeviceTier, "_inherited", _nothing),
    "a copy waits for copies of the same host bytes": (DeviceTier, "_host_events", _nothing),
    "a copy waits for kernels": (device_module._Edges, "all", _copies_only),
    "a kernel leaves its event": (DeviceTier, "used", lambda tier, block: tier._edges[
        block.generation
    ].streams.clear()),
    "a buffer waits for its transfers": (PinnedTier, "guard", _nothing),
    "the host waits for a buffer": (PinnedTier, "_before_copy", _nothing),
}  # fmt: skip


@pytest.mark.parametrize("name", OMISSIONS)
def test_each_edge_of_the_tiers_is_needed_and_watched(monkeypatch, name):
    owner, attribute, without = OMISSIONS[name]
    monkeypatch.setattr(owner, attribute, without)
    found = [
        scenario.__name__
        for scenario in RIGHT.values()
        if find_race(partial(scenario, pinners=()), seeds=range(150))
    ]
    assert found, f"no scenario noticed that it was left out that {name}"


def test_the_seed_of_a_race_repeats_it():
    scenario = partial(RACY["missing_wait"], pinners=())
    race = find_race(scenario, seeds=range(100))
    assert find_race(scenario, seeds=[race.seed]) == race
    assert find_race(scenario, seeds=range(race.seed)) is None
    assert str(race).startswith(f"race under seed {race.seed}: part 0")
    with pytest.raises(AssertionError, match=rf"^race under seed {race.seed}: part 0"):
        assert_no_race(scenario)


def test_an_error_under_a_seed_only_is_a_race():
    def scenario(device):
        if isinstance(device, SimulatedAccelerator) and device.timeline.random.random() < 0.5:
            raise ValueError("too late")
        return b"done"

    assert find_race(scenario).what == "raised ValueError: too late"


def test_an_error_of_work_that_nobody_waits_for_is_a_race():
    def scenario(device):
        values = torch.ones(1)

        def check():
            assert values == 1, "too late"

        device.launch(check, stream=device.stream("side"))
        device.launch(values.zero_)
        return b"done"

    assert find_race(scenario).what.startswith("raised AssertionError: too late")


def test_a_scenario_that_is_wrong_anyway_raises():
    def scenario(device):
        raise ValueError(device.name)

    with pytest.raises(ValueError, match="cpu"):
        find_race(scenario)


def test_outcomes_are_compared_bit_by_bit():
    def zero(device, sign):
        minus = isinstance(device, SimulatedAccelerator) and sign
        return [torch.tensor([1.0]), torch.tensor([-0.0 if minus else 0.0])]

    assert find_race(partial(zero, sign=False), seeds=[0]) is None
    race = find_race(partial(zero, sign=True), seeds=[0])
    assert race.what == "part 1 of the outcome differs from byte 3 on: 80 instead of 00"


def test_outcomes_of_other_lengths_differ():
    def scenario(device):
        return b"longer" if isinstance(device, SimulatedAccelerator) else b"long"

    assert "from byte 4 on: 6572 instead of " in find_race(scenario, seeds=[0]).what


def test_the_scenario_of_planned_addresses_has_planned_steps_and_one_that_deviates(monkeypatch):
    told = []
    close = DeviceTier.close

    def tell(tier):
        told.append(tier.planning())
        close(tier)

    monkeypatch.setattr(DeviceTier, "close", tell)
    with SimulatedAccelerator(seed=1) as device:
        RIGHT["planned_addresses"](device, pinners=())
    (planning,) = told
    assert (planning.steps, planning.planned_steps, planning.deviations) == (4, 2, 1)
