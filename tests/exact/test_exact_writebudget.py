"""A write budget binds a whole run, and changes no bit of it."""

import pytest
import torch
from torch import nn

import offload
from offload.cli import main
from offload.errors import BudgetError
from offload.tiers.events import Move

WIDTH = 512


def make_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def loop(model, optimizer, _engine):
    values = []
    for _ in range(3):
        loss = model(torch.randn(256, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


WEIGHTS_NBYTES = 3 * 4 * (WIDTH * WIDTH + WIDTH)
GRADIENTS_NBYTES = 3 * 4 * WIDTH * WIDTH
OTHERS_NBYTES = WEIGHTS_NBYTES + GRADIENTS_NBYTES


def activation_writes(comparison):
    events = comparison.engine._journal.recorder.events
    return sum(
        event.nbytes
        for event in events
        if isinstance(event, Move) and event.role == "activation" and event.dst.startswith("file")
    )


def test_it_bounds_what_activations_write(compare):
    free = compare(make_model, sgd, loop)
    allowance = 600 << 10
    bound = compare(
        make_model,
        sgd,
        loop,
        config={"nvme_write_budget": OTHERS_NBYTES + allowance},
        nvme=free.engine._runtime.store.directory.parent.parent / "bound",
    )
    assert activation_writes(free) > 3 * allowance
    assert 0 < activation_writes(bound) <= 3 * allowance


def test_too_small_a_budget_is_refused_before_the_first_step(tmp_path):
    model = make_model()
    with pytest.raises(BudgetError, match=r"nvme_write_budget=1.00 MiB .* is too small"):
        offload.attach(
            model, sgd(model), budget="8GiB", nvme=tmp_path, config={"nvme_write_budget": "1MiB"}
        )


def test_the_report_tells_wear_and_life(tmp_path, capsys):
    model = make_model()
    optimizer = sgd(model)
    config = {"nvme_write_budget": "100MiB", "nvme_endurance": "1TB", "min_swap_nbytes": 1}
    with offload.attach(
        model, optimizer, budget="8GiB", nvme=tmp_path / "nvme", config=config,
        record=tmp_path / "run",
    ) as engine:  # fmt: skip
        engine.activations.limit_nbytes = 0
        loop(model, optimizer, engine)
        written = engine.stats.written_bytes_per_step
    assert main(["report", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "of a budget of 100.00 MiB" in text
    assert f"{10**12 // written:,} steps, " in text
