"""Micro-batches of one step go through the model together, a block at a time.

[Note: vertical order] A loop over n micro-batches (horizontal order) streams every weight 2n times
a step, and every gradient leaves and comes back n times. Here block k computes for all
micro-batches before block k + 1 does, forward and backward (GreedySnake, arXiv 2512.17570):
weights come twice, and a gradient gets its n parts while it is in memory and leaves once. The price
is what the micro-batches hold between blocks: n hidden states, and what they have saved, which is
swapped as always.

The user's own forward and backward run for each micro-batch, on a thread of its own, in turns
(``swap.relay``). A turn ends where a block begins, behind the last block of a list, and at the
same places in backward: where autograd comes to the operation that made what entered the block, all
of the block's own have run, for they were made later. Between the last block and the loss
there is no end of a turn: the head's forward and backward follow each other, so that logits are
those of one micro-batch. Nothing moves at these places but the turn; values, gradients and graphs
are those of the loop. That sums have its order ``swap.parts`` sees to, and ``swap.draws`` that
random numbers are its own.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.allocator.units import format_nbytes
from offload.config import OffloadConfig
from offload.hooks import ModelHooks
from offload.replanning import Replanner
from offload.swap.ambient import ThreadSettings, process_settings, set_process_settings
from offload.swap.census import Census
from offload.swap.draws import Draws, signature_of
from offload.swap.draws import Run as DrawsRun
from offload.swap.gradients import GradientSwapper
from offload.swap.parts import Parts
from offload.swap.relay import Relay
from offload.swap.tokenwise.blocks import find_blocks
from offload.swap.uncompiled import is_compiled, uncompiled
from offload.swap.weights import WeightSwapper
from offload.swap.window import in_backward

Forward: TypeAlias = Callable[[Any], torch.Tensor]
Backward: TypeAlias = Callable[[torch.Tensor], object]


def refuse_turns(config: OffloadConfig, count: int, *, on_device: bool) -> None:
    """Refuse ``count`` micro-batches where these settings rule their turns out.

    Raises:
        UnsupportedError: the model computes on a device, or is rebuilt token-wise.
        ConfigError: a step in backward would come before the last of them.
    """
    if on_device:
        raise UnsupportedError(
            "the model computes on a device: all backwards share a thread there, so micro-batches "
            "can't go through it in turns. Accumulate in a loop over them"
        )
    if config.recompute != "off":
        raise UnsupportedError(
            "token-wise recompute rebuilds the blocks of one micro-batch at a time: attach with "
            "recompute='off', or accumulate in a loop over the micro-batches"
        )
    if config.step_in_backward and count > config.accumulation_steps:
        raise ConfigError(
            f"{count} micro-batches, but a step in backward is made of "
            f"accumulation_steps={config.accumulation_steps}: set it to {count}"
        )


class Vertical:
    """Runs micro-batches through one model together.

    Args:
        replanner: is told what it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        census: Census,
        weights: WeightSwapper,
        gradients: GradientSwapper,
        hooks: ModelHooks,
        replanner: Replanner,
    ) -> None:
        self._model = model
        self._census = census
        self._weights = weights
        self._gradients = gradients
        self._hooks = hooks
        self._replanner = replanner
        self._journal = weights.journal
        self._draws = Draws()
        self._running = False

    def run(
        self, batches: Sequence[Any], forward: Forward, backward: Backward, blocks: Sequence[str]
    ) -> list[torch.Tensor]:
        """Run all of ``batches``; their losses, detached.

        Raises:
            ConfigError: no batch, a call inside another or inside backward, or no such blocks.
            UnsupportedError: what this order can't do exactly; a loss that is no tensor.
        """
        self._check(batches, forward)
        found = find_blocks(self._model, blocks)
        if len(batches) == 1 or not found:
            if not found:
                self._journal.notice(
                    "vertical",
                    "the model has no blocks that repeat in a list: micro-batches go through it "
                    "one after the other. Name modules of it as blocks",
                )
            return [_train(batch, forward, backward) for batch in batches]
        segments = segments_of(self._census, list(found))
        self._tell_room(segments)
        self._running = True
        try:
            return self._run_in_turns(batches, forward, backward, found, segments)
        finally:
            self._running = False

    def _check(self, batches: Sequence[Any], forward: Forward) -> None:
        if not batches:
            raise ConfigError("there is no micro-batch to accumulate")
        if self._running or in_backward():
            raise ConfigError("accumulate was called from inside of a forward or backward")
        if torch.is_inference_mode_enabled():
            raise ConfigError("accumulate needs gradients: leave torch.inference_mode")
        if is_compiled(self._model) or hasattr(forward, "_torchdynamo_orig_callable"):
            raise UnsupportedError(
                "a compiled model can't hand over between its blocks: compile functions that its "
                "blocks call, or accumulate in a loop over the micro-batches"
            )

    def _tell_room(self, segments: "Segments") -> None:
        self._replanner.reserve_in_turns(max(self._nbytes(names) for names in segments))
        if not self._replanner.is_settled:
            return
        resident = {name for name, weight in self._weights.weights.items() if weight.resident}
        streaming = max(self._nbytes({*names} - resident) for names in segments)
        if (missing := streaming - self._weights.window_nbytes) > 0:
            self._journal.notice(
                "vertical",
                f"the largest block streams {format_nbytes(streaming)} ({streaming} bytes) of "
                f"weights, {format_nbytes(missing)} more than the plan has room for: each "
                f"micro-batch reads some of them again. A budget of {format_nbytes(2 * missing)} "
                "more would hold them",
            )

    def _run_in_turns(
        self,
        batches: Sequence[Any],
        forward: Forward,
        backward: Backward,
        blocks: dict[str, nn.Module],
        segments: "Segments",
    ) -> list[torch.Tensor]:
        count, signatures = len(batches), [signature_of(batch) for batch in batches]
        settings = ThreadSettings.here()

        def train(batch: Any) -> torch.Tensor:
            with settings.applied():
                return _train(batch, forward, backward)

        draws = self._draws.begin(signatures)
        belongings = _Belongings(draws, count)
        relay = Relay(
            [partial(train, batch) for batch in batches],
            name="micro-batch",
            leaving=belongings.leave,
            entering=belongings.enter,
        )
        # What random numbers are drawn is not known yet, most often: see ``swap.draws``.
        alone = draws.is_alone
        kind, uses = ("in turns", count, alone), expected_uses(segments, count, alone=alone)
        with ExitStack() as undo:
            undo.enter_context(self._hooks.in_turns(kind, uses, batches))
            parts = Parts(relay, self._names())
            undo.callback(parts.stop)
            largest = max(self._nbytes(names) for names in segments)
            undo.enter_context(self._gradients.in_turns(parts.expects_more, largest))
            borders = _Borders(blocks, relay, parts)
            undo.callback(borders.remove)
            losses = relay.run()
        self._draws.learn(draws, signatures)
        if draws.is_alone:
            self._replanner.leave_out()
        if not draws.is_exact:
            self._journal.notice(
                "vertical",
                "the micro-batches drew other numbers from torch's generator than before, with "
                "inputs of the same shapes: theirs may not be those of a loop over the "
                "micro-batches, but are as random as those",
            )
        return losses

    def _nbytes(self, names: Iterable[str]) -> int:
        """Of these weights, each counted once."""
        return sum(self._weights.weights[name].nbytes for name in {*names})

    def _names(self) -> dict[nn.Parameter, str]:
        return {
            parameter: name
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }


