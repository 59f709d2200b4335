"""Kinds of tensors: which are nothing but bytes with a layout, and what the others are."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def why_unmovable(tensor: torch.Tensor, owns: Callable[[torch.Tensor], bool]) -> str:
    """In what ``tensor`` is more than some bytes of a place, with offset, size and stride."""
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    if not owns(tensor):
        return f"on {tensor.device}, which is another place"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    if tensor.is_inference():
        return "an inference tensor"
    return f"of the subclass {type(tensor).__name__}"


def is_wrapper(tensor: Any) -> bool:
    """Whether ``tensor`` is of a subclass that tells its inner tensors."""
    return bool(is_traceable_wrapper_subclass(tensor))


def flattened(wrapper: Any) -> tuple[list[str], object]:
    """The attributes that hold the inner tensors of ``wrapper``, and what else makes it."""
    names, context = wrapper.__tensor_flatten__()
    return names, context


def has_bytes(memory: torch.UntypedStorage) -> bool:
    """Whether there is memory behind ``memory``; a tensor of symbolic zeros has none."""
    try:
        return bool(memory.data_ptr())
    except RuntimeError:
        return False


def shape_of(tensor: torch.Tensor) -> str:
    """The shape, for messages."""
    if tensor.is_nested:
        return f"{tensor.size(0)} tensors"
    return "x".join(map(str, tensor.shape)) or "scalar"


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of its values, whatever its layout."""
    if tensor.layout is torch.strided:
        return tensor.nbytes
    return tensor.numel() * tensor.element_size()


def plain_tensors(tensor: Any) -> list[torch.Tensor]:
    """``tensor``, or the ordinary tensors that it wraps, down to the last wrapper."""
    if not isinstance(tensor, torch.Tensor):
        return []
    if not is_wrapper(tensor):
        return [tensor] if tensor.layout is torch.strided else []
    names, _ = flattened(tensor)
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]
