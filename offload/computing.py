"""The device on which a model computes, and everything of the model that visits it.

Weights, gradients and optimizer states have the homes that they have for a model on the CPU, and
the step is the same. What this adds is on the way between host and device: copies of weights
(``swap.device_weights``), which stand in for parameters (``swap.stand_ins``); gradients
(``swap.device_gradients``); saved activations (``swap.places``). Buffers go to the device once and
stay. Tensors in host memory that the outermost module is called with follow them; what it returns
stays on the device.
"""

import ctypes
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig
from offload.recomputing import rebuild_rows
from offload.runtime import Runtime
from offload.saving import SwapHomes, device_of, in_flight_by_default, pinners_of
from offload.swap.activations import ActivationCache
from offload.swap.buckets import Form
from offload.swap.census import Census, take_census
from offload.swap.device_buckets import DeviceBuckets
from offload.swap.device_gradients import DeviceGradients
from offload.swap.device_plan import DevicePlan, make_device_plan
from offload.swap.device_step import DeviceStep
from offload.swap.device_weights import DeviceWeights
from offload.swap.ferry import CHUNK_NBYTES, Ferry
from offload.swap.gradients import GradientSwapper
from offload.swap.homes import Home
from offload.swap.plan import Plan
from offload.swap.stand_ins import SavedWeights, StandIns
from offload.swap.staying import move_freely, stay
from offload.swap.tokenwise.copies import CopiedWeights
from offload.swap.visits import TILES, VisitSize, beside_backward
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.accelerator import Accelerator
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.lanes import Lane

_LEAVING = 2  # gradients on their way at once
_AT_ONCE = 2  # copies that a thread waits for: the one that computes, and backward's
_WORKSPACES_NBYTES = 64 << 20  # of the libraries that compute on CUDA
_DEFAULT_SHARE = 0.9  # of the device's memory, where no budget is given
_UNLIMITED = 1 << 62


def accelerator_for(
    model: nn.Module, device: str | None, given: Accelerator | None
) -> Accelerator | None:
    """What ``model`` is to compute on; None: on the CPU.

    Raises:
        ConfigError: parameters are on a device, but it is to compute elsewhere.
        UnsupportedError: there is no such device.
    """
    if given is not None:
        return given
    present = device_of(model)
    if device is None:
        return present
    if device != "cpu":
        wanted = CudaAccelerator(device)
        if present is None or present.torch_device == wanted.torch_device:
            return wanted
    if present is None:
        return None
    raise ConfigError(
        f"device={device!r}, but parameters of the model are on {present.name}: leave device out "
        "to compute there, or call model.cpu() first"
    )


def ferry_nbytes(config: OffloadConfig) -> int:
    """Bytes of the pinned buffers that everything passes through."""
    return _buffers(config) * CHUNK_NBYTES


def _buffers(config: OffloadConfig) -> int:
    """As many as there are threads that may want one at once."""
    paths = max(len(config.nvme), 1)
    return config.io_threads * (1 + 2 * paths) + _LEAVING + _AT_ONCE


def plan_device(
    model: nn.Module,
    config: OffloadConfig,
    accelerator: Accelerator,
    stepping: VisitSize | None = None,
) -> DevicePlan:
    """The shares of the device budget.

    Args:
        stepping: what the optimizer's step takes of the device, if it steps there.

    Raises:
        BudgetError: the largest module does not fit, or no tile of the optimizer's step.
        UnsupportedError: the device has no arena, and one is asked for.
    """
    if config.device_arena:
        accelerator.step_arena()  # refused, if it is, before anything has moved
    budget = config.budget.get("device")
    if budget is None:
        total = accelerator.total_nbytes()
        budget = _UNLIMITED if total is None else int(total * _DEFAULT_SHARE)
    fixed = sum(buffer.nbytes for buffer in model.buffers())
    fixed += _others_nbytes(model, accelerator)
    if isinstance(accelerator, CudaAccelerator):
        fixed += _WORKSPACES_NBYTES
    step_nbytes = 0
    if stepping is not None and config.step_in_backward:  # beside what backward computes
        fixed += beside_backward(stepping, budget) + stepping.temporaries_nbytes
    elif stepping is not None:
        step_nbytes = stepping.least_nbytes
    return make_device_plan(
        take_census(model, whole_tables=True),
        budget_nbytes=budget,
        fixed_nbytes=fixed,
        device=accelerator.name,
        step_nbytes=step_nbytes,
    )


def _others_nbytes(model: nn.Module, accelerator: Accelerator) -> int:
    """Bytes of the device that are held already, but not by ``model``, whose weights will leave."""
    own = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if accelerator.owns(tensor)
    }
    return max(accelerator.held_nbytes() - sum(own.values()), 0)


