"""What ``attach`` makes of a placement, and which setting of its step is the fastest."""

import dataclasses
import math

import pytest
from placing_cases import GIB, MIB, block, small_network, small_work

from offload.planner.as_attached import choose_setting
from offload.swap.planning.placing.network import COMPUTE, CPU
from offload.swap.planning.placing.work import Recoded
from offload.swap.tile_share import StepRates, best_share, parse_share

# Of a block: what the host reads and writes of its memory, what goes to the device, and back.
TOUCHED, INTO, BACK = (2 * 2000 + 400) * MIB, 2400 * MIB, 2000 * MIB


def work(**changes):
    """Blocks that save nothing, and whose fetches hide behind what they compute."""
    return small_work(4, kinds=(block(saved=()),), **changes)


def setting(network, **changes):
    return choose_setting([work(**changes)], network)


def test_both_step_where_that_is_fastest_each_as_much_as_it_can():
    network = small_network()
    found = setting(network)
    rates = StepRates(host_s=TOUCHED / 50e9, device_s=INTO / 25e9)  # the way there is the slowest
    share = best_share(rates)
    assert found.value == pytest.approx(float(share), abs=1e-4)
    assert parse_share(found.value) == share  # as a run reads it
    assert found.step_s < 0.97 * min(found.host_s, found.device_s)
    saved_s = found.host_s - found.step_s
    modelled_s = 4 * (rates.host_s - rates.step_s(share))  # with no weight on the device already
    assert 0.85 * modelled_s < saved_s < modelled_s * (1 + 1e-6)


def test_one_alone_steps_where_the_other_would_save_nothing():
    network = small_network()
    slow_bus = network.faster("host → device:0", 0.01)
    assert setting(slow_bus).value == "host"
    slow_host = network.faster(CPU, 0.02).faster("host → device:0", 4).faster("device:0 → host", 4)
    found = setting(slow_host)
    assert found.value == "device"
    assert found.step_s == found.device_s < found.host_s


def test_the_host_steps_where_the_drive_is_slower_than_either():
    network = small_network(host=8 * GIB).faster("host → file:a", 0.01)
    found = setting(network, store="file:a", slots=2, commits=True)
    assert found.value == "host"
    assert found.step_s == found.host_s == pytest.approx(found.device_s, rel=0.03)


def test_recoded_states_come_from_the_store_however_large_memory_is():
    recoded = Recoded(
        weights_nbytes=400 * MIB, gradients_nbytes=400 * MIB, states_nbytes=1600 * MIB, seconds=0.0
    )
    rounded = block(saved=(), states_nbytes=800 * MIB, recoded=recoded)
    network = small_network(host=64 * GIB).faster(CPU, 1000).faster(COMPUTE, 1000)
    store = {"store": "file:a", "slots": 1}
    exact = setting(network, **store)
    found = choose_setting([small_work(4, kinds=(rounded,), **store)], network)
    assert found.host_s - exact.host_s >= 4 * 800 * MIB / 6e9 - 0.1


def test_nothing_is_set_where_nothing_fits_or_nothing_is_stepped():
    assert setting(small_network(host=GIB, file_a=GIB)) is None
    frozen = block(
        trained_nbytes=0, gradients_nbytes=0, states_nbytes=0, saved=(), frozen_nbytes=MIB
    )
    assert choose_setting([small_work(4, kinds=(frozen,))], small_network()) is None
    micro = [dataclasses.replace(work(), passes=2)]
    whole = choose_setting([work(), *micro], small_network())
    assert math.isfinite(whole.step_s)
    assert whole == setting(small_network())  # attach computes the whole batch at once
