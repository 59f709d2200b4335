"""Float32 masters of bfloat16 weights in stores and files: resumed, loaded, carried on, saved."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from master_runs import (
    BOTH,
    IN_BACKWARD,
    MASTERS,
    InMemory,
    assert_same,
    half_model,
    master,
    overwrite,
    run_both,
    train,
)
from safetensors.torch import load_file
from state_runs import adamw, attach_with_room, through_a_file

import offload
from offload.allocator.errors import ConfigError, StoreMismatchError, UnsupportedError
from offload.swap.masters import MASTER_LOW

pytestmark = pytest.mark.usefixtures("many_tiles")


@BOTH
def test_a_resumed_run_continues_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    start = copy.deepcopy(twin)
    plain = InMemory(twin, adamw)
    expected = train(twin, plain, range(6))
    losses = []
    for first, last in itertools.pairwise((0, 2, 5, 6)):
        model = copy.deepcopy(start)
        optimizer = adamw(model.parameters())
        attach = attach_with_room(tmp_path)
        with attach(model, optimizer, config=config) as engine:
            assert engine.step == first
            losses += train(model, optimizer, range(first, last))
            if last == 5:  # after a resume, too, it is known whose lower halves these are
                overwrite(model)
                engine.commit()
                overwrite(model)
                for name in ("0.weight", "0.bias"):
                    written = model.get_parameter(name).detach().view(-1)[:100]
                    found = engine.master_weight(name).view(-1)[:100]
                    assert torch.equal(found, written.float())
                break
    assert losses == expected[:5]


def test_another_setting_does_not_continue_a_store(tmp_path: Path) -> None:
    for config, other, message in (
        (MASTERS, {}, "its master_weights is fp32, this one's is none .set it to 'fp32'"),
        ({}, MASTERS, "its master_weights is none, this one's is fp32 .set it to 'none'"),
    ):
        nvme = tmp_path / str(len(config))
        for settings in (config, other):
            model = half_model()
            optimizer = adamw(model.parameters())
            if settings is other:
                with pytest.raises(StoreMismatchError, match=message):
                    offload.attach(model, optimizer, budget="8GiB", nvme=nvme, config=settings)
                break
            with offload.attach(model, optimizer, budget="8GiB", nvme=nvme, config=settings):
                train(model, optimizer, range(1))


@pytest.mark.parametrize("commits", [False, True])
def test_state_dicts_carry_the_masters_to_another_store(
    commits: bool, starve: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    train(twin, plain, range(6))
    starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(3))
    weights, states = through_a_file((model.state_dict(), optimizer.state_dict()))
    fresh: Any = half_model()
    other = adamw(fresh.parameters())
    engine = starve(fresh, other, nvme=tmp_path / "other", config=MASTERS)
    train(fresh, other, range(2))  # it had lower halves of its own
    fresh.load_state_dict(weights)
    if commits:
        engine.commit()
    other.load_state_dict(states)
    train(fresh, other, range(3, 6))
    assert_same(plain, fresh, other)


def test_states_of_a_run_without_masters_are_taken(starve: Any) -> None:
    model: Any = half_model()
    before = adamw(model.parameters())
    train(model, before, range(2))
    optimizer = adamw(model.parameters())
    engine = starve(model, optimizer, config=MASTERS)
    optimizer.load_state_dict(before.state_dict())
    engine.commit()
    for parameter in (model[0].weight, model[0].bias):
        found = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(found.float(), before.state[parameter]["exp_avg"].float())
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.float32


def test_a_detached_optimizer_has_everything_to_go_on_elsewhere(
    starve: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    train(twin, plain, range(6))
    engine = starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(3))
    engine.detach()
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].dtype == torch.float32
    assert state[MASTER_LOW].dtype == torch.int16
    starve(model, optimizer, nvme=tmp_path / "two", config=IN_BACKWARD)
    train(model, optimizer, range(3, 6))
    assert_same(plain, model, optimizer)


def test_masters_are_saved(starve: Any, tmp_path: Path) -> None:
    engine, model, optimizer = run_both(starve, adamw, MASTERS)
    for masters in (False, True):
        engine.save_pretrained(tmp_path / "saved", masters=masters)
        found = load_file(tmp_path / "saved" / "model.safetensors")
        for name, parameter in model.named_parameters():
            expected = parameter.detach()
            if masters and parameter.dtype == torch.bfloat16 and parameter.numel():
                expected = master(parameter, optimizer)
                assert parameter.numel() < 2 or not torch.equal(expected, parameter.float())
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name], expected)
    whole = engine.master_weight("0.weight")
    assert torch.equal(whole, master(model[0].weight, optimizer))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    assert (engine.master_weight("0.weight") == 0.5).all()
    for name in ("2.bias", "nothing"):
        with pytest.raises(ConfigError, match=f"'{name}' is no bfloat16 parameter"):
            engine.master_weight(name)


def test_masters_that_are_not_kept_can_not_be_saved(starve: Any, tmp_path: Path) -> None:
    model = half_model()
    engine = starve(model, adamw(model.parameters()))
    with pytest.raises(ConfigError, match="no masters are kept: attach with"):
        engine.save_pretrained(tmp_path / "saved", masters=True)
    with pytest.raises(ConfigError, match="no masters are kept"):
        engine.master_weight("0.weight")


def test_lower_halves_that_torch_has_spoilt_are_refused(starve: Any, tmp_path: Path) -> None:
    model: Any = half_model()
    optimizer = adamw(model.parameters())
    starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(2))
    weights, states = through_a_file((model.state_dict(), optimizer.state_dict()))
    fresh: Any = half_model()
    fresh.load_state_dict(weights)
    other = adamw(fresh.parameters())
    other.load_state_dict(states)  # before attach
    starve(fresh, other, nvme=tmp_path / "other", config=MASTERS)
    with pytest.raises(UnsupportedError, match=r"master_low of .*load_state_dict after"):
        train(fresh, other, range(2, 3))
    other.zero_grad()
    other.load_state_dict(states)
    assert train(fresh, other, range(2, 5)) == train(model, optimizer, range(2, 5))