class Computing:
    """What computes on ``accelerator``; ``remove`` gives it back.

    Args:
        plan: of the device; ``host_plan`` that of host memory.
        homes: of saved activations, beside pinned memory, which comes first.
        names: of the weights behind parameters.

    Attributes:
        arena: of what torch allocates in a step; None unless ``device_arena`` asks for it.
        census: of the modules that use weights on the device.
        activations: the cache of saved tensors; ``saved`` is on top of it.
        tokenwise: rebuilds token rows, between these two, if that was asked for.
        ferry: between host and device, with the lanes ``arriving`` and ``leaving``.
        device_step: steps tiles of the optimizer, where the device does that.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        accelerator: Accelerator,
        plan: DevicePlan,
        host_plan: Plan,
        host: WeightSwapper,
        by_parameter: Mapping[nn.Parameter, Weight],
        gradients: GradientSwapper,
        homes: list[Home],
    ) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.device = accelerator.torch_device
        self.census: Census = take_census(model, whole_tables=True)
        self._model = model
        self._buckets = DeviceBuckets(plan, self.census)
        self._closing = ExitStack()  # undoes what follows, the last of it first
        runtime.guests.append(self.remove)
        config, journal = runtime.config, runtime.journal
        if config.budget.get("device") is not None:
            accelerator.set_limit(plan.budget_nbytes)
            self._closing.callback(self._lift_limit)
        self.ferry = ferry = Ferry(
            accelerator, journal, buffers=_buffers(config), pinners=pinners_of(accelerator)
        )
        self._closing.callback(ferry.close)
        self.arriving = arriving = Lane("host→device", config.io_threads, journal)
        self.leaving = leaving = Lane("device→host", _LEAVING, journal)
        self.device_step: DeviceStep | None = None
        self._in_backward = config.step_in_backward
        for lane in (arriving, leaving):
            self._closing.callback(lane.close)
        self.arena = accelerator.step_arena() if config.device_arena else None
        self._arena_told, self._journal = False, journal
        if self.arena is not None:
            self._closing.callback(self.arena.close)
        self.weights = DeviceWeights(host, ferry, arriving, plan.window_nbytes)
        self.weights.learn_order([name for info in self.census.modules for name in info.weights])
        names = {parameter: weight.name for parameter, weight in by_parameter.items()}
        self.gradients = DeviceGradients(
            gradients, ferry, leaving, journal, names, self.weights.touch, plan.gradients_nbytes
        )
        self._closing.callback(self.gradients.stop)
        for parameter in names:
            self.gradients.watch(parameter)
        pinned = SwapHomes(
            accelerator, journal, self._closing, workers=config.io_threads, ferry=ferry
        )
        pinned.open(host_plan.activations_nbytes, {}, None)
        self._in_flight_nbytes = min(
            in_flight_by_default(accelerator), plan.activations_nbytes // 3
        )
        self.activations = ActivationCache(
            [*pinned.homes, *homes],
            journal,
            limit_nbytes=plan.activations_nbytes - self._in_flight_nbytes,
            in_flight_nbytes=self._in_flight_nbytes,
            min_nbytes=config.min_swap_nbytes,
            place=pinned.place,
        )
        self._closing.callback(accelerator.synchronize)
        self._closing.callback(self._move_buffers, self.to_host)
        self._move_buffers(self.to_device)
        stay(model, self.device, partial(self._move_buffers, self.to_device))
        self._closing.callback(move_freely, model)
        self.activations.fixed.know_model(model)
        self.saved = SavedWeights(self.weights, self.activations, self.gradients.lock)
        self.stand_ins = StandIns(model, self.weights, self.gradients, names, self.device)
        blocks_of = partial(CopiedWeights, copies=self.weights, names=names)
        self.tokenwise = rebuild_rows(model, self.activations, config, blocks_of)
        if self.tokenwise is not None:
            self.saved.others, self.tokenwise.hooks = self.tokenwise, self.saved
            self.stand_ins.aside = self.tokenwise.aside
            self._closing.callback(self.tokenwise.remove)
        self._closing.callback(self._show_parameters)

    # What the hooks call.

    def aside(self) -> AbstractContextManager[object]:
        """Around what is done between the model's operations."""
        return self.stand_ins.aside()

    def begin_pass(self, form: Form) -> None:
        """The outermost module is called with a batch of ``form``: its bucket's plan holds now."""
        self.gradients.drain()
        self.weights.begin_pass()
        self._use(self._buckets.plan_for(form))

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, outermost: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A module is called; its inputs on the device, if they have to be moved there."""
        self.stand_ins.active = True
        if self.arena is not None and outermost and torch.is_grad_enabled():
            self.arena.begin(_form_of((args, kwargs)))
        if isinstance(module, nn.RNNBase):
            _show_flat_weights(module, partial(getattr, module))
        if not outermost or all(map(self._is_near, tree_leaves((args, kwargs)))):
            return None
        moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
            torch.Tensor, self.to_device, (args, kwargs)
        )
        return moved

    def leave(self, module: nn.Module, *, outermost: bool) -> None:
        """The call of a module has ended, well or not."""
        if outermost:
            self.stand_ins.active = False
            self.weights.end_pass()
        if isinstance(module, nn.RNNBase):
            _show_flat_weights(module, module._parameters.get)

    def before_step(self) -> None:
        """The step is going to write to weights."""
        if self.arena is not None:
            self.arena.end()
        self.gradients.drain()
        self.weights.before_step()
        if self.device_step is not None and not self._in_backward:
            self._make_room(self.device_step)

    def _make_room(self, step: DeviceStep) -> None:
        """Have room for tiles that are stepped, if need be by copies of frozen weights."""
        least, tile = step.size.temporaries_nbytes, step.size.tile_nbytes
        if self._free_nbytes() < least + TILES * tile:
            self.weights.evict_streaming()
        step.limit_nbytes = max(tile, min(TILES * tile, self._free_nbytes() - least))

    def _free_nbytes(self) -> int:
        return self.plan.budget_nbytes - self.accelerator.held_nbytes()

    def finish_step(self) -> None:
        """A step has ended: its peak tells what more weights the device has room for."""
        if self.plan.budget_nbytes < _UNLIMITED:
            self._use(self._buckets.tell(self.accelerator.peak_nbytes()))
        if self.arena is not None and not self._arena_told:
            verdict = self.arena.stats().verdict()
            if verdict is not None:
                self._arena_told = True
                self._journal.notice("device arena", verdict)

    def _use(self, plan: DevicePlan | None) -> None:
        if plan is None or plan == self.plan:
            return
        self.plan = plan
        self.weights.resize(plan.window_nbytes)
        limit_nbytes = plan.activations_nbytes - self._in_flight_nbytes
        borrowed_nbytes = self.tokenwise.held_nbytes if self.tokenwise is not None else 0
        self.activations.limit_nbytes = limit_nbytes - borrowed_nbytes

    def _is_near(self, value: Any) -> bool:
        """Whether ``value`` needs not be moved."""
        return not isinstance(value, torch.Tensor) or self._stays(value)

    def _stays(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_cpu or tensor.numel() == 0 or self.accelerator.owns(tensor)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device: itself if it is there, or is on another one."""
        if self._stays(tensor):
            return tensor
        if self.device.type != "cpu":
            return tensor.to(self.device)
        # A device whose tensors torch takes for the CPU's.
        values = tensor.detach().clone(memory_format=torch.contiguous_format)
        memory = self.accelerator.allocate(values.nbytes)
        self.accelerator.current_stream().wait(memory.ready)
        placed = memory.view(0, values.dtype, values.shape)
        self.accelerator.launch(partial(_move_bytes, placed, values))
        return placed

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of ``tensor`` in host memory."""
        if not self.accelerator.owns(tensor):
            return tensor
        self.accelerator.synchronize()
        return tensor.detach().to("cpu", copy=True)

    def _move_buffers(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        moved: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    if buffer not in moved:
                        moved[buffer] = move(buffer)
                    module._buffers[name] = moved[buffer]

    # The end.

    def remove(self, *, whole: bool = False) -> None:
        """Take everything off the model, whose parameters and buffers are in host memory then.

        Safe to call twice.

        Args:
            whole: gradients on their way arrive, and what kernels wrote to copies is kept.
        """
        closing, self._closing = self._closing, ExitStack()
        with closing:
            if whole:
                self.gradients.drain()
                self.weights.close()

    def _show_parameters(self) -> None:
        self.stand_ins.remove()
        for module in self._model.modules():
            if isinstance(module, nn.RNNBase):
                _show_flat_weights(module, module._parameters.get)

    def _lift_limit(self) -> None:
        total = self.accelerator.total_nbytes()
        if total is not None:
            self.accelerator.set_limit(total)


def _form_of(inputs: object) -> Hashable:
    """What steps that allocate the same have in common: shapes and types of their first inputs."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype)
        for leaf in tree_leaves(inputs)
        if isinstance(leaf, torch.Tensor)
    )


def _move_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Past torch, which would count it as a change of a tensor that is used already."""
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


def _show_flat_weights(module: nn.RNNBase, look_up: Callable[[str, None], Any]) -> None:
    """An RNN keeps a list of its parameters, which nobody looks up."""
    module._flat_weights = [look_up(name, None) for name in module._flat_weights_names]
