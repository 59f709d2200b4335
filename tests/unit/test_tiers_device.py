"""The device tier: which waits it declares, which it does not, and what it refuses."""

import itertools
import threading
from functools import partial

import pytest
import torch

from offload.allocator.errors import CapacityError, StaleBlockError, TierIOError, UnsupportedError
from offload.swap.links import LinkRate
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.events import ListRecorder
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal, Label
from offload.tiers.pinned import PinnedTier
from offload.tiers.ram import RamTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing

PAGE = 4096
SHAPE = (1024,)
# A copy takes 14 us, a kernel 1 ms, the host nothing.
EXACT = Timing(jitter=0, late=0, latency_s=1e-5, bytes_per_s=1e9, kernel_s=1e-3, host_s=0)


@pytest.fixture
def device():
    return SimulatedAccelerator(timing=EXACT)


@pytest.fixture
def tier(device):
    with DeviceTier(device, 4 * PAGE) as tier:
        yield tier


@pytest.fixture
def pool():
    with PinnedTier(4 * PAGE) as pool:
        yield pool


@pytest.fixture
def buffer(pool):
    block = pool.allocate(PAGE)
    pool.tensor(block, torch.float32, SHAPE).fill_(3)
    return block


def view(tier, block, **options):
    return tier.tensor(block, torch.float32, SHAPE, **options)


def ended_s(transfer):
    transfer.wait()
    return transfer.event.span()[1]


def test_a_prefetch_overlaps_with_what_computes(device, tier, buffer):
    busy, fresh = tier.allocate(PAGE), tier.allocate(PAGE)
    device.launch(partial(view(tier, busy).fill_, 1))
    assert ended_s(tier.fetch(fresh, buffer)) < EXACT.kernel_s
    assert not device.current_stream().record().done()


def test_a_copy_tells_what_it_took_on_its_own_stream(device, tier, buffer):
    block = tier.allocate(PAGE)
    first, second = tier.fetch(block, buffer), tier.fetch(block, buffer)
    assert (first.duration_s, second.duration_s) == (None, None)
    second.wait()
    assert first.done()
    took_s = EXACT.latency_s + PAGE / EXACT.bytes_per_s  # queueing behind the first left out
    assert (first.duration_s, second.duration_s) == pytest.approx((took_s, took_s))


def test_a_copy_tells_when_it_began_and_ended(device, tier, buffer):
    recorder = ListRecorder()
    tier.journal.recorder = recorder
    copy, rate = tier.fetch(tier.allocate(PAGE), buffer), LinkRate()
    rate.measured(copy)
    assert (copy.started_s, copy.ended_s) == (None, None)
    assert rate.seconds(PAGE) == float("inf")
    copy.wait()
    assert (copy.started_s, copy.ended_s) == copy.event.span()
    assert copy.ended_s > copy.started_s
    (move,) = recorder.events
    assert (move.t_s, move.duration_s) == (copy.ended_s, copy.duration_s)
    rate.measured(copy)  # so that what comes back from pinned memory is fetched just in time
    assert rate.seconds(PAGE) == pytest.approx(copy.duration_s)


def test_a_copy_waits_for_kernels_up_to_the_last_on_its_block(device, tier, buffer):
    block = tier.allocate(PAGE)
    device.launch(partial(view(tier, block).fill_, 1))
    tier.used(block)
    device.launch(int)
    device.launch(int)
    assert EXACT.kernel_s < ended_s(tier.evict(block, buffer)) < 2 * EXACT.kernel_s


def test_without_used_a_copy_waits_for_all_kernels_before_it(device, tier, buffer):
    block = tier.allocate(PAGE)
    device.launch(partial(view(tier, block).fill_, 1))
    device.launch(int)
    assert 2 * EXACT.kernel_s < ended_s(tier.evict(block, buffer)) < 3 * EXACT.kernel_s


def test_kernels_that_only_read_do_not_wait_for_an_eviction(device, pool, tier, buffer):
    block = tier.allocate(PAGE)
    tier.fetch(block, buffer).wait()
    began = device.now()
    evicted = tier.evict(block, pool.allocate(PAGE))
    values = view(tier, block, read_only=True)
    with device.compute(0):
        assert device.now() == began
        assert values.sum() == 3 * 1024
    view(tier, block)
    with device.compute(0):
        assert evicted.done()


def test_each_stream_that_took_the_block_up_is_waited_for(device, tier, buffer):
    block = tier.allocate(PAGE)
    order = []
    for name in ("one", "two"):
        with device.use_stream(name):
            view(tier, block)
            device.launch(partial(order.append, name))
    tier.evict(block, buffer).wait()
    assert sorted(order) == ["one", "two"]


def test_memory_is_reused_without_the_host_waiting(device, tier, buffer):
    blocks = [tier.allocate(PAGE) for _ in range(4)]
    device.launch(partial(view(tier, blocks[0]).fill_, 1))
    blocks[0].release()
    again = tier.allocate(PAGE)
    assert again.extent == blocks[0].extent
    assert device.now() == 0
    assert ended_s(tier.fetch(again, buffer)) > EXACT.kernel_s
    assert view(tier, again).sum() == 3 * 1024


