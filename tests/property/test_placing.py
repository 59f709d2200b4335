"""Placements: what they decide."""

import dataclasses
import json

import pytest
from placing_cases import (
    GIB,
    MIB,
    block,
    fraction,
    link,
    placed,
    small_machine,
    small_network,
    small_work,
    steppers,
    tier,
)

from offload.allocator.errors import BudgetError
from offload.swap.planning.placing.check import check
from offload.swap.planning.placing.choices import REBUILD, Rules
from offload.swap.planning.placing.network import COMPUTE, make_network
from offload.swap.planning.placing.solve import place
from offload.swap.planning.placing.work import Recoded, SavedPart, Work


def test_what_fits_on_the_device_stays_there():
    found = placed(rules=Rules(steppers=("device",)), device_0=64 * GIB)
    for role in ("weights", "gradients", "states"):
        assert fraction(found, role, "device:0") == pytest.approx(1)
    assert fraction(found, "saved", "device:0", "rows") == pytest.approx(1)
    assert found.bound_by == COMPUTE
    assert found.exposed_s == 0


def test_what_does_not_goes_where_it_costs_least():
    roomy, tight = placed(device_0=16 * GIB), placed(device_0=4 * GIB)
    assert tight.step_s > roomy.step_s
    assert fraction(tight, "states", "device:0") < 0.1
    assert fraction(tight, "weights", "device:0") < fraction(roomy, "weights", "device:0")


def test_a_step_is_as_long_as_its_phases_and_what_nothing_hides():
    work = Work(kinds=(block(saved=(), states_nbytes=0, gradients_nbytes=0),), order=(0,) * 4)
    network = small_network(device_0=2 * GIB)
    found = placed(work, network, Rules(homes={"weights": ("host",)}, steppers=("cpu",)))
    nbytes, bus = 400 * MIB, 25e9
    assert found.exposed_s == pytest.approx(nbytes / bus)  # the first block's weights
    forward, backward, step = found.phases
    assert forward.lanes["host → device:0"] == pytest.approx(3 * nbytes / bus)
    assert backward.lanes["host → device:0"] == pytest.approx(3 * nbytes / bus)  # the last is there
    assert forward.seconds == pytest.approx(4 * 0.05)
    assert backward.seconds == pytest.approx(4 * 0.1)
    assert step.seconds == pytest.approx(4 * 2 * nbytes / 50e9)
    assert step.bound_by == "cpu"


def test_without_room_for_a_block_ahead_nothing_hides():
    work = Work(kinds=(block(saved=(), states_nbytes=0, gradients_nbytes=0),), order=(0,) * 4)
    network = small_network(device_0=800 * MIB)
    found = placed(work, network, Rules(homes={"weights": ("host",)}))
    assert not found.ahead
    assert found.window_blocks == 1
    moved_s = 4 * 400 * MIB / 25e9
    assert found.phases[0].seconds == pytest.approx(4 * 0.05 + moved_s)
    with pytest.raises(BudgetError, match="device:0 has 500"):
        place([work], small_network(device_0=500 * MIB), Rules(homes={"weights": ("host",)}))


def test_memo_finds_its_alpha_where_host_memory_binds():
    """7B, a million tokens, 2 TiB of host memory: 0.47 (MEMO, section 4; bytes of 16 b s h)."""
    unit = 2 * (1 << 20) * 4096
    saved = (
        SavedPart(name="input", nbytes=unit),
        SavedPart(name="attention", nbytes=unit),
        SavedPart(name="rows", nbytes=14 * unit, rebuild_s=1.0),
    )
    layer = block(
        trained_nbytes=0, gradients_nbytes=0, states_nbytes=0, saved=saved, forward_s=60.0,
        backward_s=120.0, forward_workspace_nbytes=0, backward_workspace_nbytes=0,
    )  # fmt: skip
    budgets = {"device:0": 2 * 16 * unit, "host": 2 << 40}
    network = make_network(small_machine(), budgets, compute="device:0", steppers=steppers())
    work = Work(kinds=(layer,), order=(0,) * 32)
    found = placed(work, network, Rules(homes={"saved": ("host",)}))
    alpha = ((2 << 40) / 30 - 2 * unit) / (14 * unit)
    assert alpha == pytest.approx(0.467, abs=0.001)
    assert fraction(found, "saved", "host", "rows") == pytest.approx(alpha, rel=1e-4)
    assert fraction(found, "saved", REBUILD, "rows") == pytest.approx(1 - alpha, rel=1e-4)
    assert placed(work, network).step_s <= found.step_s  # it may keep some as well


