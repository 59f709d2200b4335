"""Two buffers that take turns: one block is rebuilt into one while the other is being used.

[Note: who still holds a buffer] Autograd gets views of a buffer, and so may whoever keeps a saved
tensor (``retain_graph``, ``grad_fn._saved_self``, a gradient that is a view). Before a buffer is
used again the holders of its storage are counted. If there are others than the buffer itself, it
is left to them, and a new one takes its place.
"""

import torch

from offload.tiers.accelerator import Accelerator

_ALIGN_NBYTES = 64


def fresh(nbytes: int, device: torch.device, accelerator: Accelerator | None) -> torch.Tensor:
    """Memory of ``accelerator``, if there is one, for kernels of the current stream: 1-D, bytes."""
    if accelerator is None:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    memory = accelerator.allocate(nbytes)
    accelerator.current_stream().wait(memory.ready)
    alias = torch.empty(0, dtype=torch.uint8, device=memory.tensor.device)  # a view has a base
    return alias.set_(memory.tensor.untyped_storage(), 0, (nbytes,), (1,))


class RoundingBuffers:
    """Hands out two flat buffers, each as large as the largest part so far.

    Args:
        accelerator: whose memory they are; by default torch's.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self._flat: list[torch.Tensor | None] = [None, None]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(flat.nbytes for flat in self._flat if flat is not None)

    def take(self, turn: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """Buffer 0 or 1, with at least ``nbytes``; nobody else holds a part of it."""
        flat = self._flat[turn]
        if flat is None or flat.nbytes < nbytes or flat.device != device or _held(flat):
            self._flat[turn] = flat = None
            flat = fresh(nbytes, device, self._accelerator)
            self._flat[turn] = flat
        return flat

    def give_back(self) -> None:
        """Free both; who holds a view keeps its bytes."""
        self._flat = [None, None]


def layout(sizes: list[int]) -> tuple[list[int], int]:
    """Offsets of storages of these sizes in one buffer, and the size of all."""
    offsets: list[int] = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGN_NBYTES) * _ALIGN_NBYTES
    return offsets, end


def _held(flat: torch.Tensor) -> bool:
    """Whether others hold a part of it: [Note: who still holds a buffer]."""
    storage = flat.untyped_storage()
    # The tensor's own reference and that of the Python object just made.
    return torch._C._storage_Use_Count(storage._cdata) > 2
