"""PyTorch's tests of saved-tensor hooks: our cache stands between autograd and their hooks.

It is PyTorch's file for the version that is installed that should pass. It needs
``pip install expecttest``.
"""

import re

import pytest
from peer_adapter import Change, adapted, cases_in, checkout_of, moved_in, names_of, run

pytestmark = pytest.mark.peers

FILE = "test/test_autograd.py"

HOOKS = r"torch\.autograd\.graph\.saved_tensors_hooks"
CHANGES = [
    Change(r"\nclass TestAutograd\(", r"\nimport peer_stand_ins\n\n\nclass TestAutograd("),
    Change(r"torch\.autograd\.graph\.save_on_cpu\(", "peer_stand_ins.save_on_cpu(", least=3),
    # Hooks that change nothing, and those that go to a disk, are what our context is.
    Change(HOOKS + r"\(\s*lambda x: x,\s*lambda x: x,?\s*\)", "peer_stand_ins.save_on_cpu()",
           least=8),
    Change(HOOKS + r"\(pack, unpack\)", "peer_stand_ins.save_on_cpu()"),
    # What others return goes through our cache.
    Change(HOOKS, "peer_stand_ins.SavedTensorsHooks", least=10),
]  # fmt: skip

# Names of some tests differ from release to release.
CHOSEN = [
    r"test_save_on_cpu_and_checkpoint",
    r"test_graph_save_on_cpu",
    r"test_saving_variable_to_disk",
    r"test_default_saved_(tensors|variable)_hooks_double_backward",
    r"test_saved_variable_packing_unpacking_saved_original_with_default_hooks",
    r"test_saved_variable_packing_unpacking_did_not_save_original_with_default_hooks",
    r"test_saved_tensor_hooks_custom_function_intermediates",
    r"test_saved?_tensors?_hook_version_counter_not_shared",
    r"test_unpack_hooks_exec_count",
    r"test_setting_default_saved_(tensors|variable)_hooks_twice_should_use_inner",
    r"test_saved_tensor_hooks_extra_exit_during_bw_no_crash",
    r"test_saved_tensor_hooks_extra_enter_during_bw_no_leak",
]
# In these nothing is saved, or an error comes before it could leave.
CHOSEN_SAVING_NOTHING = [
    r"test_setting_default_saved_(tensors|variable)_hooks_twice_should_not_fail",
    r"test_wrapped_number_saved_(tensors|variable)_hooks",
    r"test_disabling_saved_tensor_hooks",
    r"test_disabling_saved_tensor_hooks_nested",
]
CHOSEN_EITHER = [
    r"test_saved_tensor_hooks_custom_error_propaga+tion",
    r"test_pack_hook_with_inplace_modification_should_fail",
]
LEFT_OUT = {r"test_graph_save_on_cpu_(cuda|gpu)": "it measures the memory of a GPU"}


def matching(patterns, names):
    """The one name that each of ``patterns`` matches."""
    found = set()
    for pattern in patterns:
        matches = [name for name in names if re.fullmatch(pattern, name)]
        assert len(matches) == 1, f"the peer has changed: {pattern} matches the tests {matches}"
        found |= set(matches)
    return found


def test_pytorch(tmp_path):
    root = checkout_of("pytorch")
    text = (root / FILE).read_text()
    cases = cases_in(text, "TestAutograd")
    using = {name for name, source in cases.items()
             if re.search(HOOKS + r"|graph\.save_on_cpu", source)}  # fmt: skip
    chosen = matching([*CHOSEN, *CHOSEN_SAVING_NOTHING, *CHOSEN_EITHER], cases)
    unknown = using - chosen - matching(LEFT_OUT, cases)
    assert not unknown, f"the peer has changed: nothing is said about {sorted(unknown)}"
    filename = "test_pytorch_adapted.py"
    arguments = [f"{filename}::TestAutograd::{name}" for name in sorted(chosen)]
    done = run(tmp_path, filename, adapted(text, CHANGES), arguments, search=[root / "test"])
    assert names_of(done) == chosen
    assert (
        matching(CHOSEN, cases) <= moved_in(done) <= chosen - matching(CHOSEN_SAVING_NOTHING, cases)
    )
