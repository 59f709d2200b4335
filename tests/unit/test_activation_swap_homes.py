"""Where saved activations of any code go: homes, their order, and what is refused."""

import gc
import threading

import pytest
import torch
from swapped_steps import Net, assert_same, gradients, inputs

from offload import ActivationSwap
from offload.allocator.errors import ConfigError, TierIOError
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.engines.registry import wrapping
from offload.tiers.events import ListRecorder, Move
from offload.tiers.journal import Journal
from offload.tiers.mempolicy import allowed_nodes
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.wrappers import RecordingEngine


@pytest.mark.parametrize("homes", ["pool", "node", "file", "all"])
def test_tensors_of_a_device_leave_it(tmp_path, homes):
    """Pinned memory, a memory node and a file take them one after the other."""
    given = {
        "pool": {"memory": "1GiB"},
        "node": {"nodes": {allowed_nodes()[0]: "64MiB"}},
        "file": {"nvme": tmp_path},
        "all": {"memory": "100KiB", "nodes": {allowed_nodes()[0]: "100KiB"}, "nvme": tmp_path},
    }[homes]
    right_model = Net()
    right = gradients(right_model, model=right_model)
    device = CpuAccelerator()
    recorder = ListRecorder()
    swap = ActivationSwap(
        accelerator=device, min_nbytes=0, in_flight=0, journal=Journal(recorder), **given
    )
    with Deferred(device):
        model = Net()  # its parameters are on the device
        with torch.no_grad():
            for target, source in zip(model.parameters(), right_model.parameters(), strict=True):
                target.copy_(source)
        swap.cache.fixed.know_model(model)
        torch.manual_seed(0)
        x = inputs().clone().detach().requires_grad_()
        with swap:
            loss = model(x)
        loss.backward()
        found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert_same([one.detach() for one in found], right)
    del loss
    moves = {event.dst for event in recorder.events if isinstance(event, Move)}
    assert {home.name for home in swap.cache.spiller.homes} <= moves
    swap.cache.spiller.close()
    gc.collect(0)
    assert swap.cache.kept_nbytes == 0
    swap.close()


def test_a_node_that_does_not_exist_is_refused(tmp_path):
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="63"):
        ActivationSwap(memory="1MiB", nodes={63: "1MiB"}, nvme=tmp_path)
    assert set(threading.enumerate()) <= before


def test_its_files_are_moved_by_the_engine_that_was_chosen(tmp_path):
    requests = []
    with wrapping(lambda engine: RecordingEngine(engine, requests)):
        swap = ActivationSwap(nvme=tmp_path, min_nbytes=0, in_flight=0)
    with swap:
        loss = inputs().exp().sum()
    loss.backward()
    swap.close()
    assert {request.verb for request in requests} == {"read", "write"}


# Bad input.


def test_it_needs_a_place():
    with pytest.raises(ConfigError, match="pass memory=, nodes= or nvme="):
        ActivationSwap()


@pytest.mark.parametrize("name", ["limit", "memory", "min_nbytes", "in_flight"])
def test_a_size_that_makes_no_sense_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: 'lots' is not a size"):
        ActivationSwap(**{"nvme": tmp_path, name: "lots"})


@pytest.mark.parametrize("size", ["24", 24], ids=["text", "number"])
@pytest.mark.parametrize("name", ["limit", "memory", "in_flight", "nodes"])
def test_a_size_without_its_unit_is_refused(tmp_path, name, size):
    given = {1: size} if name == "nodes" else size
    with pytest.raises(ConfigError, match=f"{name}: 24 bytes are hardly meant; .* 24GiB, or 24B"):
        ActivationSwap(**{"nvme": tmp_path, name: given})


def test_the_smallest_that_moves_alone_is_named_in_bytes(tmp_path):
    ActivationSwap(nvme=tmp_path, min_nbytes="4096", limit="24B").close()


def test_full_memory_says_what_would_help():
    swap = ActivationSwap(limit="8KiB", in_flight=0, memory="8KiB", min_nbytes=0)
    with swap, pytest.raises(MemoryError, match=r"no home was given: .*nvme=.* smaller batch"):
        inputs().exp()
    swap.close()


def test_after_closing_what_has_left_is_gone(tmp_path):
    swap = ActivationSwap(nvme=tmp_path, in_flight=0, min_nbytes=0)
    with swap:
        y = inputs().exp().sin().sum()
    swap.close()
    swap.close()
    with pytest.raises(RuntimeError, match="closed"):
        y.backward()


def test_a_directory_that_can_not_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    before = set(threading.enumerate())
    with pytest.raises(TierIOError, match=r"can't make .*/file/x \(Not a directory\): .* nvme="):
        ActivationSwap(nvme=tmp_path / "file" / "x")
    assert set(threading.enumerate()) <= before


def test_a_path_through_a_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="goes through the symbolic link"):
        ActivationSwap(nvme=tmp_path / "link")


@pytest.mark.parametrize("node", ["one", -1, True, 0.5])
def test_a_node_is_a_number(node):
    with pytest.raises(ConfigError, match="is not the number of a memory node"):
        ActivationSwap(nodes={node: "1GiB"})
