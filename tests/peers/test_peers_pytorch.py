"""PyTorch's tests of autograd, in two ways.

Its tests of saved-tensor hooks run with our cache between autograd and their hooks. And its whole
file runs inside of our context: all else that looks at saved tensors (checkpoints, selective ones,
in-place checks, ``_saved_*``, several threads) must not notice it.

It is PyTorch's file for the version that is installed that should pass. It needs
``pip install expecttest``.
"""

import re

import pytest
from peer_adapter import (
    Change,
    adapted,
    cases_in,
    checkout_of,
    moved_in,
    names_of,
    run,
    run_whole,
)

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
    r"test_node_post_hook_registered_during_unpack_hook",
]
# Of later releases only.
CHOSEN_IF_THERE = [r"test_saved_tensor_constructor_with_hooks"]
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
LEFT_OUT_IF_THERE = {
    r"test_get_data_and_hooks_from_raw_saved_variable": "it asks for the hooks themselves"
}
# What other classes have of hooks runs inside of our context only, with the whole file.


def matching(patterns, names, *, if_there=False):
    """The one name that each of ``patterns`` matches; or none, if that is allowed."""
    found = set()
    for pattern in patterns:
        matches = [name for name in names if re.fullmatch(pattern, name)]
        right = (0, 1) if if_there else (1,)
        assert len(matches) in right, f"the peer has changed: {pattern} matches {matches}"
        found |= set(matches)
    return found


def test_pytorch(tmp_path):
    root = checkout_of("pytorch")
    text = (root / FILE).read_text()
    cases = cases_in(text, "TestAutograd")
    using = {name for name, source in cases.items()
             if re.search(HOOKS + r"|graph\.save_on_cpu", source)}  # fmt: skip
    moving = matching(CHOSEN, cases) | matching(CHOSEN_IF_THERE, cases, if_there=True)
    chosen = moving | matching([*CHOSEN_SAVING_NOTHING, *CHOSEN_EITHER], cases)
    left_out = matching(LEFT_OUT, cases) | matching(LEFT_OUT_IF_THERE, cases, if_there=True)
    unknown = using - chosen - left_out
    assert not unknown, f"the peer has changed: nothing is said about {sorted(unknown)}"
    filename = "test_pytorch_adapted.py"
    arguments = [f"{filename}::TestAutograd::{name}" for name in sorted(chosen)]
    done = run(tmp_path, filename, adapted(text, CHANGES), arguments, search=[root / "test"])
    assert names_of(done) == chosen
    assert moving <= moved_in(done) <= chosen - matching(CHOSEN_SAVING_NOTHING, cases)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs the whole file, once, with something around each test."""
    root = checkout_of("pytorch")
    known = {}

    def outcomes(around):
        if around not in known:
            directory = tmp_path_factory.mktemp(around)
            known[around] = run_whole(directory, root / FILE, around, search=[root / "test"])
        return known[around]

    return outcomes


def that_are(outcome, cases):
    return {key for key, case in cases.items() if case.outcome == outcome}


@pytest.mark.parametrize("around", ["nothing", "hooks"])
def test_the_whole_file_runs(whole, around):
    """Each run has an item of its own: together they take minutes."""
    cases = whole(around)
    assert len(that_are("passed", cases)) > len(cases) / 2
    assert not that_are("error", cases)


def test_the_whole_file_runs_inside_of_our_context(whole):
    """Nothing fails there that passes without, unless it fails with any saved-tensor hooks."""
    bare, hooks, ours = whole("nothing"), whole("hooks"), whole("swap")
    assert ours.keys() == bare.keys()
    assert that_are("skipped", ours) == that_are("skipped", bare)
    allowed = that_are("passed", bare) - that_are("passed", hooks)
    broken = that_are("passed", bare) - that_are("passed", ours) - allowed
    notes = [f"{'::'.join(key)}: {ours[key].outcome}\n{ours[key].notes}" for key in sorted(broken)]
    assert not broken, "\n\n".join(notes)
    assert sum(case.moved_nbytes > 0 for case in ours.values()) > len(ours) / 4
