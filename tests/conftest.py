"""What all tests share: no deadline on a busy machine, no hub, no settings of the developer."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

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
