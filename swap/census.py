"""What a model needs bytes for: its weights, by tensor and by the module that uses them.

Weights are counted once per storage, so tied weights are one entry with several users.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# A lookup touches a few rows: pages fault in by themselves far cheaper than a fetch of the table.
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
# Never called: other modules use the weights that these hold.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightInfo:
    """One weight: ``name`` is the first name its model has for it."""

    name: str
    nbytes: int
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInfo:
    """The weights that one module uses whole while it computes."""

    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Weights and their users, in the model's own order.

    Attributes:
        lookups: weights of which no module reads more than some rows.
        by_rows: those of them whose gradient is made of these rows alone (``row_gradients``).
    """

    weights: tuple[WeightInfo, ...]
    modules: tuple[ModuleInfo, ...]
    lookups: frozenset[str] = frozenset()
    by_rows: frozenset[str] = frozenset()

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights)

    def module_nbytes(self) -> dict[str, int]:
        """Bytes that each module needs at once in backward: its weights and their gradients.

        A table that is only looked up in needs none for itself. Its gradient, if that is made
        whole, counts under the table's name.
        """
        sizes = {weight.name: weight.nbytes * (1 + weight.trainable) for weight in self.weights}
        modules = {info.name: sum(sizes[name] for name in info.weights) for info in self.modules}
        tables = {
            weight.name: weight.nbytes
            for weight in self.weights
            if weight.trainable and weight.name in self.lookups - self.by_rows
        }
        return modules | tables

    def working_set_nbytes(self) -> int:
        """The largest bytes that one module needs at once: its weights and their gradients.

        In backward the module's weights, the gradient of each trainable one, and nothing else
        of the weight and gradient classes must be in memory at the same time.
        """
        return max(self.module_nbytes().values(), default=0)


def unmovable_reason(parameter: nn.Parameter, *, on_device: bool = False) -> str | None:
    """Why Offload can't give ``parameter`` a home of its own, or None if it can.

    Args:
        on_device: it may be on the device that the model computes on.
    """
    if type(parameter.data) is not torch.Tensor or parameter.layout is not torch.strided:
        return f"is a {type(parameter.data).__name__} with layout {parameter.layout}"
    if parameter.is_meta:
        return "is on the meta device: load or initialise it first"
    if parameter.device.type != "cpu" and not on_device:
        return f"is on {parameter.device}"
    if not parameter.is_contiguous():
        return "is not contiguous: call model.to(memory_format=torch.contiguous_format) first"
    return None


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind ``tensor`` while it lives."""
    return int(tensor.untyped_storage()._cdata)


def _weight_key(parameter: nn.Parameter) -> object:
    """Equal for parameters over the same bytes; parts of one storage are weights of their own."""
    if parameter.numel() == 0:
        return id(parameter)
    if parameter.is_meta or hasattr(parameter, "fake_mode"):  # no bytes, so no address
        return storage_key(parameter), parameter.storage_offset(), parameter.shape
    return parameter.data_ptr(), parameter.shape


def named_weights(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """(first name, parameters that share its bytes) for each distinct weight of ``model``."""
    by_storage: dict[object, tuple[str, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_storage.setdefault(_weight_key(parameter), (name, []))[1].append(parameter)
    yield from by_storage.values()


def weight_forms(model: nn.Module) -> dict[str, str]:
    """Of each distinct weight, by its first name, such as ``float32 [500, 300]``."""
    return {
        name: f"{str(parameters[0].dtype).removeprefix('torch.')} {list(parameters[0].shape)}"
        for name, parameters in named_weights(model)
    }


def uses_rows_only(module: nn.Module) -> bool:
    """Whether ``module`` reads a few rows of its weight rather than all of it."""
    return isinstance(module, _LOOKUPS) and getattr(module, "max_norm", None) is None


def tables_of(model: nn.Module) -> frozenset[str]:
    """The weights of which a module reads single rows, whether or not another uses all of it."""
    names = {one: name for name, parameters in named_weights(model) for one in parameters}
    return frozenset(
        names[parameter]
        for module in model.modules()
        if uses_rows_only(module)
        for parameter in module._parameters.values()
        if parameter is not None
    )


def gives_rows(module: nn.Module) -> bool:
    """Whether the gradient of a lookup can be made of the rows that it looked up alone.

    That of a lookup with a forward of its own, or of a bag, is whatever autograd makes of it.
    """
    return (
        uses_rows_only(module)
        and isinstance(module, nn.Embedding)
        and not module.sparse
        and type(module).forward is nn.Embedding.forward
        and "forward" not in vars(module)
        and getattr(module, "_compiled_call_impl", None) is None
    )


def take_census(
    model: nn.Module, *, whole_tables: bool = False, whole_gradients: bool = False
) -> Census:
    """The census of ``model``; runs nothing and allocates nothing.

    Args:
        whole_tables: lookup tables are used whole, as on a device, which faults no pages in.
        whole_gradients: gradients of lookups are made whole, as by compiled code.
    """
    names: dict[int, str] = {}
    weights: list[WeightInfo] = []
    for name, parameters in named_weights(model):
        names.update({id(parameter): name for parameter in parameters})
        weights.append(
            WeightInfo(
                name=name,
                nbytes=max(parameter.nbytes for parameter in parameters),
                trainable=any(parameter.requires_grad for parameter in parameters),
            )
        )
    modules = []
    looked_up: set[str] = set()
    whole: set[str] = set()  # gradients
    for module_name, module in model.named_modules():
        used = tuple(
            dict.fromkeys(
                names[id(parameter)]
                for parameter in module._parameters.values()
                if parameter is not None and parameter.numel()
            )
        )
        if uses_rows_only(module) and not whole_tables:
            looked_up.update(used)
            if whole_gradients or not gives_rows(module):
                whole.update(used)
        elif used and not isinstance(module, _CONTAINERS):
            modules.append(ModuleInfo(name=module_name, weights=used))
    lookups = looked_up - {name for info in modules for name in info.weights}
    return Census(
        weights=tuple(weights),
        modules=tuple(modules),
        lookups=frozenset(lookups),
        by_rows=frozenset(lookups - whole),
    )
