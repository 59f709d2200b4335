"""Links and rates of a device: on the simulated one, whose clock tells what they must be."""

import functools
import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from offload.allocator.errors import CapacityError, TierIOError
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.machine import Machine, Processor
from offload.tiers.memory import HostBuffer, memory_at
from offload.tiers.probe import cuda
from offload.tiers.probe.device import Shapes, device_routes, measure_device
from offload.tiers.probe.pace import Effort, Pace, measure_route
from offload.tiers.simulated.accelerator import Faults, SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing

MIB = 1 << 20
EXACT = Timing(jitter=0, late=0, latency_s=1e-5, bytes_per_s=2e9, kernel_s=1e-3, host_s=1e-6)
SHAPES = Shapes(
    matrices=((8, 8, 8), (16, 16, 16)), thin=((2, 8, 8),), sequences=(4, 8), heads=2, head_width=4,
    sizes=(64, 256), tile_numel=64,
)  # fmt: skip
WORKS = {
    "matmul": 2, "thin matmul": 1, "attention": 2, "attention backward": 2, "pointwise": 2,
    "heavy": 2, "optimizer": 1,
}  # fmt: skip


@pytest.fixture
def host() -> Iterator[HostBuffer]:
    buffer = HostBuffer(8 * MIB)
    yield buffer
    buffer.release()


def measure(device: SimulatedAccelerator, seconds: float = 1e9):
    return measure_device(device, "cuda:0", seconds, shapes=SHAPES, clock=device.now)


def test_rates_are_those_of_the_devices_own_clock() -> None:
    rates = measure(SimulatedAccelerator(timing=EXACT))
    assert {rate.processor for rate in rates} == {"cuda:0"}
    for dtype in ("float32", "bfloat16"):
        own = [rate for rate in rates if rate.dtype == dtype]
        assert Counter(rate.work for rate in own) == WORKS
        assert len({(rate.work, rate.size) for rate in own}) == len(own)
    for rate in rates:  # one kernel each, without the host's time between them
        assert rate.per_s == pytest.approx(rate.size / 1e-3), rate.work
    assert next(rate.size for rate in rates) == 2 * 8**3


def test_what_is_measured_is_computed_on_operands_that_have_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a late device fresh bytes read as NaN: a product of those would be told as fast."""
    seen: list[bool] = []

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(bool(left.isfinite().all() and right.isfinite().all() and left.std() > 0.1))
        return whole(left, right, out=out)

    whole = torch.mm
    monkeypatch.setattr(torch, "mm", functools.wraps(whole)(mm))
    late = Timing(kernel_s=1e-3)  # and in any order that is not declared
    rates = measure(SimulatedAccelerator(seed=3, timing=late))
    assert len(rates) == 2 * sum(WORKS.values())
    assert len(seen) > 10
    assert all(seen)


def test_without_time_the_smallest_call_of_each_kind_is_measured() -> None:
    rates = measure(SimulatedAccelerator(timing=EXACT), seconds=0.0)
    assert Counter(rate.work for rate in rates) == dict.fromkeys(WORKS, 2)
    assert {rate.size for rate in rates if rate.work == "matmul"} == {2 * 8**3}


def test_calls_that_a_small_device_has_no_room_for_are_left_out() -> None:
    large = Shapes(
        matrices=((8, 8, 8), (1024, 1024, 1024)), thin=((2, 8, 8),), sequences=(4,), heads=2,
        head_width=4, sizes=(64, 4 * MIB), tile_numel=64,
    )  # fmt: skip
    device = SimulatedAccelerator(timing=EXACT, capacity=MIB)
    rates = measure_device(device, "cuda:0", 1e9, shapes=large, clock=device.now)
    assert Counter(rate.work for rate in rates) == dict.fromkeys(WORKS, 2)
    gc.collect()
    assert device.held_nbytes() == 0  # nothing stays behind
    none = SimulatedAccelerator(timing=EXACT, capacity=4096)
    with pytest.raises(CapacityError, match="simulated may hold"):
        measure(none)


def test_a_kernel_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "mm", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure(SimulatedAccelerator(timing=EXACT))


def test_links_are_measured_by_block_size_both_ways(host: HostBuffer) -> None:
    device = SimulatedAccelerator(timing=EXACT)
    addresses = {"host": host.address, "pinned": host.address}
    routes = device_routes(device, "device:0", addresses, host.nbytes)
    ends = [(route.source, route.target) for route in routes]
    assert ends == [
        ("host", "device:0"), ("device:0", "host"), ("pinned", "device:0"), ("device:0", "pinned"),
    ]  # fmt: skip
    effort = Effort(seconds=10.0, repeat_nbytes=16 * MIB)
    pace = Pace(seconds=10.0, clock=device.now)
    pace.cases = sum(route.cases for route in routes)
    for route in routes:
        links = measure_route(route, effort, pace)
        assert [link.block_nbytes for link in links] == [MIB, 8 * MIB]
        for link in links:  # the latency of each block beside its bytes
            alone_s = 1e-5 + link.block_nbytes / 2e9
            assert link.bytes_per_s == pytest.approx(link.block_nbytes / alone_s, rel=0.01)
        assert links[0].latency_s == pytest.approx(1e-5 + 4096 / 2e9, rel=0.2)


def test_a_copy_goes_round_the_buffer_and_has_ended_when_it_is_told(host: HostBuffer) -> None:
    device = CpuAccelerator()
    data = bytes(range(256)) * (2 * MIB // 256)
    memory_at(host.address, 2 * MIB)[:] = data
    into, out = device_routes(device, "device:0", {"host": host.address}, 2 * MIB)
    into.move(MIB, 5)
    memory_at(host.address, 2 * MIB)[:] = bytes(2 * MIB)
    out.move(MIB, 1)
    assert bytes(memory_at(host.address, 2 * MIB)) == data[:MIB] + bytes(MIB)


def test_a_copy_that_fails_is_an_error(host: HostBuffer) -> None:
    device = SimulatedAccelerator(faults=Faults(errors=1.0))
    (into, _) = device_routes(device, "device:0", {"host": host.address}, host.nbytes)
    with pytest.raises(TierIOError, match="injected fault"):
        into.move(MIB, 3)


def test_a_device_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_one(name: str) -> SimulatedAccelerator:
        if name == "cuda:1":
            raise RuntimeError("the driver is gone")
        return SimulatedAccelerator(timing=EXACT)

    monkeypatch.setattr(cuda, "count_devices", lambda: 4)
    monkeypatch.setattr("offload.tiers.cuda.CudaAccelerator", open_one)
    monkeypatch.setattr(cuda, "measure_device", functools.partial(measure_device, shapes=SHAPES))
    names = ("cpu", "cuda:0", "cuda:1", "cuda:2")  # of a fourth one nothing is known
    processors = tuple(Processor(name=name, model="m", cores=None, features=()) for name in names)
    machine = Machine(kernel="6.1", processors=processors, tiers=())
    said: list[str] = []
    found, failures = cuda.add_devices(machine, progress=said.append)
    assert failures == {"cuda:1": "the driver is gone"}
    assert Counter(rate.processor for rate in found.compute) == {"cuda:0": 24, "cuda:2": 24}
    assert "matmul in float32 on cuda:0" in said
