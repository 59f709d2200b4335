"""Which node holds which tensor: within capacity, never worse than simpler rules, monotone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.allocator.errors import BudgetError, ConfigError
from offload.swap.placement import (
    MemoryNode,
    PlacedTensor,
    by_benefit,
    by_class,
    interleaved,
    nodes_of,
    place,
    step_seconds,
)
from offload.tiers.topology import Node, Topology

MIB, GIB = 1 << 20, 1 << 30
ROUNDING_S = 1e-7  # shares are whole bytes: a few of them, at 1 GB/s and more

tensors_of = st.lists(
    st.builds(
        PlacedTensor,
        name=st.uuids().map(str),
        role=st.sampled_from(["state", "weight", "activation", "gradient"]),
        nbytes=st.integers(0, 4 * GIB),
        cpu_touches=st.sampled_from([0.0, 1.0, 2.0]),
        dma_reads=st.sampled_from([0.0, 1.0, 2.0]),
        dma_writes=st.sampled_from([0.0, 1.0]),
    ),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)
rate = st.floats(1e9, 2e11)


def node(index, local, capacity, cpu=159e9, read=55e9, write=55e9):
    return MemoryNode(
        index=index,
        local=local,
        capacity_nbytes=capacity,
        cpu_bytes_per_s=cpu,
        dma_read_bytes_per_s=read,
        dma_write_bytes_per_s=write,
    )


@st.composite
def machines(draw, tensors):
    """Any nodes that hold the tensors: DRAM, then up to three far ones."""
    total = sum(tensor.nbytes for tensor in tensors)
    far = draw(st.integers(0, 3))
    capacities = [draw(st.integers(0, total)) for _ in range(far + 1)]
    capacities[draw(st.integers(0, far))] += max(0, total - sum(capacities))
    return [
        node(index, index == 0, capacity, draw(rate), draw(rate), draw(rate))
        for index, capacity in enumerate(capacities)
    ]


@st.composite
def alike(draw, tensors):
    """DRAM without a capacity yet, and far cards that differ in size and speed by one factor."""
    total = sum(tensor.nbytes for tensor in tensors)
    rates = [draw(rate) for _ in range(3)]
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return [node(0, True, 0, draw(rate), draw(rate), draw(rate))] + [
        node(index, False, factor * total, *(factor * figure for figure in rates))
        for index, factor in enumerate(factors, start=1)
    ]


def with_dram(nodes, nbytes):
    return [
        node(0, True, nbytes, *nodes[0].rates),
        *nodes[1:],
    ]


@given(st.data())
def test_every_byte_has_a_place_within_capacity(data):
    tensors = data.draw(tensors_of)
    nodes = data.draw(machines(tensors))
    plan = place(tensors, nodes)
    for tensor in tensors:
        parts = plan.shares[tensor.name]
        assert sum(nbytes for _, nbytes in parts) == tensor.nbytes
        assert all(nbytes > 0 for _, nbytes in parts)
        assert len({index for index, _ in parts}) == len(parts)
    used = plan.used_nbytes()
    assert all(used.get(one.index, 0) <= one.capacity_nbytes for one in nodes)
    assert plan.step_s == step_seconds(tensors, nodes, plan.shares)


@given(st.data())
def test_the_same_input_gives_the_same_plan(data):
    tensors = data.draw(tensors_of)
    nodes = data.draw(machines(tensors))
    plan = place(tensors, nodes)
    assert plan.to_json() == place(list(tensors), nodes[::-1]).to_json()
    assert json.loads(plan.to_json())["format"] == 1


@given(st.data())
def test_never_worse_than_the_class_rule_or_interleaving(data):
    tensors = data.draw(tensors_of)
    nodes = data.draw(machines(tensors))
    plan = place(tensors, nodes)
    for rule in (by_class, interleaved):
        assert plan.step_s <= step_seconds(tensors, nodes, rule(tensors, nodes))


@given(st.data())
def test_benefit_per_byte_alone_is_never_worse_where_cards_are_alike(data):
    """The rule itself, not the best of three: what the note at the module's top argues."""
    tensors = data.draw(tensors_of)
    total = sum(tensor.nbytes for tensor in tensors)
    nodes = with_dram(data.draw(alike(tensors)), data.draw(st.integers(0, total)))
    alone = step_seconds(tensors, nodes, by_benefit(tensors, nodes))
    for rule in (by_class, interleaved):
        assert alone <= step_seconds(tensors, nodes, rule(tensors, nodes)) + ROUNDING_S


@given(st.data())
def test_more_dram_never_makes_a_step_longer(data):
    tensors = data.draw(tensors_of)
    total = sum(tensor.nbytes for tensor in tensors)
    nodes = data.draw(alike(tensors))
    less, more = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    short = place(tensors, with_dram(nodes, less)).step_s
    long = place(tensors, with_dram(nodes, more)).step_s
    assert long <= short + ROUNDING_S


def model(layers=4, numel=67_900_000):
    """Mixed precision: fp32 master, momentum, variance and gradient; bf16 weights; activations."""
    tensors = []
    for layer in range(layers):
        tensors += [
            PlacedTensor(name=f"{layer}.{name}", role="state", nbytes=4 * numel, cpu_touches=1.0)
            for name in ("master", "momentum", "variance")
        ]
        tensors += [
            PlacedTensor(
                name=f"{layer}.gradient", role="gradient", nbytes=4 * numel, cpu_touches=1.0,
                dma_writes=1.0,
            ),
            PlacedTensor(name=f"{layer}.weight", role="weight", nbytes=2 * numel, dma_reads=2.0),
            PlacedTensor(
                name=f"{layer}.saved", role="activation", nbytes=2 * numel, dma_reads=1.0,
                dma_writes=1.0,
            ),
        ]  # fmt: skip
    return tensors