def test_rows_leave_as_far_as_compute_hides_them_and_the_rest_is_rebuilt():
    slow = [link("host", "device:0", 2), link("device:0", "host", 2), link("host", "host", 20)]
    budgets = {"device:0": 4 * GIB, "host": 64 * GIB}
    network = make_network(small_machine(*slow), budgets, compute="device:0", steppers=steppers())
    kind = block(trained_nbytes=0, gradients_nbytes=0, states_nbytes=0)
    work = Work(kinds=(kind,), order=(0,) * 12)
    found = placed(work, network)
    forward = found.phases[0]
    assert forward.lanes["device:0 → host"] == pytest.approx(forward.seconds)
    assert forward.seconds == pytest.approx(12 * 0.05)
    assert 0.05 < fraction(found, "saved", REBUILD, "rows") < 0.95
    faster = placed(work, network.faster("device:0 → host", 2).faster("host → device:0", 2))
    rebuilt = [fraction(one, "saved", REBUILD, "rows") for one in (faster, found)]
    assert rebuilt[0] < rebuilt[1]
    for rules in (Rules(homes={"saved": ("device:0",)}), Rules(rebuild=False)):
        assert placed(work, network, rules).step_s > found.step_s


def test_what_attention_made_is_rebuilt_for_whole_blocks_only():
    part = SavedPart(name="attention", nbytes=GIB, rebuild_s=0.01, rowwise=False)
    kind = block(trained_nbytes=0, gradients_nbytes=0, states_nbytes=0, saved=(part,))
    found = placed(
        Work(kinds=(kind,), order=(0,) * 10),
        rules=Rules(homes={"saved": ("device:0",)}),
        device_0=5 * GIB,
    )
    blocks = 10 * fraction(found, "saved", REBUILD, "attention")
    assert blocks == pytest.approx(round(blocks), abs=1e-9)
    assert blocks == pytest.approx(6)  # of 4.7 GiB beside kernels, four hold what is kept


def test_states_go_to_the_node_as_far_as_it_is_no_slower():
    """Side by side with DRAM, as ``swap.placement`` models it (arXiv 2507.03305)."""
    kind = block(saved=(), trained_nbytes=0, gradients_nbytes=0, states_nbytes=GIB)
    network = make_network(
        small_machine(),
        {"device:0": GIB, "host": 9 * GIB, "numa:1": 64 * GIB},
        compute="device:0",
        steppers=steppers(),
    )
    rules = Rules(steppers=("cpu",), homes={"states": ("host", "numa:1")})
    found = placed(Work(kinds=(kind,), order=(0,) * 12), network, rules)
    step = found.phases[2]
    on_node = 12 * GIB * fraction(found, "states", "numa:1")
    assert on_node >= 3 * GIB * (1 - 1e-6)
    assert step.lanes["numa:1 → host"] == pytest.approx(on_node / 20e9)
    assert step.seconds == pytest.approx(2 * 12 * GIB / 50e9)


def test_reads_and_writes_of_one_drive_hinder_each_other():
    network = small_network()
    reads = next(one for one in network.limits if one.name == "reads of file:a")
    share = 2 * 3 / (6 + 5)
    assert reads.lanes == {"file:a → host": 1.0, "host → file:a": pytest.approx(1 / share - 1)}


