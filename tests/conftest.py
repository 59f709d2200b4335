"""What all tests share: no deadline on a busy machine, no hub, no settings of the developer."""

import dataclasses
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.tiers.machine import Machine

# Whoever starts the tests in the background has it ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The profile that hypothesis chose stays the base: with CI set it is the reproducible one.
settings.register_profile("offload", settings(), deadline=None)
settings.load_profile("offload")

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and fork do not go together
for name in [name for name in os.environ if name.startswith("OFFLOAD_")]:
    if not name.startswith("OFFLOAD_PEER_"):  # no setting: where tests/peers finds a checkout
        del os.environ[name]

# Read when torch is imported, here and in children. Workers of pytest-xdist stand beside each
# other, one for a processor: threads that wait must leave it to the neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """What was imported by now is no garbage, and collections in tests need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test with the marker ``own_process`` runs in one, unless it is to be debugged."""
    if pyfuncitem.get_closest_marker("own_process") is None or pyfuncitem.config.option.usepdb:
        return None
    from forked import Alone, run_alone

    if any(isinstance(plugin, Alone) for plugin in pyfuncitem.config.pluginmanager.get_plugins()):
        return None  # this is it
    run_alone(pyfuncitem)
    return True


@pytest.fixture(scope="module")
def several_threads() -> Iterator[None]:
    """Torch computes with several threads, here and in children: they may change no bit."""
    import torch

    threads, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(max(2, threads))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    yield
    torch.set_num_threads(threads)
    del os.environ["OMP_NUM_THREADS"]
    if setting is not None:
        os.environ["OMP_NUM_THREADS"] = setting


@pytest.fixture
def made_up() -> "Callable[[Path, float], Machine]":
    """This machine and the drive of a directory, all of whose links have a given rate."""
    from offload.planner.machines import library_machine
    from offload.tiers.inventory import file_tier_name, take_inventory
    from offload.tiers.machine import Link

    def make(directory: Path, bytes_per_s: float) -> "Machine":
        name = file_tier_name(directory)
        links = tuple(
            Link(
                source=source, target=target, block_nbytes=1 << 20, in_flight=4, repeats=3,
                bytes_per_s=bytes_per_s, low_bytes_per_s=bytes_per_s / 2,
                high_bytes_per_s=bytes_per_s * 2, latency_s=1e-4,
            )
            for source, target in (("host", "host"), ("host", name), (name, "host"), (name, name))
        )  # fmt: skip
        compute = library_machine("laptop-16gb").compute
        return dataclasses.replace(take_inventory([directory]), links=links, compute=compute)

    return make