def published(dram_nbytes, *cards_nbytes):
    nodes = [Node(index=0, kind="dram")]
    nodes += [Node(index=index + 1, kind="cxl") for index in range(len(cards_nbytes))]
    return nodes_of(Topology(nodes=tuple(nodes)), dict(enumerate([dram_nbytes, *cards_nbytes])))


def in_dram(plan, name):
    parts = dict(plan.shares[name])
    return parts.get(0, 0) / sum(parts.values())


def test_what_the_cpu_touches_is_in_dram_first_and_reads_are_on_cxl():
    tensors = model()
    states = sum(tensor.nbytes for tensor in tensors if tensor.cpu_touches)
    plan = place(tensors, published(states, 100 * GIB))
    for tensor in tensors:
        share = in_dram(plan, tensor.name)
        assert share >= 0.75 if tensor.cpu_touches else share <= 0.34, tensor.name
    assert in_dram(plan, "0.weight") < 0.05


def test_large_tensors_come_before_small_ones_that_lose_nothing():
    large = PlacedTensor(name="large", role="state", nbytes=4 * 68_000_000, cpu_touches=1.0)
    small = [
        PlacedTensor(name=f"small{at}", role="state", nbytes=4 * 6_800_000, cpu_touches=1.0)
        for at in range(10)
    ]
    plan = place([*small, large], published(large.nbytes * 3 // 4, 10 * GIB))
    assert in_dram(plan, "large") > 0.7
    assert all(in_dram(plan, one.name) < 0.1 for one in small)


def test_cards_are_striped_in_proportion_to_their_rates():
    nodes = [
        node(0, True, 0),
        node(1, False, 8 * GIB, read=30e9),
        node(2, False, 8 * GIB, read=1e10),
    ]
    tensor = PlacedTensor(name="weight", role="weight", nbytes=4 * GIB, dma_reads=1.0)
    plan = place([tensor], nodes)
    assert plan.shares["weight"] == ((1, 3 * GIB), (2, GIB))
    assert plan.step_s == pytest.approx(3 * GIB / 30e9)


def test_a_step_is_shorter_than_by_the_class_rule_and_by_interleaving():
    tensors, total = model(), sum(tensor.nbytes for tensor in model())
    nodes = published(total // 2, total)
    plan = place(tensors, nodes)
    assert plan.rule == "benefit"
    assert plan.step_s < 0.8 * step_seconds(tensors, nodes, by_class(tensors, nodes))
    assert plan.step_s < 0.95 * step_seconds(tensors, nodes, interleaved(tensors, nodes))


@pytest.mark.parametrize(
    ("dram", "cxl", "measured_ms"),
    [(1, 0, 54.8), (1, 1, 106.8), (1, 2, 143), (1, 4, 178), (0, 1, 228.8)],
)
def test_the_model_is_within_a_tenth_of_the_published_measurements(dram, cxl, measured_ms):
    tensors = [
        PlacedTensor(name=str(at), role="state", nbytes=4 * 545_000_000, cpu_touches=1.0)
        for at in range(4)
    ]
    parts = dram + cxl
    shares = {
        tensor.name: [
            (index, tensor.nbytes * part // parts) for index, part in ((0, dram), (1, cxl)) if part
        ]
        for tensor in tensors
    }
    modelled_ms = 1e3 * step_seconds(tensors, published(64 * GIB, 64 * GIB), shares)
    assert modelled_ms == pytest.approx(measured_ms, rel=0.1)


def test_rates_of_the_hmat_are_taken_where_all_nodes_have_them():
    near = Node(index=0, kind="dram", read_bytes_per_s=200e9, write_bytes_per_s=100e9)
    far = Node(index=1, kind="cxl", read_bytes_per_s=50e9, write_bytes_per_s=25e9)
    known = nodes_of(Topology(nodes=(near, far)), {0: GIB, 1: GIB}, link_bytes_per_s=60e9)
    assert [one.rates for one in known] == [(200e9, 60e9, 60e9), (50e9, 50e9, 25e9)]
    bare = Node(index=1, kind="cxl")
    assumed = nodes_of(Topology(nodes=(near, bare)), {0: GIB, 1: GIB})
    assert assumed[0].cpu_bytes_per_s / assumed[1].cpu_bytes_per_s == pytest.approx(228.8 / 54.8)


def test_more_than_all_nodes_hold_is_refused():
    tensor = PlacedTensor(name="one", role="state", nbytes=3 * GIB, cpu_touches=1.0)
    with pytest.raises(
        BudgetError, match=r"3\.00 GiB \(3221225472 bytes\).*raise a budget by 1\.0"
    ):
        place([tensor], published(GIB, GIB))


def test_bad_nodes_and_names_are_all_told():
    tensor = PlacedTensor(name="one", role="state", nbytes=1)
    with pytest.raises(ConfigError) as caught:
        place([tensor, tensor], [node(1, False, GIB), node(1, False, GIB)])
    assert len(caught.value.problems) == 3
