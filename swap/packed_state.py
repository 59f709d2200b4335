"""What ``optimizer.state`` shows of a state that the store has in 8 bits: its float32 values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map

from offload.allocator.errors import UnsupportedError
from offload.swap.eightbit import packed_nbytes, unpack


class PackedState(torch.Tensor):
    """Reads as a float32 tensor, which each operation makes anew; can't be written in place.

    Saved, copied or pickled it is an ordinary float32 tensor.

    Attributes:
        packed: 1-D uint8: ``eightbit`` pieces of ``chunk_numel`` elements, one behind the other.
        signed: its form (``eightbit``).
    """

    packed: torch.Tensor
    signed: bool
    chunk_numel: int

    @classmethod
    def over(
        cls, packed: torch.Tensor, shape: Sequence[int], chunk_numel: int, *, signed: bool
    ) -> Self:
        """The state of ``shape`` whose bytes are ``packed``."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        made.packed, made.signed, made.chunk_numel = packed, signed, chunk_numel
        return made

    def unpacked(self) -> torch.Tensor:
        """An ordinary tensor with its values."""
        values = torch.empty(self.shape)
        pieces = self.packed.split(packed_nbytes(self.chunk_numel))
        parts = values.view(-1).split(self.chunk_numel)
        for piece, part in zip(pieces, parts, strict=True):
            unpack(piece, part, signed=self.signed)
        return values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedState({self.unpacked()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unpacked().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.unpacked()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):  # type: ignore[attr-defined]
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, cls):
                raise UnsupportedError(
                    f"{func} would write to an optimizer state {tuple(value.shape)} that the store "
                    "keeps in 8 bits: put a float32 tensor in its place in optimizer.state instead"
                )
        args, kwargs = tree_map(lambda v: v.unpacked() if isinstance(v, cls) else v, (args, kwargs))
        return func(*args, **kwargs)
