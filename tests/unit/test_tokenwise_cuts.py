"""Cuts behind which rows differ: refused one by one, and nothing else is given up for them."""

import copy

import few_rows
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from offload.swap.tokenwise import replay
from offload.swap.tokenwise.cuts import Cuts
from offload.swap.tokenwise.keeper import MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.program import Node, Program, Ref, Slot, Value
from offload.swap.tokenwise.replay import cuts
from offload.swap.tokenwise.solve import Link
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.swap.tokenwise.trials import Choice

ROWS, WIDTH = 512, 32
GRID = cuts(ROWS)
NORM, UP, GELU = WIDTH * ROWS * 4, 4 * WIDTH * ROWS * 4, 4 * WIDTH * ROWS * 4


# Which cuts may be used.


def program_of(rows, *widths):
    """A chain of row-wise operations on the input; each result is saved."""
    values, nodes, slots = [], [], []
    for storage, width in enumerate((1, *widths)):
        kind, node = ("made", storage - 1) if storage else ("external", None)
        shape = (rows, width)
        values.append(Value(kind, storage, shape, (width, 1), 0, "float32", 4, node, None))
        if storage:
            args = (Ref(storage - 1),)
            nodes.append(Node("aten.gelu.default", args, (), (storage,), (), False))
            slots.append(Slot(storage, shape, (width, 1), 0, "float32", storage, storage))
    return Program(
        rows=rows, values=tuple(values), nodes=tuple(nodes), slots=tuple(slots),
        storage_nbytes=tuple(4 * rows * width for width in (1, *widths)),
    )  # fmt: skip


def tried(found, cut, *failed):
    """Compare: these storages differ behind ``cut``, if they are rebuilt there."""
    while not found.at(cut).settled:
        targets = {target.storage for target in found.at(cut).chain.targets}
        wrong = dict.fromkeys(targets.intersection(failed), f"differs behind {cut}")
        if wrong:
            found.fail(cut, wrong)
        else:
            found.verify(cut)


@pytest.fixture
def found():
    return Cuts(program_of(ROWS, 1, 1, 1), min_nbytes=0)


def test_any_cut_may_be_used_as_long_as_none_is_refused(found):
    assert found.usable() == list(GRID)
    tried(found, 384)
    found.choose()
    assert (found.usable(), found.verified(), found.refused()) == (list(GRID), [384], [])


def test_a_refused_cut_refuses_those_beyond_and_half_of_those_before(found):
    tried(found, 384, 2)
    tried(found, 128)
    found.choose()
    assert (found.verified(), found.refused()) == ([128], [384])
    assert found.usable() == [0, 64, 128, 192, 256, ROWS]
    tried(found, 256, 2)
    assert found.usable() == [0, 64, 128, 192, ROWS]
    tried(found, 192, 3)
    assert found.usable() == [0, 64, 128, ROWS]
    tried(found, 0, 1)
    assert found.usable() == [128, ROWS]


def test_the_cut_behind_which_most_is_right_says_what_is_given_up(found):
    tried(found, 384, 2, 3)
    tried(found, 128, 2)
    tried(found, 256, 2)
    found.choose()
    assert set(found.chain.whole) - {0} == {2}
    assert found.chain.whole[2] in ("differs behind 128", "differs behind 256")
    assert (found.verified(), found.refused()) == ([128, 256], [384])
    tried(found, 0, 2)  # it is not looked at again
    assert found.verified() == [0, 128, 256]


@given(
    right=st.sets(st.sampled_from(cuts(4096)[:-1])),
    wishes=st.lists(st.floats(0, 1), min_size=80, max_size=80),
)
def test_few_attempts_fail_whatever_is_asked_for(right, wishes):
    found = Cuts(program_of(4096, 1, 1), min_nbytes=0)
    for cut in (3072, 1024, 2048, 0):
        tried(found, cut, *(() if cut in right else (1,)))
    found.choose()
    attempts = 0
    for wish in wishes:
        usable = found.usable()
        assert usable == sorted(set(usable))
        assert usable[-1] == 4096
        assert not {*usable} & {*found.refused()}
        cut = usable[round(wish * (len(usable) - 1))]
        if cut == 4096 or cut in found.verified():
            continue
        before = found.refused()
        tried(found, cut, *(() if cut in right or 1 in found.chosen.failed else (1,)))
        attempts += found.refused() != before
        assert (cut in found.verified()) != (cut in found.refused())
    assert attempts <= 6  # of a grid of 64 cuts


