"""What all tests share: no deadline on a busy machine, no hub, no settings of the developer."""

import os
import signal

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
