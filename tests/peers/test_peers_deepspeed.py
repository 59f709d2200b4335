"""DeepSpeed's tests of its activation offloading, on our cache."""

import pytest
from peer_adapter import Change, adapted, cases_in, checkout_of, moved_in, names_of, run

pytestmark = pytest.mark.peers

FILE = "tests/unit/runtime/activation_checkpointing/test_offload_activations.py"

CHANGES = [
    Change(r"from deepspeed\.accelerator import", "from peer_stand_ins import"),
    Change(r"from deepspeed\.runtime\.activation_checkpointing\.offload_activations import",
           "from peer_stand_ins import"),
    # The peer keeps the tensor itself, we keep an alias of its bytes.
    Change(r"assert (next\(iter\(offload\._keep_last\.values\(\)\)\)) is last_marked",
           r"assert \1.data_ptr() == last_marked.data_ptr()"),
    # Its host buffers are tensors, dense or not, pooled; ours are blocks of a file.
    Change(r"assert (cpu_bufs\[0\]\.is_contiguous\(\)|tuple\(cpu_bufs\[0\]\.stride\(\)\) == .*)",
           "pass"),
    Change(r"assert manager\._cpu_buffer_pool_count > 0", "pass"),
]  # fmt: skip

# Some are not in every version of the file.
BUFFERS = "it is about the host buffers that the peer pins and pools"
LEFT_OUT = {
    "test_marked_cpu_tensor_is_skipped": "the CPU stands for the device here",
    "test_overlapping_view_is_skipped": "the peer can't move them; ours moves the storage, exactly",
    "test_same_manager_is_not_reentrant": "ours may be entered again",
    "test_contiguous_offload_buffer_pin_flag": BUFFERS,
    "test_empty_cpu_like_pins_via_accelerator": BUFFERS,
    "test_empty_cpu_like_does_not_call_accelerator_pin": BUFFERS,
    "test_buffer_key_shared_across_strides": BUFFERS,
    "test_buffer_key_includes_stride": BUFFERS,
}

NOTHING_SAVED = {  # of what is marked, if anything is
    "test_unmarked_saved_tensors_pass_through",
    "test_keep_last_count_rejects_negative",
    "test_gradient_checkpointing_layer_signature_contract",
    "test_marker_patch_restored_on_exception",
    "test_nested_managers_unpatch_on_outer_exit",
}


def test_deepspeed(tmp_path):
    text = (checkout_of("deepspeed") / FILE).read_text()
    here = set(cases_in(text))
    filename = "test_deepspeed_adapted.py"
    deselected = [f"--deselect={filename}::{name}" for name in LEFT_OUT]
    cases = run(tmp_path, filename, adapted(text, CHANGES), [filename, *deselected])
    assert names_of(cases) == here - set(LEFT_OUT)
    assert moved_in(cases) == here - set(LEFT_OUT) - NOTHING_SAVED
    assert len(here & set(LEFT_OUT)) >= 4
