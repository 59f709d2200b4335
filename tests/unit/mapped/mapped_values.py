"""What the tests of mapped tensors share: values on disk, and tensors over them."""

import os

import torch

from offload.tiers.journal import Label
from offload.tiers.mapped import MappedTensor

LABEL = Label("w", "weight", "file", "host")
PATIENCE_S = 60


def numbered(shape, dtype=torch.float32, first=0):
    count = torch.Size(shape).numel()
    return (torch.arange(first, first + count) % 251).to(dtype).reshape(shape)


def on_disk(tier, block, nbytes):
    return os.pread(tier.file.fd, nbytes, block.extent.offset)


def stored(tier, values):
    """A block that holds ``values``, written around the tier."""
    block = tier.allocate(max(values.nbytes, 1))
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert os.pwrite(tier.file.fd, data, block.extent.offset) == len(data)
    return block


def filed(tier, values, *, shared=False):
    mapped = MappedTensor(tier.file, values.dtype, values.shape, shared=shared)
    mapped.file_as(stored(tier, values))
    return mapped


def fetch(tier, mapped, pool=None):
    tier.lanes.reads.submit(mapped.fetch_jobs(pool), LABEL, mapped.nbytes).wait()
    mapped.land()
