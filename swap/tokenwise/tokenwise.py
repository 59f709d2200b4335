"""Token-wise recompute for any model: the saved-tensor hooks of its blocks.

A fraction alpha of the token rows of what a block saves is swapped, the rest is rebuilt in
backward from the block's input and attention's output (MEMO, SIGMOD'25), with the operations that
the forward was seen to execute.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.swap.selective import SavedTensors  # noqa: TC001 (as Keeper)
from offload.swap.tokenwise.blocks import find_blocks
from offload.swap.tokenwise.keeper import Keeper
from offload.swap.tokenwise.measure import Measurements  # noqa: TC001 (as Keeper)
from offload.swap.tokenwise.outside import OutsideBytes
from offload.swap.tokenwise.passes import BlockPass, RowsHandle, Weights
from offload.swap.tokenwise.plans import BlockPlan, PlanReport, Settings
from offload.swap.tokenwise.program import Program  # noqa: TC001 (as Keeper)
from offload.swap.tokenwise.rebuild import Rebuilder
from offload.swap.tokenwise.record import PLAIN, Recorder
from offload.swap.tokenwise.solve import Link, less_room
from offload.swap.tokenwise.timing import Stopwatch, Timer
from offload.swap.tokenwise.trials import Choice
from offload.swap.tokenwise.unwatched import takes_saved, unwatched
from offload.swap.uncompiled import is_compiled_wrapper, uncompiled

_MOST_SHAPES = 64  # plans that one block keeps; the least recently used one goes


class _Block:
    """A block with its plans, by the shape of its inputs."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.plans: OrderedDict[Any, BlockPlan] = OrderedDict()


@dataclass(slots=True)
class _Pass:
    """A forward of the model and its backward, from its first block on."""

    plan: BlockPlan  # of that block
    choice: Choice
    watch: Stopwatch
    clean: bool = True  # nothing was verified, which takes time


@dataclass(slots=True)
class _Running:
    """The block whose forward is being executed."""

    block: _Block
    plan: BlockPlan
    recording: tuple[BlockPass, Recorder] | None  # else it is only timed
    watch: Stopwatch  # stands still while something is packed