class _Belongings:
    """What each micro-batch finds as it left it: the generator's state, settings of the process."""

    def __init__(self, draws: DrawsRun, count: int) -> None:
        self._draws = draws
        self._settings = [process_settings()] * count

    def leave(self, index: int) -> bool:
        self._settings[index] = process_settings()
        return self._draws.leave(index)

    def enter(self, index: int | None) -> None:
        set_process_settings(self._settings[-1 if index is None else index])
        self._draws.enter(index)


def _train(batch: Any, forward: Forward, backward: Backward) -> torch.Tensor:
    loss = forward(batch)
    if not isinstance(loss, torch.Tensor):
        raise UnsupportedError(
            f"forward must return the loss of a micro-batch, a tensor: it returned "
            f"{type(loss).__name__}"
        )
    backward(loss)
    return loss.detach()


class _Borders:
    """Hooks that end turns at the borders of ``blocks``, until ``remove``."""

    def __init__(self, blocks: dict[str, nn.Module], relay: Relay[Any], parts: Parts) -> None:
        self._relay = relay
        self._parts = parts
        self._last = set(_last_of_lists(blocks).values())
        self._inside: list[nn.Module | None] = [None] * relay.count  # where each micro-batch is
        self._handles: list[RemovableHandle] = []
        for block in blocks.values():
            self._handles += [
                # Before all other hooks of the block, which may use its weights.
                block.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                block.register_forward_hook(self._leave),
            ]

    @uncompiled
    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        index = self._relay.current
        if index is not None and self._inside[index] is None and not in_backward():
            self._end_turn((args, kwargs))
            self._inside[index] = block

    @uncompiled
    def _leave(self, block: nn.Module, _args: Any, output: Any) -> None:
        index = self._relay.current
        if index is not None and self._inside[index] is block and not in_backward():
            self._inside[index] = None
            if block in self._last:
                self._end_turn(output)

    def _end_turn(self, tensors: Any) -> None:
        node = _last_made(tensors)
        if node is not None:
            node.register_prehook(self._end_in_backward)
        self._relay.turn()

    def _end_in_backward(self, _gradients: Any) -> None:
        self._parts.begin_backward()
        self._relay.turn()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _last_made(tensors: Any) -> Any:
    """The operation of autograd that made one of ``tensors``, and no other one later."""
    nodes = [
        leaf.grad_fn
        for leaf in tree_leaves(tensors)
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None
    ]
    return max(nodes, key=lambda node: node._sequence_nr(), default=None)


def _last_of_lists(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The last block of each list, by the list's name."""
    return {name.rpartition(".")[0]: block for name, block in blocks.items()}


# What is used in which order.

Segments: TypeAlias = list[list[str]]


def segments_of(census: Census, blocks: Sequence[str]) -> Segments:
    """The weights that are used between two ends of turns, in the model's own order."""
    segments: Segments = []
    before: str | None = None
    for info in census.modules:
        block = next(
            (name for name in blocks if info.name == name or info.name.startswith(f"{name}.")), None
        )
        if not segments or block != before:
            segments.append([])
        before = block
        segments[-1].extend(info.weights)
    return segments


def expected_uses(segments: Segments, count: int, *, alone: bool) -> list[str]:
    """The uses of weights in the first run of ``count`` micro-batches.

    All of them go through a segment before the next one, and at the last one turn back each by
    itself; or, ``alone``, each goes all the way before the next one.
    """
    if alone:
        there = [name for names in segments for name in names]
        return [*there, *reversed(there)] * count
    *others, last = segments
    there = [name for names in others for name in names * count]
    back = [name for names in reversed(others) for name in names[::-1] * count]
    return [*there, *([*last, *reversed(last)] * count), *back]