def test_a_released_block_becomes_poison_after_its_last_kernel(device, tier):
    out, block = view(tier, tier.allocate(PAGE)), tier.allocate(PAGE)
    values = view(tier, block)
    device.launch(partial(values.fill_, 2))
    device.launch(partial(torch.add, values, 1, out=out))
    block.release()
    device.synchronize()
    assert out.eq(3).all()
    assert values.isnan().all()


def test_an_unfetched_block_is_poison(tier):
    assert view(tier, tier.allocate(PAGE)).isnan().all()


def test_a_view_may_be_smaller_and_of_any_dtype(tier, buffer):
    block = tier.allocate(PAGE)
    tier.fetch(block, buffer).wait()
    values = tier.tensor(block, torch.uint8, (2, 3))
    assert (values.shape, values.is_contiguous()) == ((2, 3), True)
    assert tier.tensor(block, torch.bfloat16, ()).shape == ()


def test_stale_use_raises(tier, pool, buffer):
    block = tier.allocate(PAGE)
    block.release()
    for use in (partial(view, tier), tier.used, lambda block: tier.fetch(block, buffer)):
        with pytest.raises(StaleBlockError, match=r"4096 bytes.* was released"):
            use(block)
    block, stale = tier.allocate(PAGE), pool.allocate(PAGE)
    stale.release()
    for move in (tier.fetch, tier.evict):
        with pytest.raises(StaleBlockError, match="of pinned"):
            move(block, stale)


def test_a_block_that_outlived_its_tier_raises(tier, buffer):
    block = tier.allocate(PAGE)
    tier.close()
    for use in (partial(view, tier), tier.used, lambda block: tier.fetch(block, buffer)):
        with pytest.raises(StaleBlockError, match=r"is closed|outlived its tier, device"):
            use(block)
    with pytest.raises(StaleBlockError, match="device tier of 16384 bytes is closed"):
        tier.allocate(1)


def test_a_view_that_leaves_its_block_is_refused(tier):
    with pytest.raises(ValueError, match=r"bytes 0\.\.4100 leave a block of 4096 bytes"):
        tier.tensor(tier.allocate(PAGE), torch.float32, (5, 205))


def test_a_device_without_room_refuses_the_tier():
    with pytest.raises(CapacityError, match=r"cpu may hold 8\.00 KiB"):
        DeviceTier(CpuAccelerator(capacity=2 * PAGE), 3 * PAGE)


def test_only_pinned_blocks_are_fetched_and_evicted(tier):
    with RamTier(PAGE) as ram, pytest.raises(UnsupportedError, match=r"host \(100 bytes\) is not"):
        tier.fetch(tier.allocate(PAGE), ram.allocate(100))


def test_a_file_transfer_with_the_buffer_is_waited_for(tmp_path, device, tier, pool):
    lanes = Lanes(Journal())
    values = torch.arange(1024, dtype=torch.float32)
    with FileTier(tmp_path, "data", lanes) as file:
        stored, buffer = file.allocate(PAGE), pool.allocate(PAGE)
        pool.tensor(buffer, torch.float32, SHAPE).copy_(values)
        file.write(stored, pool.address(buffer)).wait()
        pool.tensor(buffer, torch.float32, SHAPE).zero_()
        held, entered = threading.Event(), threading.Event()
        lanes.reads.submit([lambda: (entered.set(), held.wait(60))], Label("", "", "", ""), 0)
        lanes.reads.submit([lambda: held.wait(60)], Label("", "", "", ""), 0)
        assert entered.wait(60)
        pool.guard(buffer, file.read(stored, pool.address(buffer)))
        threading.Timer(0.01, held.set).start()
        block = tier.allocate(PAGE)
        tier.fetch(block, buffer).wait()
        assert view(tier, block).equal(values)
    lanes.close()


def test_the_error_of_a_copy_is_raised_where_it_is_waited_for(device, tier, pool, buffer):
    device.fail_next("host→device", TierIOError(5, "planted"))
    block = tier.allocate(PAGE)
    transfer = tier.fetch(block, buffer)
    with pytest.raises(TierIOError, match="planted"):
        transfer.wait()
    tier.drain()  # told already
    with pytest.raises(TierIOError, match="planted"):
        view(tier, block)  # still not right
    tier.fetch(block, buffer).wait()
    assert view(tier, block).eq(3).all()


def test_an_error_that_nobody_waited_for_is_raised_at_the_step_edge(device, tier, buffer):
    device.fail_next("device→host", TierIOError(5, "planted"))
    block = tier.allocate(PAGE)
    tier.evict(block, buffer)
    for _ in range(3):
        tier.fetch(block, buffer)
    with pytest.raises(TierIOError, match="planted"):
        tier.drain()
    tier.drain()


