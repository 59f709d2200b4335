"""Gradients leave a device as backward produces them, and accumulate in host memory.

[Note: as autograd accumulates] A gradient that has been summed up on the device (``stand_ins``
[Note: one sum]) is on its way to the host while backward goes on, and autograd is told that there
is none. When it has arrived, what autograd's own accumulation would have done is done here: it
becomes ``p.grad``, or is added to it, by the processor: a sum of two IEEE numbers has the same bits
on any machine. Then it goes on as any gradient of host memory does (``gradients``). All have
arrived before backward gives control to the user's code.

A first gradient is put into ``p.grad`` as it leaves, before its bytes are there: if backward fails
and the user's code drops the gradients, that is seen. Where somebody else must be told of the
gradient before (hooks on the parameter, ``torch.autograd.grad``, ``create_graph``) backward waits
for the bytes, and autograd goes on with a tensor in host memory by itself. So it does with a part
of a gradient that never was on the device (a penalty on ``p`` itself): what is on its way is
accumulated before that.

[Note: two threads] On CUDA autograd computes on a thread of its own, while accumulations of
tensors in host memory happen on the thread that called ``backward``. Whatever may run on both takes
``lock``.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.swap.ferry import Cargo, Ferry, bytes_of, copy_to
from offload.swap.gradients import MIN_NBYTES, GradientSwapper
from offload.tiers import hostmem
from offload.tiers.accelerator import DeviceMemory
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Lane, Transfer
from offload.tiers.memory import tensor_at


@dataclass(slots=True, eq=False)
class _Arriving:
    """A gradient on its way to the host.

    Attributes:
        cargo: what is on the device.
        host: where it arrives.
        first: whether it is ``p.grad`` itself, rather than added to that.
    """

    parameter: nn.Parameter
    cargo: Cargo
    host: torch.Tensor
    first: bool
    transfer: Transfer


class DeviceGradients:
    """Brings gradients home; called in backward. See the module.

    Args:
        lane: on which they travel.
        names: of the weights behind parameters.
        touch: told that backward has finished with a weight.
        limit_nbytes: bytes of gradients that may be on their way (back-pressure).

    Attributes:
        lock: see [Note: two threads].
    """

    def __init__(
        self,
        gradients: GradientSwapper,
        ferry: Ferry,
        lane: Lane,
        journal: Journal,
        names: dict[nn.Parameter, str],
        touch: Callable[[str], None],
        limit_nbytes: int,
    ) -> None:
        self.lock = threading.RLock()
        self.limit_nbytes = limit_nbytes
        self._gradients = gradients
        self._ferry = ferry
        self._accelerator = ferry.accelerator
        self._lane = lane
        self._journal = journal
        self._names = names
        self._touch = touch
        self._arriving: deque[_Arriving] = deque()
        self._hooks: list[RemovableHandle] = []
        self._task = -1  # of autograd, whose gradients are arriving
        self._without: set[torch.Tensor] = set()  # autograd had nothing to accumulate for them
        gradients.guard, gradients.before_end = self.lock, self.drain
        gradients.is_arriving = self._comes_from_here

    def watch(self, parameter: nn.Parameter) -> None:
        """Take charge of the gradients of ``parameter`` from now on."""
        if parameter.requires_grad:
            self._hooks.append(parameter.register_hook(partial(self._meet, parameter)))

    def _meet(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        """Autograd accumulates by itself, unless there is nothing."""
        if gradient is None:
            self._without.add(parameter)
            return
        self._without.discard(parameter)
        if self._is_arriving(parameter):
            self.drain()

    def _comes_from_here(self, parameter: torch.Tensor) -> bool:
        """Whether autograd has told of a gradient that arrives here, or has already."""
        return parameter in self._without or self._is_arriving(parameter)

    def _is_arriving(self, parameter: torch.Tensor) -> bool:
        with self.lock:
            return any(one.parameter is parameter for one in self._arriving)

    def stop(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def send(
        self, parameter: nn.Parameter, gradient: torch.Tensor, node: Any
    ) -> torch.Tensor | None:
        """Backward has the whole ``gradient`` of ``parameter`` on the device.

        Args:
            node: of autograd, which accumulates into the parameter.

        Returns:
            What autograd goes on with: the gradient in host memory, or None.
        """
        with self.lock:
            self._touch(self._names[parameter])
            if torch.is_grad_enabled():  # create_graph: it is part of a graph itself
                return gradient.to("cpu", copy=True)
            try:
                wanted = torch._C._will_engine_execute_node(node)
            except RuntimeError:  # torch.autograd.grad: it is returned, not accumulated
                return self._hosted(gradient)
            if not wanted:
                return None
            if self._is_watched(parameter) or not _is_plain(gradient):
                return self._hosted(gradient)
            self._begin()
            self._send(parameter, gradient)
            return None

    def _begin(self) -> None:
        self._gradients.watch_backward()
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self.drain()  # of a backward that failed: the user's code has had its say
            self._task = task

    def _is_watched(self, parameter: nn.Parameter) -> bool:
        """Whether somebody else must be told of the gradient."""
        before: Any = parameter._backward_hooks
        if before is not None and len(before) > 1:
            return True
        hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)
        return hooks is not None and len(hooks) > self._gradients.watches(parameter)

    def _send(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().contiguous()
        host = _fresh(gradient)
        label = Label(self._names[parameter], "gradient", self._accelerator.name, "host")
        cargo = self._cargo(gradient)
        transfer = self._lane.submit(self._jobs(cargo, host), label, host.nbytes, owner=host)
        first = parameter.grad is None
        if first:
            parameter.grad = host
        self._arriving.append(_Arriving(parameter, cargo, host, first, transfer))
        del gradient
        self.poll()
        while self._arriving and (
            self._arriving_nbytes() > self.limit_nbytes or self._gradients.governor.room() < 0
        ):
            self._await_oldest()

    def _cargo(self, gradient: torch.Tensor) -> Cargo:
        start = gradient.storage_offset() * gradient.element_size()
        held = bytes_of(gradient.untyped_storage())[start : start + gradient.nbytes]
        ready = self._accelerator.current_stream().record()
        return Cargo(DeviceMemory(tensor=held, ready=ready))

    def _jobs(self, cargo: Cargo, host: torch.Tensor) -> list[Job]:
        return self._ferry.jobs_out(cargo, host.nbytes, partial(copy_to, host.data_ptr()))

    def _hosted(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient in host memory, now."""
        if not _is_plain(gradient):
            return gradient.to("cpu", copy=True)
        gradient = gradient.detach().contiguous()
        host = _fresh(gradient)
        for job in self._jobs(self._cargo(gradient), host):
            job()
        return host

    def _arriving_nbytes(self) -> int:
        return sum(one.host.nbytes for one in self._arriving)

    def poll(self) -> None:
        """Accumulate what has arrived; never blocks.

        Raises:
            TierIOError: a copy failed.
        """
        with self.lock:
            while self._arriving and self._arriving[0].transfer.done():
                self._arrive(self._arriving.popleft())

    def drain(self) -> None:
        """Accumulate all that is on its way.

        Raises:
            TierIOError: a copy failed.
        """
        with self.lock:
            while self._arriving:
                self._await_oldest()

    def _await_oldest(self) -> None:
        oldest = self._arriving[0]
        if not oldest.transfer.done():
            name = self._names[oldest.parameter]
            with self._journal.stall(name, "gradient", self._lane.name, "full"):
                oldest.transfer.settle()
        self.poll()

    def _arrive(self, one: _Arriving) -> None:
        """See [Note: as autograd accumulates]."""
        one.transfer.settle()
        one.cargo.let_go()
        parameter, present = one.parameter, one.parameter.grad
        is_grad = present is not None and present.data_ptr() == one.host.data_ptr()
        if one.transfer.error is not None and is_grad:
            parameter.grad = None  # its bytes never came
        one.transfer.wait()
        if present is None:
            return  # the user's code dropped it: backward had failed
        if not one.first:
            with torch.no_grad():
                if present.layout is torch.strided:
                    present.add_(one.host)
                else:
                    parameter.grad = one.host + present
        elif not is_grad:
            return
        self._gradients.arrived(parameter)


def _is_plain(gradient: torch.Tensor) -> bool:
    """Whether the bytes of ``gradient`` are all that there is of it."""
    return (
        type(gradient) is torch.Tensor
        and gradient.layout is torch.strided
        and not gradient.is_conj()
        and not gradient.is_neg()
    )


def _fresh(like: torch.Tensor) -> torch.Tensor:
    """Host memory for the bytes of ``like``: whole pages, if there are many, for direct writes."""
    if like.nbytes < MIN_NBYTES:
        return torch.empty(like.shape, dtype=like.dtype)
    address = hostmem.map_anonymous(like.nbytes)
    mapped = address, hostmem.page_ceil(like.nbytes)
    return tensor_at(address, like.dtype, like.shape, on_release=mapped)