def test_two_tiers_on_one_drive_share_it():
    links = [*small_machine().links, link("file:b", "host", 6), link("host", "file:b", 5)]
    machine = small_machine(*links, tiers=(tier("file:b", "file", 1000, "nvme0"),))
    budgets = {"device:0": GIB, "host": GIB, "file:a": GIB, "file:b": GIB}
    network = make_network(machine, budgets, compute="device:0", steppers=steppers())
    (reads,) = [one for one in network.limits if one.name.startswith("reads")]
    assert reads.name == "reads of file:a and file:b"
    assert reads.lanes["file:b → host"] == 1.0
    assert network.route("file:a", "device:0").keys() == {"file:a → host", "host → device:0"}


# bfloat16 weights with masters, and AdamW's states in bfloat16: 2 bytes a parameter of weight and
# gradient, and of each of three states, one of them the master's lower half.
PARAMETERS = 100 * MIB
MASTERED = {
    "trained_nbytes": 2 * PARAMETERS, "gradients_nbytes": 2 * PARAMETERS,
    "states_nbytes": 6 * PARAMETERS, "saved": (),
    "recoded": Recoded(
        weights_nbytes=4 * PARAMETERS, gradients_nbytes=4 * PARAMETERS,
        states_nbytes=8 * PARAMETERS, seconds=0.1,
    ),
}  # fmt: skip
BELOW = {"weights": ("host",), "gradients": ("host",), "states": ("file:a",)}


def mastered(**changes):
    return Work(kinds=(block(**MASTERED),), order=(0,) * 4, **changes)


def test_the_host_steps_what_it_widened_and_moves_the_form_of_the_store():
    found = placed(mastered(), rules=Rules(homes=BELOW, steppers=("cpu",)))
    step, each = found.phases[2], 4 * PARAMETERS
    touched = 2 * 4 + 4 + 2 * 8  # weights and states are read and written, gradients read
    assert step.lanes["cpu"] == pytest.approx(touched * each / 50e9 + 4 * 0.1)
    assert step.lanes["file:a → host"] == pytest.approx(6 * each / 6e9)
    assert step.lanes["host → file:a"] == pytest.approx(6 * each / 5e9)
    assert "host → device:0" not in step.lanes


@pytest.mark.parametrize("weights", ["host", "device:0"])
def test_to_the_device_goes_what_the_host_widened(weights):
    rules = Rules(homes={**BELOW, "weights": (weights,)}, steppers=("device",))
    found = placed(mastered(), rules=rules)
    step, each = found.phases[2], 4 * PARAMETERS
    into, back = 4 + 4 + 8, 4 + 8
    on_device = 2 if weights == "device:0" else 0  # it leaves, and comes back, in its own form
    assert step.lanes["host → device:0"] == pytest.approx((into + on_device) * each / 25e9)
    assert step.lanes["device:0 → host"] == pytest.approx((back + on_device) * each / 25e9)
    assert step.lanes["file:a → host"] == pytest.approx(6 * each / 6e9)
    assert step.lanes["cpu"] == pytest.approx(4 * 0.1)  # forms are the host's work
    assert step.lanes[COMPUTE] == pytest.approx((2 * 4 + 4 + 2 * 8) * each / 500e9)


def test_slots_and_commits_are_of_the_form_of_the_store():
    work = mastered(store="file:a", slots=2, commits=True)
    found = placed(work, rules=Rules(homes=BELOW, steppers=("cpu",)))
    use = next(one for one in found.uses if one.tier == "file:a")
    assert use.peak_nbytes == 2 * 4 * (2 + 6) * PARAMETERS
    assert found.phases[2].lanes["host → file:a"] == pytest.approx(4 * 8 * PARAMETERS / 5e9)


def test_recoded_states_have_homes_of_their_own():
    kinds = block("head", saved=(), states_nbytes=MIB), block(**MASTERED)
    work = Work(kinds=kinds, order=(1, 1, 0))
    found = placed(work, rules=Rules(homes={"states": ("host",)}, recoded_homes=("file:a",)))
    assert {share.where for share in found.of(0, "states")} == {"file:a"}
    assert {share.where for share in found.of(2, "states")} == {"host"}


