"""What ``offload doctor -o`` measures of a device: rates by kind of work, and its links."""

import time
from functools import partial

import torch

from gpu_report import Outcome, Report
from gpu_training import UnderTest
from offload.tiers.machine import ComputeRate, Link
from offload.tiers.pinned import PinnedTier
from offload.tiers.probe.device import Shapes, device_routes, measure_device
from offload.tiers.probe.pace import Effort, Pace, measure_route

MIB = 1 << 20
_LINKS_S = 6.0
_KINDS = 2 * 7  # kinds of work, in two types
_CLOCKS_APART = 0.9
_SMALL = Shapes(  # a processor stands in for the device
    matrices=((16, 16, 16), (32, 32, 32)), thin=((8, 16, 16),), sequences=(16,), heads=2,
    head_width=8, sizes=(4096, 65536), tile_numel=4096,
)  # fmt: skip


def run_checks(report: Report, device: UnderTest, *, real: bool) -> None:
    """Measure as the doctor does, and tell the figures."""
    report.run("rates", "kinds of work", partial(kinds_of_work, device, real=real))
    report.run("rates", "links", partial(links, device, real=real))
    if real:
        report.run("rates", "clocks", partial(clocks_agree, device))


def kinds_of_work(device: UnderTest, *, real: bool) -> Outcome:
    """Each kind of work has a rate in each type."""
    with device.open() as accelerator:
        if real:
            rates = measure_device(accelerator, "device")
        else:
            rates = measure_device(accelerator, "device", shapes=_SMALL, repeat_s=1e-3)
    found = {(rate.work, rate.dtype) for rate in rates}
    best = max(_of(rates, "matmul", "bfloat16"))
    told = (
        f"{len(rates)} rates of {len(found)} kinds; matmul in bfloat16 {best / 1e12:.3g} TFLOP/s, "
        f"float32 {max(_of(rates, 'matmul', 'float32')) / 1e12:.3g}; sums "
        f"{max(_of(rates, 'pointwise', 'float32')) / 1e9:.4g} GB/s; AdamW "
        f"{max(_of(rates, 'optimizer', 'float32')) / 1e9:.4g} GB/s"
    )
    return Outcome(told, holds=len(found) == _KINDS, value=best)


def _of(rates: tuple[ComputeRate, ...], work: str, dtype: str) -> list[float]:
    return [rate.per_s for rate in rates if (rate.work, rate.dtype) == (work, dtype)]


def links(device: UnderTest, *, real: bool) -> Outcome:
    """From pageable and from pinned memory, both ways, by block size; by the device's clock."""
    nbytes, effort = (64 * MIB, Effort()) if real else (4 * MIB, Effort(repeat_nbytes=8 * MIB))
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    found: list[Link] = []
    with device.open() as accelerator, PinnedTier(nbytes, pinners=device.pinners) as pool:
        block = pool.allocate(nbytes)
        pool.tensor(block, torch.uint8, (nbytes,)).fill_(1)
        addresses = {"host": pageable.data_ptr(), pool.memory: pool.address(block)}
        routes = device_routes(accelerator, "device", addresses, nbytes)
        pace = Pace(seconds=_LINKS_S, clock=accelerator.now)
        pace.cases = sum(route.cases for route in routes)
        for route in routes:
            found += measure_route(route, effort, pace)
    told = [
        f"{link.source} → {link.target} {link.block_nbytes // MIB} MiB {link.bytes_per_s / 1e9:.3g}"
        for link in found
    ]
    ends = {(link.source, link.target) for link in found}
    return Outcome(
        f"GB/s: {', '.join(told)}",
        holds=len(ends) == len(routes),
        value=max(link.bytes_per_s for link in found),
    )


def clocks_agree(device: UnderTest) -> Outcome:
    """Events tell of long kernels what the host's clock tells of waiting for them."""
    with device.open() as accelerator:
        left = device.place(torch.randn(8192, 8192, dtype=torch.bfloat16))
        out = torch.empty_like(left)
        torch.mm(left, left, out=out)
        accelerator.synchronize()
        stream, began_s = accelerator.current_stream(), time.perf_counter()
        began = stream.record()
        for _ in range(50):
            accelerator.launch(partial(torch.mm, left, left, out=out))
        ended = stream.record()
        accelerator.synchronize()
        host_s, device_s = time.perf_counter() - began_s, ended.seconds_since(began)
    ratio = device_s / host_s
    told = f"events {device_s * 1e3:.3f} ms, host {host_s * 1e3:.3f} ms"
    return Outcome(told, holds=_CLOCKS_APART <= ratio <= 1.01, value=ratio, target="0.9 to 1.01")