# Models.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ClockedKeeper(MemoryKeeper):
    """Copies in memory behind a link, in virtual time; each look at the clock takes a little."""

    def __init__(self, bytes_per_s):
        super().__init__()
        self.now_s = 0.0
        self.bytes_per_s = bytes_per_s

    def clock(self):
        self.now_s += 1e-6
        return self.now_s

    def unpack(self, packed):
        self.now_s += packed.nbytes / self.bytes_per_s
        return super().unpack(packed)

    def links(self):
        return (Link(name="link", bytes_per_s=self.bytes_per_s, free_nbytes=1e15),)


def train(alpha, make_block=Block, keeper=None, passes=24):
    """Passes with rows rebuilt, each held against one without; the reports and notices."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(make_block() for _ in range(2)))
    model = copy.deepcopy(plain)
    keeper = keeper or ClockedKeeper(1e6)
    notices, tried_cuts = [], []
    rows = TokenWise(
        model, keeper, Settings(alpha=alpha, min_nbytes=4096), notice=notices.append,
        timer=Timer(keeper.clock),
    )  # fmt: skip
    for _ in range(passes):
        results = []
        x = torch.randn(1, ROWS, WIDTH)
        for one in (plain, model):
            one.zero_grad()
            if one is model:
                with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
                    loss = one(x).square().mean()
            else:
                loss = one(x).square().mean()
            loss.backward()
            results.append([loss.detach(), *(weight.grad for weight in one.parameters())])
        assert all(map(torch.equal, *results))
        tried_cuts.append({report.cut for report in rows.report()})
    return rows.report(), notices, tried_cuts


@pytest.mark.parametrize(
    ("fewest", "usable"),
    [(129, 384), (257, 256), (385, 128), (512, 64)],  # refused from here on: all rows else
)
def test_auto_gives_nothing_up_that_is_right_behind_some_cut(monkeypatch, fewest, usable):
    few_rows.round_differently(monkeypatch, fewest)
    reports, notices, tried_cuts = train("auto")
    for report in reports:
        assert report.rebuilt_nbytes == NORM + UP + GELU
        assert min(report.refused) == usable or usable not in report.refused
        assert all(ROWS - cut < fewest for cut in report.refused)
        assert report.cost.target_nbytes == NORM + UP + GELU
    assert reports[0].settled is not None
    assert {choice for choice, _ in reports[0].trial_s} <= {Choice.SOLVED, Choice.SWAPPED}
    assert all(cut == ROWS or ROWS - cut >= fewest for cuts in tried_cuts for cut in cuts)
    assert tried_cuts[-1] == {0}  # so slow is the link
    assert notices == []


def test_auto_gives_up_what_is_right_behind_no_cut(monkeypatch):
    few_rows.round_differently(monkeypatch, ROWS + 1)
    reports, notices, tried_cuts = train("auto")
    for report in reports:
        assert report.rebuilt_nbytes == NORM + GELU
        (reason,) = [why for why, nbytes in report.whole if nbytes == UP]
        assert "not bit-identical behind cut" in reason
        assert report.refused == ()
    assert tried_cuts[-1] == {0}
    assert [f"{UP} bytes of {block} are swapped whole" in " ".join(notices) for block in "01"] == [
        True, True,
    ]  # fmt: skip


def test_what_never_verifies_takes_nothing_else_with_it(monkeypatch):
    """Neither behind the cuts where all else is right, nor by those where more differs."""
    few_rows.round_differently(monkeypatch, 200)
    few_rows.round_differently(monkeypatch, ROWS + 1, products=("gelu",))
    reports, _, tried_cuts = train("auto")
    for report in reports:
        assert report.rebuilt_nbytes == NORM + UP
        assert 384 in report.refused
        assert not {0, 128, 256} & {*report.refused}
        assert [nbytes for why, nbytes in report.whole if "bit-identical" in why] == [GELU]
    assert tried_cuts[-1] == {0}


def test_a_kernel_that_takes_no_few_rows_costs_the_cuts_that_leave_few(monkeypatch):
    functional = replay._functional

    def strict(op):
        def gelu(x, **kwargs):
            if x.shape[-2] < 257:
                raise RuntimeError("too few rows")
            return functional(op)(x, **kwargs)

        return gelu if "gelu" in op else functional(op)

    monkeypatch.setattr(replay, "_functional", strict)
    reports, _, tried_cuts = train("auto")
    for report in reports:
        assert report.rebuilt_nbytes == NORM + UP + GELU
        assert report.refused[0] == 256
    assert tried_cuts[-1] == {0}
    reports, notices, _ = train(0.5, passes=2)
    assert all("executed behind cut 256 of 512: too few rows" in one.gave_up for one in reports)
    assert all(f"alpha 0.25 would rebuild {NORM + UP + GELU} bytes" in text for text in notices)


def test_a_fast_link_takes_everything_all_the_same(monkeypatch):
    few_rows.round_differently(monkeypatch, 257)
    reports, _, tried_cuts = train("auto", keeper=ClockedKeeper(1e15))
    assert tried_cuts[-1] == {ROWS}
    assert {report.rebuilt_nbytes for report in reports} == {NORM + UP + GELU}


def test_sources_that_only_the_next_forward_keeps(monkeypatch):
    """What is kept only to be rebuilt from is no saved tensor: the first forward has not got it."""

    class Mixed(Block):
        def forward(self, x):
            summed = x.cumsum(1)  # not row-wise; both norms save what is made of it
            return super().forward(summed + 1) + super().forward(2 * summed)

    few_rows.round_differently(monkeypatch, 257)
    reports, _, tried_cuts = train("auto", Mixed)
    for report in reports:
        assert report.rebuilt_nbytes == 2 * (2 * NORM + UP + GELU)
        assert report.refused[0] == 256
        assert report.solution is not None
    assert tried_cuts[0] == {384}  # where it is to be tried first
    assert tried_cuts[-1] == {0}


# An alpha that was asked for.


def test_a_fixed_alpha_is_kept_and_what_differs_is_told(monkeypatch):
    few_rows.round_differently(monkeypatch, 129)
    reports, notices, tried_cuts = train(0.75, passes=3)
    for report in reports:
        assert (report.cut, report.rebuilt_nbytes) == (384, NORM + GELU)
        (reason,) = [why for why, nbytes in report.whole if nbytes == UP]
        assert f"not bit-identical behind cut 384 of {ROWS}" in reason
    assert tried_cuts == [{384}] * 3
    assert notices == [
        f"token-wise recompute: {UP} bytes of {block} are swapped whole: behind cut 384 of {ROWS} "
        f"they are not rebuilt to the bit; alpha 0.5 would rebuild {UP} bytes more"
        for block in "01"
    ]


def test_a_fixed_alpha_that_no_other_one_betters(monkeypatch):
    few_rows.round_differently(monkeypatch, ROWS + 1)
    reports, notices, _ = train(0.5, passes=3)
    assert {(report.cut, report.rebuilt_nbytes) for report in reports} == {(256, NORM + GELU)}
    assert all(notice.endswith("they are not rebuilt to the bit") for notice in notices)
    assert len(notices) == 2


def test_a_fixed_alpha_behind_which_nothing_is_right_is_told_too(monkeypatch):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.up(x).sigmoid()

    few_rows.round_differently(monkeypatch, 257, products=("addmm", "mm", "sigmoid"))
    reports, notices, _ = train(0.75, Bare, passes=3)
    assert all("not bit-identical behind cut 384" in report.gave_up for report in reports)
    for notice in notices:
        assert "is swapped whole: none of its saved tensors" in notice
        assert notice.endswith(f"; alpha 0.25 would rebuild {ROWS * WIDTH * 4} bytes more")


def test_a_fixed_alpha_that_is_right_is_left_alone(monkeypatch):
    few_rows.round_differently(monkeypatch, 129)
    reports, notices, _ = train(0.5, passes=3)
    assert {(report.cut, report.rebuilt_nbytes) for report in reports} == {(256, NORM + UP + GELU)}
    assert notices == []