def test_a_failed_eviction_is_raised_where_the_host_reads(device, tier, pool, buffer):
    device.fail_next("device→host", TierIOError(5, "planted"))
    tier.evict(tier.allocate(PAGE), buffer)
    device.synchronize()
    with pytest.raises(TierIOError, match="planted"):
        pool.tensor(buffer, torch.float32, SHAPE)


def test_a_part_that_failed_spoils_the_block(device, tier, buffer, pool):
    block = tier.allocate(PAGE)
    device.fail_next("host→device", TierIOError(5, "planted"))
    tier.write(block, pool.address(buffer), nbytes=100)
    tier.write(block, pool.address(buffer) + 100, offset=100).wait()
    with pytest.raises(TierIOError, match="planted"):
        view(tier, block)


def test_a_move_is_told_once(device, pool, buffer):
    recorder = ListRecorder()
    with DeviceTier(device, PAGE, journal=Journal(recorder, clock=device.now)) as tier:
        block = tier.allocate(PAGE)
        transfer = tier.fetch(block, buffer, label=Label("w", "weight", "pinned", "device"))
        transfer.wait()
        transfer.settle()
        assert transfer.done()
        tier.evict(block, buffer).wait()
    told = [(move.key, move.lane, move.src, move.dst, move.nbytes) for move in recorder.events]
    assert told == [
        ("w", "host→device", "pinned", "device", PAGE),
        ("", "device→host", "device", "host", PAGE),
    ]


def test_events_of_the_past_are_let_go(device, tier, buffer):
    block = tier.allocate(PAGE)
    for _ in range(50):
        tier.fetch(block, buffer).wait()
        view(tier, block)
        tier.used(block)
        tier.evict(block, buffer).wait()
        with tier.allocate(PAGE):
            pass
    edges = tier._edges[block.generation]
    kept = (edges.writes, edges.reads, edges.streams, edges.filling, tier._moving, tier._host)
    assert max(map(len, kept)) <= 2
    assert len(tier._left) <= 2


def test_close_waits_for_kernels_and_copies(device, buffer):
    done = []
    with DeviceTier(device, 4 * PAGE) as tier:
        block, gone = tier.allocate(PAGE), tier.allocate(PAGE)
        for used in (block, gone):
            view(tier, used)
            device.launch(partial(done.append, used))
        gone.release()
        transfer = tier.fetch(block, buffer)
    assert done == [block, gone]
    assert transfer.done()


def test_a_pool_waits_for_the_device_and_then_gives_the_buffer(device, tier):
    recorder = ListRecorder()
    with PinnedTier(PAGE, journal=Journal(recorder, clock=device.now)) as pool:
        for value in range(5):
            block = tier.allocate(PAGE)
            with pool.allocate(PAGE) as buffer:
                pool.tensor(buffer, torch.float32, SHAPE).fill_(value)
                tier.fetch(block, buffer)
            device.launch(partial(int))
            block.release()
    stalls = [event for event in recorder.events if type(event).__name__ == "Stall"]
    assert [(stall.key, stall.reason) for stall in stalls] == [("pinned", "full")] * 4
    assert all(stall.duration_s > 0 for stall in stalls)
    times = [stall.t_s for stall in stalls]
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def step_of(tier, *nbytes):
    """Blocks one after the other, each there before the one ahead of it goes; their extents."""
    extents, ahead = [], None
    for one in nbytes:
        block = tier.allocate(one)
        extents.append(block.extent)
        if ahead is not None:
            ahead.release()
        ahead = block
    ahead.release()
    return extents


def test_steps_that_repeat_run_at_planned_addresses(device):
    sizes = (512, 2048, 1024, 3072, 512)
    with DeviceTier(device, 4 * PAGE) as tier:
        before = step_of(tier, *sizes)
        assert tier.planning().steps == 0
        for _ in range(3):
            tier.next_step()
            after = step_of(tier, *sizes)
        tier.next_step()
        planning = tier.planning()
        assert (planning.steps, planning.planned_steps, planning.deviations) == (3, 2, 0)
        assert max(extent.end for extent in after) < max(extent.end for extent in before)
        assert planning.before.fragmentation > planning.after.fragmentation == 0


def test_a_step_that_deviates_goes_on_and_its_blocks_hold_their_values(device):
    with DeviceTier(device, 4 * PAGE) as tier:
        for _ in range(2):
            tier.next_step()
            step_of(tier, 512, 2048, 1024)
        tier.next_step()
        blocks = [tier.allocate(nbytes) for nbytes in (512, 2048, 4096, PAGE)]
        for value, block in enumerate(blocks):
            device.launch(partial(tier.tensor(block, torch.uint8, (block.nbytes,)).fill_, value))
        device.synchronize()
        for value, block in enumerate(blocks):
            assert tier.tensor(block, torch.uint8, (block.nbytes,)).eq(value).all()
            block.release()
        tier.next_step()
        assert tier.planning().deviations == 1
