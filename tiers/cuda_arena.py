"""One segment of torch's caching allocator for all that a step computes, sized by its first run.

[Note: why no addresses] ``torch.cuda.MemPool`` takes a pluggable allocator, which is asked for
*segments*; which part of one a tensor gets is decided by the caching allocator in C++. So no plan
of single tensors can be replayed through a pool. Nor may the pluggable allocator be Python: it is
called while the allocator's lock is held, by threads that then wait for the interpreter, and
whoever drops a tensor holds the interpreter while it waits for that lock.
``change_current_allocator`` is asked for each tensor, without a lock; but what it returns is not
looked at, so that memory that is short is a null pointer in a kernel instead of an
``OutOfMemoryError``, and neither limit nor statistics are left. A budget that is a hard limit can't
stand on that. What a pool does give is *one segment*: it is made by an allocation of that size,
and all that is served in the pool from then on is cut out of it. Its size is planned
(``allocator.segment``), its limit, statistics and errors stay torch's own, and what does not fit
is another segment of the same pool, as ever.

[Note: the window] From the first forward of a step until the optimizer's step, what the thread
that computes allocates goes to the pool. A pool is bound to a thread, so backward runs on that
thread, too (``set_multithreading_enabled``). What other threads allocate, and what is ``outside``
(copies of weights that visit the device), does not: their time differs from step to step.

A step is known by its *form*, such as the shapes of its inputs. A form that comes twice in a row
is learned, in a pool that grows as it wants, and has its segment from the next time on. Steps of
any other form leave the pool alone. A step that needs more than the segment is learned again, and
the segment never shrinks by that; after ``_LEARNED_AGAIN`` times it stays as it is.

The segment belongs to the stream that was current as it was taken: the window takes it.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch

from offload.allocator.errors import UnsupportedError
from offload.allocator.segment import (
    ArenaStats,
    PoolUse,
    SegmentPlan,
    StepRequests,
    plan_segment,
    requests_of,
)
from offload.allocator.units import format_nbytes

_MOST_ENTRIES = 2_000_000
"""Of a history; more of them and its beginning would be overwritten."""

_LEARNED_AGAIN = 2


class ArenaRuntime(Protocol):
    """What is used of ``torch.cuda``."""

    memory: Any
    MemPool: Any

    def use_mem_pool(self, pool: Any, device: Any) -> AbstractContextManager[Any]: ...
    def get_allocator_backend(self) -> str: ...
    def synchronize(self, device: Any) -> None: ...
    def empty_cache(self) -> None: ...


class CudaArena:
    """The arena of ``device``; see the module.

    Args:
        runtime: ``torch.cuda``, unless a test brings its own.

    Raises:
        UnsupportedError: this torch has no pools, or another allocator than its own.
    """

    def __init__(self, device: torch.device, *, runtime: ArenaRuntime | None = None) -> None:
        self._runtime = runtime or cast("ArenaRuntime", torch.cuda)
        self._device = device
        _check_support(self._runtime)
        self._stats = ArenaStats()
        self._last: Hashable = None  # form of the step before
        self._form: Hashable = None  # what the pool is for
        self._pool: Any = None
        self._plan: SegmentPlan | None = None
        self._live_nbytes = 0  # of the step that was learned, small requests too
        self._large_nbytes = 0  # that the pool has, or may grow to unnoticed
        self._again = 0
        self._begun = False
        self._window: ExitStack | None = None
        self._routing: AbstractContextManager[Any] | None = None
        self._thread = 0
        self._learning = False

    def stats(self) -> ArenaStats:
        """As of the last ``end``."""
        return self._stats

    def begin(self, form: Hashable) -> None:
        """A step of this form computes from now on; nothing if it does already."""
        if self._begun or self._stats.off is not None:
            return  # another pass of the same step
        self._begun = True
        twice, self._last = form == self._last, form
        self._stats = replace(self._stats, steps=self._stats.steps + 1)
        if form != self._form:
            if not twice:
                return
            self._form, self._plan, self._again = form, None, 0
        if self._plan is None:
            self._renew_pool()
            if not self._start_history():
                return
        elif self._pool is None and not self._take_segment(self._plan):
            return
        self._open()

    def end(self) -> None:
        """The step has computed; nothing if none does."""
        self._begun = False
        if self._window is None:
            return
        window, self._window = self._window, None
        window.close()
        if self._learning:
            self._learn()
        else:
            self._look_back()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What is allocated inside does not come from the pool."""
        if self._routing is None or threading.get_ident() != self._thread:
            yield
            return
        self._stop_routing()
        try:
            yield
        finally:
            self._route()

    def close(self) -> None:
        """Give everything back; safe to call twice."""
        if self._window is not None:
            window, self._window = self._window, None
            window.close()
        if self._learning:
            self._stop_history()
        if self._pool is not None:
            self._renew_pool(open_one=False)
        self._turn_off("it is closed")

    # The window.

    def _open(self) -> None:
        self._thread = threading.get_ident()
        with ExitStack() as opening:
            opening.enter_context(torch.autograd.set_multithreading_enabled(False))
            self._route()
            opening.callback(self._stop_routing)
            self._window = opening.pop_all()

    def _route(self) -> None:
        routing = self._runtime.use_mem_pool(self._pool, self._device)
        routing.__enter__()
        self._routing = routing

    def _stop_routing(self) -> None:
        routing, self._routing = self._routing, None
        if routing is not None:
            routing.__exit__(None, None, None)

    # The pool.

    def _renew_pool(self, *, open_one: bool = True, use_on_oom: bool = False) -> None:
        """Another pool; the old one's segments, and all that is only cached, go back first.

        Without that the device would hold the step's bytes twice, here and where they were.
        """
        self._pool = None
        self._runtime.synchronize(self._device)
        self._runtime.empty_cache()
        if open_one:
            self._pool = self._runtime.MemPool(use_on_oom=use_on_oom)

    def _take_segment(self, plan: SegmentPlan) -> bool:
        """The pool with its one segment; False: there is no room, or nothing to serve."""
        if plan.nbytes == 0:
            self._turn_off("no request of the step is larger than 1 MiB")
            return False
        self._renew_pool(use_on_oom=True)  # while it has free bytes, nobody else need go without
        try:
            with self._runtime.use_mem_pool(self._pool, self._device):
                segment = torch.empty(plan.nbytes, dtype=torch.uint8, device=self._device)
                del segment
        except torch.OutOfMemoryError as error:
            self._renew_pool(open_one=False)
            self._turn_off(
                f"{self._device} has no room for a segment of {format_nbytes(plan.nbytes)} "
                f"({plan.nbytes} bytes): a budget of so much more, or a smaller batch, has. {error}"
            )
            return False
        self._large_nbytes = self._reserved_nbytes(only="large")
        return True

    def _reserved_nbytes(self, only: str | None = None) -> int:
        return sum(
            segment["total_size"]
            for segment in self._pool.snapshot()
            if only in (None, segment["segment_type"])
        )

    def _turn_off(self, why: str) -> None:
        self._stats = replace(self._stats, off=self._stats.off or why)

    # What a step asks for.

    def _start_history(self) -> bool:
        if _history_enabled():
            self._pool = None
            self._turn_off("a history of the memory is being recorded, and there is but one")
            return False
        self._runtime.memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=_MOST_ENTRIES
        )
        self._learning = True
        return True

    def _stop_history(self) -> None:
        self._learning = False
        self._runtime.memory._record_memory_history(None)

    def _learn(self) -> None:
        try:
            snapshot = self._runtime.memory._snapshot()
        finally:
            self._stop_history()
        history = snapshot["device_traces"][self._device.index or 0]
        before = self._reserved_nbytes()
        if len(history) >= _MOST_ENTRIES:
            self._pool = None
            self._turn_off(f"a step has more than {_MOST_ENTRIES} requests")
            return
        step = self._requests(history)
        plan = plan_segment(step)
        known, self._live_nbytes = self._stats.plan, step.live_nbytes
        if self._again and known is not None:
            plan = replace(plan, nbytes=max(plan.nbytes, known.nbytes))
        self._plan = plan
        self._pool = None
        self._stats = replace(
            self._stats,
            learned=self._stats.learned + 1,
            plan=plan,
            before=PoolUse(reserved_nbytes=before, live_nbytes=self._live_nbytes),
        )

    def _requests(self, history: list[dict[str, Any]]) -> StepRequests:
        """Those of the pool, among all that the device was asked for."""
        segments = [
            range(segment["address"], segment["address"] + segment["total_size"])
            for segment in self._pool.snapshot()
        ]
        changes = (
            (entry["addr"], entry["size"] if entry["action"] == "alloc" else None)
            for entry in history
            if entry["action"] in ("alloc", "free_completed")
        )
        return requests_of(
            (address, nbytes)
            for address, nbytes in changes
            if any(address in segment for segment in segments)
        )

    def _look_back(self) -> None:
        """Whether the segment was enough."""
        stats, large = self._stats, self._reserved_nbytes(only="large")
        after = PoolUse(reserved_nbytes=self._reserved_nbytes(), live_nbytes=self._live_nbytes)
        if large <= self._large_nbytes:
            self._stats = replace(stats, served=stats.served + 1, after=after)
            return
        self._stats = replace(stats, deviations=stats.deviations + 1, after=after)
        self._large_nbytes = large
        if self._again < _LEARNED_AGAIN:
            self._again += 1
            self._plan = None


def _check_support(runtime: ArenaRuntime) -> None:
    missing = [
        name
        for name in ("MemPool", "use_mem_pool", "memory")
        if getattr(runtime, name, None) is None
    ]
    if missing:
        raise UnsupportedError(
            f"torch {torch.__version__} has no torch.cuda.{missing[0]}, which device_arena needs: "
            "leave device_arena out, or install torch 2.9 or later built for CUDA"
        )
    backend = runtime.get_allocator_backend()
    if backend != "native":
        raise UnsupportedError(
            f"device_arena needs torch's own caching allocator, and {backend} is in its place: "
            "leave device_arena out, or backend out of PYTORCH_CUDA_ALLOC_CONF"
        )


def _history_enabled() -> bool:
    """Whether somebody records the allocator's history already."""
    asked = getattr(torch._C, "_cuda_isHistoryEnabled", None)
    return asked is not None and bool(asked())
