"""Storages that are never moved: parameters, buffers, and whatever is a view of one."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.swap.kinds import PLAIN_TYPES, is_wrapper, plain_tensors

_STRIDED = torch.strided


class FixedStorages:
    """Storages by the address of their control block, looked up anew for each pass.

    Attributes:
        names: of the weight behind each; empty where nobody has to be told of its use.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._weights: Mapping[int, str] = {}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._hooks: list[RemovableHandle] = []

    def know_weights(self, names: Mapping[int, str]) -> None:
        """Name the weight behind each storage (by ``census.storage_key``)."""
        self._weights = names
        self.look_up()

    def know_model(self, model: torch.nn.Module) -> None:
        """Know the parameters and buffers of ``model``, whatever they are in each pass."""
        self._model = weakref.ref(model)
        self.look_up()
        for module in model.modules():
            if any(is_wrapper(parameter) for parameter in module.parameters(recurse=False)):
                # Sharded: what it computes with is gathered just before, by a hook before this one.
                self._hooks.append(module.register_forward_pre_hook(self._know_gathered))

    def _know_gathered(self, module: torch.nn.Module, _args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            self.know_tensor(parameter)

    def know_tensor(self, tensor: torch.Tensor) -> None:
        """Know ``tensor`` in this pass, and any view of it."""
        for plain in plain_tensors(tensor):
            self.names.setdefault(plain.untyped_storage()._cdata, "")

    def look_up(self) -> None:
        """A pass begins."""
        names = self.names
        names.clear()
        names.update(self._weights)
        model = self._model() if self._model is not None else None
        seen: set[torch.nn.Module] = set()
        found: list[torch.nn.Module | None] = [model]
        while found:  # torch's own walk makes the names of all tensors, too, which takes long
            module = found.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            found += module._modules.values()
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) in PLAIN_TYPES and tensor.layout is _STRIDED:
                    names.setdefault(tensor.untyped_storage()._cdata, "")
                else:
                    self.know_tensor(tensor)

    def weights_among(self, tensors: Iterable[torch.Tensor]) -> list[str]:
        """The names of the weights among ``tensors``."""
        names = (self._weights.get(one.untyped_storage()._cdata) for one in tensors)
        return [name for name in names if name is not None]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
