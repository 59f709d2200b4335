"""What a model computes with on a device in the place of its parameters.

[Note: stand-ins] A parameter stays the tensor in host memory that it is, for ever: autograd ties
a parameter's accumulator to one device, and forgets it if ``.data`` moves to another while a graph
lives (``VariableHooks::set_data``), which would split the gradient of a weight that is used twice.
So while a model computes, looking a parameter up in its module gives a *stand-in*: a tensor on the
device over the present copy of the weight, connected in autograd's graph with the parameter. The
look-up is that of ``Module.__getattr__`` in ``_parameters``, so it does not matter whose code
asks: a tied head that reads the embedding's weight, a list of parameters, a custom ``Function``.
Walking over parameters (``parameters()``, ``state_dict``, an optimizer) never looks up, and finds
themselves.

[Note: one sum] For each parameter there is one ``_Send`` node while any graph with it lives, just
as there is one accumulator of a parameter on the device. Each look-up makes an ``_Attach`` node
before it, whose result is on the device; autograd sums their gradients up there, in its own order,
before ``_Send`` sends the sum home. So sums have the bits, and hooks see the gradients, that they
have with the parameter on the device. The graph holds nodes only: what it saves of a stand-in is
packed as the name of its weight and a layout (``SavedWeights``), and the copy may go.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.swap.device_gradients import DeviceGradients
from offload.swap.device_weights import DeviceWeights
from offload.swap.kinds import PLAIN_TYPES
from offload.swap.selective import SavedTensors

_Sender = Callable[[nn.Parameter, torch.Tensor, Any], torch.Tensor | None]


# Autograd runs what is ready in the order of this number, accumulators first of all. A node that
# was made in an earlier pass would otherwise come after all that was made in this one.
_AT_ONCE = 2**64 - 1


class _Send(torch.autograd.Function):
    """From a parameter to a tensor of its shape on the device, of no bytes to speak of."""

    @staticmethod
    def forward(
        ctx: Any, parameter: nn.Parameter, device: torch.device, send: _Sender
    ) -> torch.Tensor:
        ctx.parameter, ctx.send = parameter, send
        ctx.set_materialize_grads(False)
        return torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None
        ((node, _), *_others) = ctx.next_functions
        return ctx.send(ctx.parameter, gradient, node), None, None


class _Attach(torch.autograd.Function):
    """The copy of a weight, connected with its parameter."""

    @staticmethod
    def forward(ctx: Any, root: torch.Tensor, copy: torch.Tensor, token: object) -> torch.Tensor:
        del root
        ctx.token = token  # tells whether a graph lives
        ctx.set_materialize_grads(False)
        return copy.detach()

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor | None) -> Any:
        (gradient,) = gradients
        return gradient, None, None


class _Token:
    """Lives as long as a graph that uses one parameter."""

    __slots__ = ("__weakref__",)


class StandIns:
    """Gives out stand-ins while ``active``. See [Note: stand-ins].

    Args:
        names: of the weights behind parameters.

    Attributes:
        active: whether the model computes; to be set around its calls.
        aside: around a look-up, which is no operation of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: DeviceWeights,
        gradients: DeviceGradients,
        names: Mapping[nn.Parameter, str],
        device: torch.device,
    ) -> None:
        self.active = False
        self.aside: Callable[[], AbstractContextManager[object]] = nullcontext
        self._model = model
        self._weights = weights
        self._gradients = gradients
        self._names = names
        self._device = device
        self._roots: dict[nn.Parameter, tuple[torch.Tensor, weakref.ref[_Token]]] = {}
        for module in model.modules():
            if module._parameters:
                module._parameters = _Parameters(module._parameters, self)

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The stand-in of ``parameter``, for kernels of the current stream.

        Raises:
            TierIOError: its weight could not be read.
            CapacityError: the device has no room for it.
        """
        with self.aside():
            return self._of(parameter)

    def _of(self, parameter: nn.Parameter) -> torch.Tensor:
        name = self._names.get(parameter)
        if name is None:  # of no bytes, or put there by somebody else
            return parameter if parameter.numel() else parameter.to(self._device)
        copy = self._weights.require(name)
        if not parameter.requires_grad:
            return copy
        if not torch.is_grad_enabled():
            if torch.is_autocast_enabled(copy.device.type):
                copy = copy.view_as(copy)  # of no view it would keep a cast copy to its own end
            return copy.requires_grad_()  # there are kernels that choose by it
        root, token = self._root(parameter)
        attached: torch.Tensor = _Attach.apply(root, copy, token)  # type: ignore[no-untyped-call]
        return attached

    def _root(self, parameter: nn.Parameter) -> tuple[torch.Tensor, _Token]:
        """The output of the ``_Send`` of ``parameter``. See [Note: one sum]."""
        known = self._roots.get(parameter)
        if known is not None and (token := known[1]()) is not None:
            return known[0], token
        token = _Token()
        send = self._gradients.send
        root: torch.Tensor = _Send.apply(parameter, self._device, send)  # type: ignore[no-untyped-call]
        node: Any = root.grad_fn
        if hasattr(node, "_set_sequence_nr"):  # private: may go; sums are then sent home late
            node._set_sequence_nr(_AT_ONCE)
        self._roots[parameter] = root, weakref.ref(token)
        return root, token

    def remove(self) -> None:
        """Modules have their parameters again, and nothing else."""
        self.active = False
        self._roots.clear()
        for module in self._model.modules():
            if isinstance(module._parameters, _Parameters):
                module._parameters = dict(module._parameters)


class _Parameters(dict[str, nn.Parameter | None]):
    """The parameters of one module; looked up while it computes, they give stand-ins."""

    __slots__ = ("_stand_ins",)

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], stand_ins: StandIns) -> None:
        super().__init__(parameters)
        self._stand_ins = stand_ins

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is None or not self._stand_ins.active:
            return parameter
        return self._stand_ins.of(parameter)

    def __reduce_ex__(self, protocol: object) -> Any:
        return dict, (dict(self.items()),)  # a copy of the model is a plain one


@dataclass(frozen=True, slots=True)
class _SavedWeight:
    """A saved view of a stand-in, without its bytes."""

    name: str
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    conjugate: bool
    negative: bool
    state: tuple[int, int]


class SavedWeights:
    """Saved-tensor hooks: what is saved of stand-ins is fetched again in backward.

    Attributes:
        others: takes what else is saved.

    Args:
        lock: see ``device_gradients`` [Note: two threads].
    """

    def __init__(
        self, weights: DeviceWeights, others: SavedTensors, lock: AbstractContextManager[Any]
    ) -> None:
        self._weights = weights
        self.others = others
        self._lock = lock

    def pack(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for each tensor that it saves."""
        with self._lock:
            return self._pack(tensor)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
            return self.others.pack(tensor)
        name = self._weights.name_of(tensor.untyped_storage())
        if name is None:
            return self.others.pack(tensor)
        return _SavedWeight(
            name,
            tensor.dtype,
            int(tensor.storage_offset()),
            tensor.size(),
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
            self._weights.state_of(name),
        )

    def unpack(self, packed: Any) -> torch.Tensor:
        """Called by autograd when backward needs a saved tensor.

        Raises:
            RuntimeError: the weight was modified in place since it was saved.
            StepInterruptedError: this backward has stepped it, and its copy has left.
            TierIOError: its bytes could not be read.
        """
        with self._lock:
            return self._unpack(packed)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if type(packed) is not _SavedWeight:
            return self.others.unpack(packed)
        self._weights.check_state(packed.name, packed.state)
        copy = self._weights.require(packed.name)
        view = torch.empty(0, dtype=packed.dtype, device=copy.device)
        view.set_(copy.untyped_storage(), packed.offset, packed.size, packed.stride)
        view = torch._conj(view) if packed.conjugate else view
        return torch._neg_view(view) if packed.negative else view
