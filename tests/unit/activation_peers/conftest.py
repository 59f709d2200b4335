"""A swap of activations that lets everything leave at once."""

import gc

import pytest

from offload import ActivationSwap


@pytest.fixture
def swap(tmp_path):
    """All that is saved has left when the operation that saved it returns."""
    swap = ActivationSwap(limit=0, min_nbytes=0, in_flight=0, nvme=tmp_path)
    yield swap
    gc.collect()
    assert swap.cache.kept_nbytes == 0, "a handle leaks"
    swap.close()
