"""Token-wise recompute in a simulated run, held against real ones."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, machine, settings, trace
from real_runs import events_of_both, moved
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import UnsupportedError
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import Settings, least_budget, predict
from offload.swap.planning.program import Program
from offload.swap.planning.row_steps import RowSteps
from offload.swap.planning.sim_writes import must_write_nbytes
from offload.swap.planning.simulate import Simulation
from offload.swap.planning.whatif import changed, parse_changes
from offload.tiers.events import Event, ListRecorder, Move

WIDTH, HEADS, VOCABULARY, TOKENS = 128, 4, 500, 256


class GptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (
            part.view(shape).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.behind(x))))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        y = self.before(x)
        q, k, v = (each(y).view(shape).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = (
            each * turn.cos() + each.roll(WIDTH // HEADS // 2, -1) * turn.sin() for each in (q, k)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        y = self.behind(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class MixingBlock(nn.Module):
    """Autograd does not save what mixes the tokens, but much is rebuilt from it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.before(x).roll(1, 1)
        return x + sum(F.gelu(mixed + shift) for shift in range(1, 5))


class Decoder(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        given = ()
        if isinstance(self.blocks[0], LlamaBlock):
            places = torch.arange(tokens.shape[1], dtype=x.dtype)
            given = (places[:, None] / 10.0 ** torch.arange(WIDTH // HEADS)[None, :],)
        for block in self.blocks:
            x = block(x, *given)
        return self.head(self.norm(x))


def gpt() -> Decoder:
    return Decoder(GptBlock)


def llama() -> Decoder:
    return Decoder(LlamaBlock)


def mixing() -> Decoder:
    return Decoder(MixingBlock)


def program_of(make: Callable[[], Decoder], length: int = TOKENS) -> Program:
    return trace(make, length, rebuild_nbytes=64 << 10)


def activations(events: Sequence[Event], step: int) -> tuple[int, int]:
    found = moved(events, step)
    return found["activation", "read"], found["activation", "written"]


def tokens_of(sequences: int = 1) -> torch.Tensor:
    return torch.arange(sequences * TOKENS).remainder(VOCABULARY).reshape(sequences, TOKENS)


@pytest.mark.parametrize("make", [gpt, llama, mixing])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.75, 1.0])
def test_it_moves_the_bytes_that_a_real_run_moves(
    make: Callable[[], Decoder], alpha: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    program = program_of(make)
    real, virtual = events_of_both(
        program,
        make(),
        tokens_of(),
        tmp_path,
        activations_nbytes=0,  # all leaves at once: no clock decides what
        config={"recompute": "tokenwise", "alpha": alpha},
    )
    for step in range(4):
        assert activations(virtual, step) == activations(real, step), step
    for key in (("weight", "written"), ("gradient", "written"), ("state", "written")):
        assert moved(virtual, 3)[key] == moved(real, 3)[key]
    assert program.rows is not None
    (kind,) = program.rows.kinds
    assert kind.at_once == (make is not mixing)
    fewer = activations(virtual, 3)[1] < activations(virtual, 0)[1]
    assert fewer == (alpha < (0.75 if make is mixing else 1))  # its source is swapped besides


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_within_a_limit_it_writes_what_a_real_run_writes(alpha: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    real, virtual = events_of_both(
        program_of(gpt),
        gpt(),
        tokens_of(),
        tmp_path,
        activations_nbytes=1 << 20,
        config={"recompute": "tokenwise", "alpha": alpha},
    )
    for step in range(4):
        found, expected = activations(virtual, step), activations(real, step)
        assert found[1] == pytest.approx(expected[1], rel=0.1)
        assert found[0] == pytest.approx(expected[0], rel=0.25)  # the clock decides some


def within(mib: int, alpha: float | str | None, **changes: Any) -> Settings:
    return dataclasses.replace(settings(mib), alpha=alpha, **changes)


LONG = program_of(gpt, 1024)
ROOMY = least_budget(LONG, machine(), settings(1), BASELINE).settings.budget_nbytes // MIB + 8


def test_a_traced_step_is_the_same_whether_blocks_are_watched_or_not() -> None:
    plain = trace(gpt, TOKENS)
    watched = program_of(gpt)
    assert dataclasses.replace(watched, rows=None) == plain
    assert Program.from_json(watched.to_json()) == watched


def test_nothing_is_left_in_memory_but_what_stays() -> None:
    plan = predict(LONG, machine(), settings(ROOMY), BASELINE).steps[0].plan
    for alpha in (0.0, 0.5, "auto"):
        compiled = compile_program(LONG, Costs(machine(), DRIVE))
        rows = RowSteps(compiled, alpha, memory_nbytes=1 << 20, drive_nbytes=1 << 30)
        simulation = Simulation(rows.compiled, plan, chunk_numel=1 << 18)
        rows.run(simulation)
        now = simulation.world.memory.now
        assert not {role for role in ("saved", "transients", "gradients", "staging") if now[role]}
        assert simulation._saved._limit_nbytes == plan.activations_nbytes
        assert simulation._saved.kept_nbytes == 0


@given(alpha=st.sampled_from([0.0, 0.3, 0.9, "auto"]), more=st.integers(0, 60))
def test_the_books_balance(alpha: float | str, more: int) -> None:
    recorder = ListRecorder()
    found = predict(LONG, machine(), within(ROOMY + more, alpha), BASELINE, recorder=recorder)
    again = predict(LONG, machine(), within(ROOMY + more, alpha), BASELINE)
    assert [step.finished.read_nbytes for step in found.steps] == [
        step.finished.read_nbytes for step in again.steps
    ]
    moves = [event for event in recorder.events if isinstance(event, Move)]
    assert sum(step.finished.written_nbytes for step in found.steps) == sum(
        move.nbytes for move in moves if move.dst.startswith("file")
    )
    for step in found.steps:
        assert all(nbytes >= 0 for nbytes in step.peak_roles.values())
        assert step.finished.peak_nbytes <= step.plan.budget_nbytes


def test_more_is_rebuilt_where_the_drive_is_slow() -> None:
    def alpha_at(rate: str) -> float:
        found = predict(
            LONG,
            changed(machine(), DRIVE, parse_changes(f"nvme={rate}")),
            within(ROOMY, "auto"),
            BASELINE,
        )
        (kind,) = found.rebuilt
        return kind.alpha

    slow, fast = alpha_at("5MB/s"), alpha_at("50GB/s")
    assert slow == 0
    assert fast > slow


def test_a_smaller_share_moves_fewer_bytes_and_rebuilding_takes_time() -> None:
    found = [
        predict(LONG, machine(), within(ROOMY, alpha), BASELINE).last.finished
        for alpha in (0.0, 0.25, 0.75, 1.0)
    ]
    written = [step.written_nbytes for step in found]
    computed = [step.compute_s for step in found]
    assert written == sorted(written)
    assert written[0] < written[-1]
    assert min(computed[:-1]) > computed[-1]


def test_sequences_that_have_no_such_cut_are_swapped_whole() -> None:
    short = program_of(gpt, 48)
    (kind,) = predict(short, machine(), within(ROOMY, 0.5), BASELINE).rebuilt
    assert (kind.cut, kind.blocks) == (48, 3)
    assert kind.why == "sequences of 48 tokens are too few rows, 64 are needed"
    (kind,) = predict(LONG, machine(), within(ROOMY, 1.0), BASELINE).rebuilt
    assert kind.why == "alpha is 1: all rows are swapped"
    plain = predict(LONG, machine(), settings(ROOMY), BASELINE)
    whole = predict(LONG, machine(), within(ROOMY, 1.0), BASELINE)
    assert whole.last.finished.written_nbytes == plain.last.finished.written_nbytes
    assert whole.peak_nbytes == plain.peak_nbytes


def test_checkpointed_blocks_are_left_to_that() -> None:
    class Checkpointed(GptBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    program = program_of(lambda: Decoder(Checkpointed))
    assert program.rows is not None
    assert all(not kind.targets for kind in program.rows.kinds)


def test_a_step_traced_without_its_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="traced without its blocks"):
        predict(trace(gpt, TOKENS), machine(), within(ROOMY, 0.5), BASELINE)


def test_a_write_budget_bounds_what_is_swapped_of_rows() -> None:
    most = must_write_nbytes(LONG) + (4 << 20)
    bounded = within(ROOMY + 8, 0.5, write_budget_nbytes=most)
    found = predict(LONG, machine(), bounded, BASELINE)
    assert all(step.finished.written_nbytes <= most for step in found.steps[1:])
    free = predict(LONG, machine(), within(ROOMY + 8, 0.5), BASELINE)
    assert free.last.finished.written_nbytes > most
