"""torchtune's tests of its activation offloading, on our context."""

import pytest
from peer_adapter import Change, adapted, cases_in, checkout_of, moved_in, names_of, run

pytestmark = pytest.mark.peers

FILE = "tests/torchtune/training/test_activation_offloading.py"

CHANGES = [
    Change(r"from tests\.test_utils import gpu_test", "from peer_stand_ins import gpu_test"),
    Change(r"from torchtune\.training import OffloadActivations",
           "from peer_stand_ins import OffloadActivations"),
    Change(r'"cuda"', '"cpu"', least=5),
    Change(r"torch\.cuda\._sleep\(\w+\)", "pass", least=2),  # delays a GPU
]  # fmt: skip


def test_torchtune(tmp_path):
    text = (checkout_of("torchtune") / FILE).read_text()
    cases = run(tmp_path, "test_torchtune_adapted.py", adapted(text, CHANGES), [])
    assert names_of(cases) == moved_in(cases) == set(cases_in(text))
    assert len(cases) >= 4
