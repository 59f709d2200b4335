"""Rows of a filed table are asked for before they are looked up: all of them, and little else."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import offload
from offload.swap import looked_up
from offload.swap.looked_up import ask_for_rows, page_spans
from offload.tiers import hostmem
from offload.tiers.hostmem import PAGE
from offload.tiers.mapped import MappedTensor

ROWS, WIDTH = 4096, 1024  # a page each


@given(st.sets(st.integers(0, 3000)), st.integers(1, 3 * PAGE))
def test_spans_hold_all_that_is_asked_for_and_what_lies_near(
    numbers: set[int], nbytes: int
) -> None:
    rows = sorted(numbers)
    spans = page_spans(np.array([row * nbytes for row in rows], dtype=np.int64), nbytes)
    asked = {
        page
        for row in rows
        for page in range(row * nbytes // PAGE, ((row + 1) * nbytes - 1) // PAGE + 1)
    }
    got = [page for at, size in spans for page in range(at // PAGE, (at + size) // PAGE)]
    assert asked <= set(got)
    assert len(got) == len(set(got))
    between = looked_up._NEAR_PAGES - 1
    assert all(asked & set(range(page - between, page + between + 1)) for page in got)


def cached(table: MappedTensor) -> set[int]:
    """Pages of a filed tensor that memory has."""
    count = table.padded_nbytes // PAGE
    found = (ctypes.c_ubyte * count)()
    address = ctypes.c_void_p(table.address)
    assert hostmem._libc.mincore(address, ctypes.c_size_t(table.padded_nbytes), found) == 0
    return {page for page in range(count) if found[page] & 1}


@pytest.fixture
def engine(tmp_path: Path):
    model = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit="never") as engine:
        engine.keep_streaming()
        yield engine


def table_of(engine) -> MappedTensor:
    engine.weights.uncache(["0.weight"])
    return engine.weights.weights["0.weight"].mapped


def test_a_lookup_reads_its_rows_and_no_others(engine) -> None:
    table, rows = table_of(engine), [5, 1000, 1003, 4095]
    before = cached(table)  # all of them, where the file system is memory
    right = engine.model[0].weight.detach()[rows].clone()
    engine.weights.uncache(["0.weight"])
    with torch.no_grad():
        assert engine.model[0](torch.tensor([rows])).eq(right).all()
    assert cached(table) - before <= {5, 1000, 1001, 1002, 1003, 4095}


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([], dtype=torch.int64),
        torch.tensor([-1, ROWS, 2**40]),
        torch.tensor([0.5]),
        torch.tensor([1], device="meta"),
        None,
        [1, 2],
    ],
)
def test_what_is_no_row_is_not_asked_for(engine, indices, monkeypatch) -> None:
    monkeypatch.setattr(hostmem, "will_need", pytest.fail)
    ask_for_rows(table_of(engine), indices)


def test_a_table_in_memory_is_not_asked_for(engine, monkeypatch) -> None:
    table = table_of(engine)
    engine.weights.use(["0.weight"])
    assert table.held
    monkeypatch.setattr(hostmem, "will_need", pytest.fail)
    engine.model(torch.tensor([[3]]))


def test_a_lookup_under_a_transform_is_torchs_own(engine) -> None:
    table_of(engine)
    indices = torch.arange(6).reshape(3, 2)
    with torch.no_grad():
        rows = torch.func.vmap(engine.model[0])(indices)
    assert rows.eq(engine.model[0].weight.detach()[indices]).all()


def test_an_index_that_is_no_row_is_torchs_error(engine) -> None:
    with pytest.raises(IndexError, match="out of range"):
        engine.model(torch.tensor([[ROWS]]))
