"""Where gradients are in scratch, and how their mappings stand to the file.

A home is a mapping of a block of scratch, which is shared: what is written through ``p.grad`` is
in the file. While backward runs, homes whose norm is known are mapped privately (``known_norms``
[Note: a norm is of these bytes]).
"""

import ctypes
from collections.abc import Mapping

import torch
from torch import nn

from offload.swap.copying import storage_use_count, write_jobs
from offload.swap.governor import Governor
from offload.swap.known_norms import KnownNorms
from offload.tiers import hostmem
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job
from offload.tiers.mapped import MappedTensor
from offload.tiers.pieces import move_jobs


class GradientHomes:
    """The homes of gradients; used on the training thread only.

    Args:
        scratch: the volatile tier.
        governor: sheds the pages of gradients that the user's code reads.
        names: of the parameters, for errors and events.

    Attributes:
        homes: the present home of each parameter's gradient.
        norms: of the gradients there.
    """

    def __init__(
        self,
        scratch: FileTier,
        journal: Journal,
        governor: Governor,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.homes: dict[nn.Parameter, MappedTensor] = {}
        self.norms = KnownNorms(scratch.file)
        self._scratch = scratch
        self._journal = journal
        self._governor = governor
        self._names = names
        self._private: dict[MappedTensor, nn.Parameter] = {}  # mapped so while backward runs
        self._owners: dict[MappedTensor, int] = {}  # storage owners of an unshared home
        self._outlived: list[MappedTensor] = []  # homes of old gradients that the user keeps

    def __len__(self) -> int:
        """How many blocks of scratch are held."""
        return len(self.homes) + len(self._outlived)

    def of(self, parameter: nn.Parameter) -> MappedTensor | None:
        """The mapping behind ``parameter.grad``, or None if the gradient is ordinary memory."""
        home = self.homes.get(parameter)
        gradient = parameter.grad
        if home is None or gradient is None or gradient.data_ptr() != home.address:
            return None
        return home

    def take(self, parameter: nn.Parameter, dtype: torch.dtype) -> MappedTensor:
        """The place of the next gradient of ``parameter``; a new one if the user holds the old."""
        self._reclaim()
        home = self.homes.get(parameter)
        if home is not None and home.tensor.dtype == dtype and not self._is_kept(home):
            return home
        if home is not None:
            self._outlived.append(home)
        home = MappedTensor(self._scratch.file, dtype, parameter.shape, shared=True)
        home.file_as(self._scratch.allocate(home.nbytes))
        self._governor.watch(home)
        self.homes[parameter] = home
        self._owners[home] = storage_use_count(home.tensor)
        return home

    def clear(self, parameter: nn.Parameter, dtype: torch.dtype) -> MappedTensor:
        """As ``take``, all zeros: what is written there is the gradient.

        Raises:
            TierIOError: the disk could not take it.
        """
        home = self.take(parameter, dtype)
        assert home.block is not None
        self.share(home)
        self._scratch.clear(home.block)
        return home

    def _is_kept(self, home: MappedTensor) -> bool:
        """Whether the user holds a tensor over the bytes of ``home``."""
        return storage_use_count(home.tensor) > self._owners[home]

    def is_alone(self, home: MappedTensor) -> bool:
        """Whether nobody holds the bytes of ``home``, which is a gradient, beside ``p.grad``."""
        return storage_use_count(home.tensor) == self._owners[home] + 1

    def _reclaim(self) -> None:
        """Give back the room of old gradients that the user has let go of."""
        for home in [home for home in self._outlived if not self._is_kept(home)]:
            assert home.block is not None
            home.block.release()
            self._outlived.remove(home)
            del self._owners[home]

    def watch_writes(self, parameter: nn.Parameter, home: MappedTensor) -> None:
        """See ``known_norms`` [Note: a norm is of these bytes]."""
        home.map_again(shared=False)
        self._private[home] = parameter

    def share(self, home: MappedTensor) -> None:
        """Map a gradient as ever, and what was written to it meanwhile into scratch.

        Raises:
            TierIOError: a write failed; the gradient stays as it is.
        """
        if home not in self._private:
            return
        if home.written_while_filed():
            self.norms.forget(home)
            self._write_through(self._names[self._private[home]], home)
        home.map_again(shared=True)
        del self._private[home]

    def share_all(self) -> None:
        """Map all gradients as ever; raises as ``share`` does."""
        for home in list(self._private):
            self.share(home)

    def _write_through(self, name: str, home: MappedTensor) -> None:
        assert home.block is not None
        copy = home.tensor.clone()  # a write can't read from mappings of where it goes
        label = Label(name, "gradient", "host", self._scratch.spec.name)
        jobs = write_jobs(self._scratch.file, home.block, copy.data_ptr(), copy.nbytes)
        transfer = self._scratch.lanes.writes.submit(jobs, label, copy.nbytes, owner=copy)
        with self._journal.stall(name, "gradient", self._scratch.lanes.writes.name, "drain"):
            transfer.settle()
        transfer.wait()

    def read_jobs(self, home: MappedTensor, start: int, staged: torch.Tensor) -> list[Job]:
        """Jobs that fill ``staged`` (1-D) from element ``start`` of a gradient in scratch.

        From the page cache where the user's code has just brought it there (clipping does),
        else by a direct read.
        """
        assert home.block is not None
        offset, end = start * staged.element_size(), staged.data_ptr() + staged.nbytes
        shift = home.address - home.block.extent.offset  # from a place in the file to its mapping

        def fill(base: int, address: int, nbytes: int) -> None:
            if hostmem.is_cached(base + shift, nbytes):
                ctypes.memmove(address, base + shift, min(nbytes, end - address))
                hostmem.discard(base + shift, nbytes)
            else:
                self._scratch.file.read(base, address, nbytes)

        base, nbytes = home.block.extent.offset + offset, hostmem.page_ceil(staged.nbytes)
        return move_jobs(self._scratch.file, fill, base, staged.data_ptr(), nbytes)
