"""What a scale on a device looks like to the host: copies of it that do not wait come late."""

from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda")


class OnDevice(torch.Tensor):
    """A tensor that torch takes for one of a CUDA device, with its ``value`` in host memory.

    Whoever copies it to the host without waiting gets NaN: the bytes are still to come.
    """

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=CUDA)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        target = torch.device(kwargs.get("device") or CUDA)
        late = target.type == "cpu" and kwargs.pop("non_blocking", False)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.value, (args, kwargs))
        result = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return result
        if target.type == "cpu":
            return torch.full_like(result, float("nan")) if late else result
        return tree_map_only(torch.Tensor, OnDevice, result)


class Cuda(TorchFunctionMode):
    """Inside, what torch makes on a CUDA device, or copies to it, is ``OnDevice``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func is torch.full and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.to and type(args[0]) is torch.Tensor:
            wanted = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(wanted, torch.device) and wanted.type == "cuda":
                return OnDevice(args[0].clone())
        return func(*args, **kwargs)


def give_scale(scaler: torch.amp.GradScaler) -> None:
    """Have ``scaler`` keep its scale on the device, as where the loss is there."""
    scaler._scale = OnDevice(torch.full((), scaler._init_scale))
    scaler._growth_tracker = OnDevice(torch.full((), 0, dtype=torch.int32))