def test_tiles_that_are_staged_pass_through_the_host():
    homes = dict.fromkeys(("weights", "gradients", "states"), ("device:0",))
    work = small_work(2)
    rules = Rules(homes=homes, steppers=("device",), staged=True)
    staged = placed(work, rules=rules, device_0=64 * GIB)
    step = staged.phases[2]
    assert step.lanes["device:0 → host"] == pytest.approx(2 * (2 * 2000 + 400) * MIB / 25e9)
    assert step.lanes["host → device:0"] == pytest.approx(2 * (2 * 2000 + 400) * MIB / 25e9)
    assert step.lanes[COMPUTE] == pytest.approx(2 * (2 * 2000 + 400) * MIB / 500e9)
    free = placed(work, rules=dataclasses.replace(rules, staged=False), device_0=64 * GIB)
    assert "device:0 → host" not in free.phases[2].lanes


def test_shares_are_as_even_and_as_large_as_the_rules_say():
    kinds = block("head", trained_nbytes=2 * GIB), block()
    work = Work(kinds=kinds, order=(1, 1, 1, 0))
    rules = Rules(homes=dict.fromkeys(("weights", "gradients", "states"), ("host",)), even=True)

    def shares(rules):
        return [
            sum(share.fraction for share in one.shares if share.stepper == "device")
            for one in placed(work, rules=rules).classes
            if one.role in {"weights", "gradients", "states"}
        ]

    even = shares(rules)
    assert 0.1 < even[0] < 0.9
    assert even == pytest.approx([even[0]] * len(even))
    fixed = dataclasses.replace(rules, even=False, shares={"device": 0.25, "cpu": 0.75})
    assert shares(fixed) == pytest.approx([0.25] * len(even))
    assert placed(work, rules=fixed).step_s > placed(work, rules=rules).step_s


def test_smaller_micro_batches_fit_where_the_whole_one_does_not():
    def at(passes):
        saved = (SavedPart(name="inputs", nbytes=2 * GIB // passes),)
        kind = block(saved=saved, forward_s=0.05 / passes, backward_s=0.1 / passes)
        return Work(kinds=(kind,), order=(0,) * 12, passes=passes, tokens=64)

    works = [at(1), at(2), at(4)]
    network = small_network(device_0=6 * GIB, host=36 * GIB, file_a=0)
    with pytest.raises(BudgetError):
        place(works[:1], network)
    found = place(works, network)
    assert found.passes > 1
    check(found, works[1 if found.passes == 2 else 2], network)
    assert place(works, small_network(device_0=64 * GIB)).passes == 1  # of equals the first


def test_the_store_has_slots_of_everything_and_commits_write_them():
    work = small_work(store="file:a", slots=2, commits=True)
    found = placed(work, device_0=64 * GIB)
    use = next(one for one in found.uses if one.tier == "file:a")
    assert use.peak_nbytes == 12 * 2 * (400 + 1600) * MIB
    written = found.phases[2].lanes["host → file:a"]
    assert written == pytest.approx(12 * (400 + 1600) * MIB / 5e9)


def test_blocks_of_other_sizes_are_placed_by_themselves():
    kinds = (block("head", trained_nbytes=2 * GIB), block())
    work = Work(kinds=kinds, order=(1, 1, 1, 0))
    found = placed(work, device_0=12 * GIB)
    assert {one.kind for one in found.classes} == {0, 1}
    assert found.kinds == ("head", "layers.*")


def test_a_plan_is_json_and_tells_what_binds():
    found = placed(device_0=4 * GIB)
    document = json.loads(found.to_json())
    assert document["format"] == 2
    assert document["step_s"] == found.step_s
    prices = {price.tier: price.s_per_gib for price in found.prices}
    assert prices["device:0"] > 0
    assert prices["file:a"] == 0
    more = placed(device_0=4 * GIB + 256 * MIB)
    saved = (found.step_s - more.step_s) * 4
    assert saved == pytest.approx(prices["device:0"], rel=0.5)