class TokenWise:
    """Saved-tensor hooks: inside a block row by row, elsewhere those of ``keeper``.

    Args:
        keeper: takes what is swapped.
        notice: is told, once each, what can't be rebuilt and why.
        timer: measures what alpha is solved from, where the model computes.
        weights_of: a block, by its name and module.
        rounding: rebuild into flat buffers on the host, too, as on a device.

    Attributes:
        hooks: what autograd hands its tensors to: this object, or something on top of it.

    Raises:
        ConfigError: a block that the model has not.
    """

    def __init__(
        self,
        model: nn.Module,
        keeper: Keeper,
        settings: Settings,
        *,
        notice: Callable[[str], None] | None = None,
        timer: Timer | None = None,
        weights_of: Callable[[str, nn.Module], Weights] = Weights,
        rounding: bool = False,
    ) -> None:
        self.hooks: SavedTensors = self
        self.keeper = keeper
        self.settings = settings
        self._notice = notice
        self._told: set[str] = set()
        self._timer = timer or Timer()
        self._weights_of = weights_of
        self._running: _Running | None = None
        self._previous: weakref.ref[BlockPass] | None = None
        self._outside = OutsideBytes(model)
        self._pass: _Pass | None = None
        self._watched_task = -1  # of autograd
        self._lock = threading.RLock()  # backward may run on several threads at once
        self._measurements: dict[Program, Measurements] = {}
        self._rebuilder = Rebuilder(keeper, self._timer, rounding=rounding)
        found = find_blocks(model, settings.blocks)
        self._blocks = [_Block(name, module) for name, module in found.items()]
        self._handles = [
            handle
            for block in self._blocks
            for handle in (
                block.module.register_forward_pre_hook(self._before(block), with_kwargs=True),
                block.module.register_forward_hook(self._after(block), always_call=True),
            )
        ]
        if not self._blocks:
            self._tell(
                "token-wise recompute: no module repeats in a list, so nothing is rebuilt; name "
                "the blocks in the setting blocks"
            )

    @property
    def block_names(self) -> list[str]:
        """The blocks whose rows may be rebuilt."""
        return [block.name for block in self._blocks]

    @property
    def held_nbytes(self) -> int:
        """Bytes of what is rebuilt now: two parts of blocks at most."""
        return self._rebuilder.held_nbytes

    def report(self) -> list[PlanReport]:
        """For each block and shape of input: what is rebuilt, and why the rest is not."""
        self._timer.tell()
        return [plan.report() for block in self._blocks for plan in block.plans.values()]

    @uncompiled
    def pack(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for each tensor that it saves."""
        running = self._running
        if running is None:
            self._outside.saved(tensor)
            return self.keeper.pack(tensor)
        # What packing does is no part of the block's forward.
        running.watch.pause()
        if running.recording is None or not _plain(tensor):
            packed = self.keeper.pack(tensor)
        else:
            with unwatched():
                packed = running.recording[0].pack(tensor)
        running.watch.resume()
        return packed

    @uncompiled
    def unpack(self, packed: Any) -> torch.Tensor:
        """Called by autograd when backward needs a saved tensor.

        Raises:
            RuntimeError: it, or a parameter that it is rebuilt from, was modified in place.
        """
        with self._lock:
            self._watch_backward()
            if isinstance(packed, RowsHandle):
                return self._rebuilder.unpack(packed)
            self._rebuilder.pause()
            try:
                return self.keeper.unpack(packed)
            finally:
                self._rebuilder.resume()

    def aside(self) -> AbstractContextManager[object]:
        """What happens inside is no operation of the block whose forward is being executed."""
        recording = self._running is not None and self._running.recording is not None
        return unwatched() if recording else nullcontext()

    def remove(self) -> None:
        """Take the hooks off; what was saved stays usable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, block: _Block) -> Callable[..., None]:
        @uncompiled
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._running is not None or not takes_saved(self.hooks.pack):
                return
            inputs = [tensor for tensor in _tensors((args, kwargs)) if _plain(tensor)]
            hidden = next((one for one in inputs if one.is_floating_point() and one.ndim > 1), None)
            if hidden is None or _is_compiled(block.module):
                why = "is compiled" if hidden is not None else "takes no hidden states"
                self._tell(f"token-wise recompute: {block.name} {why}: it is swapped whole")
                return
            plan = self._plan_of(block, hidden, inputs)
            if self._outside.begin(block.name):
                choice, self._timer.measures = plan.begin_pass()
                self._pass = _Pass(plan, choice, self._timer.stopwatch(running=True))
            if plan.gave_up is not None:
                return
            recording = None
            if plan.wants_a_look(self._links, self._choice()):
                recording = self._record(block, plan, hidden)
            watch = self._timer.stopwatch(running=True)
            self._running = _Running(block, plan, recording, watch)

        return before

    def _plan_of(
        self, block: _Block, hidden: torch.Tensor, inputs: list[torch.Tensor]
    ) -> BlockPlan:
        signature = (
            block.module.training,
            torch.is_autocast_enabled(hidden.device.type),
            tuple((tuple(one.shape), one.dtype, one.requires_grad) for one in inputs),
        )
        plan = block.plans.pop(signature, None)
        if plan is None:
            plan = BlockPlan(
                block.name,
                hidden.shape[-2],
                self.settings,
                len(self._blocks),
                self._measurements,
                self._timer,
            )
            if plan.gave_up is not None:
                self._tell(f"token-wise recompute: {plan.gave_up}")
        block.plans[signature] = plan
        if len(block.plans) > _MOST_SHAPES:
            block.plans.popitem(last=False)
        if len(self._measurements) > _MOST_SHAPES * len(self._blocks):
            del self._measurements[next(iter(self._measurements))]
        return plan

    def _record(
        self, block: _Block, plan: BlockPlan, hidden: torch.Tensor
    ) -> tuple[BlockPass, Recorder]:
        replay, keeps = plan.begin()
        if keeps and self._pass is not None:
            self._pass.clean = False
        weights = self._weights_of(block.name, block.module)
        wanted = frozenset(replay.chain.sources) if replay is not None else frozenset[int]()
        recorder = (
            Recorder(plan.rows, weights.by_storage, clock=self._timer.host_clock)
            if plan.program is None
            else Recorder(plan.rows, weights.by_storage, plan.program, wanted)
        )
        before = self._previous() if self._previous is not None else None
        block_pass = BlockPass(
            self.keeper,
            weights,
            recorder,
            replay,
            plan.measurements,
            on_part=self._rebuilder.watch,
            heads=self._timer.stopwatch(),
            device=hidden.device,
            keeps=keeps,
            previous=before,
        )
        recorder.on_wanted = block_pass.wanted
        self._previous = weakref.ref(block_pass)
        recorder.__enter__()  # type: ignore[no-untyped-call]
        return block_pass, recorder

    def _after(self, block: _Block) -> Callable[..., None]:
        @uncompiled
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            running = self._running
            if running is None or running.block is not block:
                return
            self._running = None
            running.watch.pause()
            if running.recording is None:
                if output is not None:
                    running.watch.tell(running.plan.measurements.forward)
                return
            block_pass, recorder = running.recording
            recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            block_pass.leave()
            if output is None:  # it raised, or nothing depends on it
                return
            text = running.plan.end(block_pass, recorder, running.watch, self._links)
            if text is not None:
                self._tell(text)

        return after

    def _choice(self) -> Choice:
        return self._pass.choice if self._pass is not None else Choice.SOLVED

    def _watch_backward(self) -> None:
        """Be called at the end of the backward that runs now."""
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._watched_task):
            self._watched_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        ended, self._pass = self._pass, None
        self._outside.end()
        self._rebuilder.end_pass()
        if ended is not None and ended.clean and ended.plan.trials is not None:
            ended.watch.tell(partial(ended.plan.trials.took, ended.choice))

    def _links(self) -> list[Link]:
        """What is left to the blocks: the rest of the model saves tensors too."""
        return less_room(self.keeper.links(), self._outside.nbytes)

    def _tell(self, text: str) -> None:
        if text not in self._told and self._notice is not None:
            self._told.add(text)
            self._notice(text)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes of its storage, offset, size and stride are all there is to a tensor."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
    )


def _is_compiled(module: nn.Module) -> bool:
    return any(
        one._compiled_call_impl is not None or is_compiled_wrapper(one) for one in module.modules()
    )
