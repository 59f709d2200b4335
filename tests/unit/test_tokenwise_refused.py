"""What can't be rebuilt is swapped whole, and changes that autograd refuses are refused."""

import pytest
import torch
from rebuilt_pairs import ROWS, WIDTH, Mlp, Net, Pair
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("several_threads")


def test_a_scale_that_changes_is_noticed_in_the_forward_where_it_does():
    class Scaled(Mlp):
        scale = 1.0

        def forward(self, x):
            return super().forward(x * Scaled.scale)

    pair = Pair(lambda: Net(Scaled))
    for seed, scale in enumerate([1.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03]):
        Scaled.scale = scale
        pair.step(seed)
    assert all("changes from forward to forward" in r.gave_up for r in pair.reports())
    assert any("recorded anew" in notice for notice in pair.notices)


def test_control_flow_that_depends_on_data():
    class Branching(Mlp):
        def forward(self, x):
            hidden = self.up(self.norm(x))
            hidden = F.gelu(hidden) if x.sum() > 0 else F.silu(hidden)
            return x + self.down(hidden)

    pair = Pair(lambda: Net(Branching))
    for seed in range(8):
        pair.step(seed)


def test_shapes_have_plans_of_their_own():
    pair = Pair(Net)
    for rows in (256, 192, 256, 192, 129, 130):
        pair.step(rows, (2, rows, WIDTH))
    assert {report.rows: report.cut for report in pair.reports()} == {
        256: 128, 192: 128, 129: 64, 130: 64,
    }  # fmt: skip


def test_too_few_rows_are_swapped_whole():
    pair = Pair(Net)
    pair.step(0, (2, 100, WIDTH)).step(1, (2, 40, WIDTH))
    assert [r.gave_up is not None and r.cut == r.rows for r in pair.reports()] == [True] * 6
    assert "100 tokens have no cut near alpha 0.5" in " ".join(pair.notices)
    assert "40 tokens are too few rows" in " ".join(pair.notices)


def test_rows_that_depend_on_other_rows_are_swapped_whole():
    class Mixer(Mlp):
        def forward(self, x):
            return super().forward(x - x.mean(1, keepdim=True)).cumsum(1).tanh()

    pair = Pair(lambda: Net(Mixer))
    for seed in range(3):
        pair.step(seed)
    reasons = " ".join(reason for report in pair.reports() for reason, _ in report.whole)
    assert "aten.cumsum.default is not row-wise" in reasons


def test_rows_that_differ_are_found_and_become_sources(monkeypatch):
    """A kernel that rounds differently for fewer rows: what comes after it still verifies."""
    from offload.swap.tokenwise import replay

    real = replay._functional

    def rounded(op):
        func = real(op)
        if op != "aten.gelu.default":
            return func
        return lambda x, **kwargs: func(x, **kwargs) * (1 + 1e-6)

    monkeypatch.setattr(replay, "_functional", rounded)
    pair = Pair(Net)
    for seed in range(3):
        pair.step(seed)
    assert pair.active()
    (text,) = [reason for reason, _ in pair.reports()[0].whole if "bit-identical" in reason]
    assert "relative error" in text
    relaxed = Pair(Net, relaxed=True)
    relaxed.model.double()
    relaxed.plain.double()
    monkeypatch.setattr(
        replay,
        "_functional",
        lambda op: (lambda x, **k: real(op)(x, **k) * (1 + 1e-13)) if "gelu" in op else real(op),
    )
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    for _ in range(2):
        with relaxed.hooked():
            relaxed.model(x).backward()
    assert all(0 < r.worst_error < 1e-12 and r.gave_up is None for r in relaxed.reports())
    assert all("relaxed: rebuilt rows of blocks." in notice for notice in relaxed.notices)
    assert len(relaxed.notices) == 3


# Changes that plain autograd refuses are refused here.


def test_saved_tensor_changed_in_place_raises():
    class Ending(Mlp):
        def forward(self, x):
            return self.up(self.norm(x)).sigmoid()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Ending() for _ in range(2))

        def forward(self, x):
            return [block(x) for block in self.blocks]

    pair = Pair(Wide)
    x = torch.randn(2, ROWS, WIDTH)
    for change in (False, True, True):
        with pair.hooked():
            outputs = pair.model(x)
        if not change:
            sum(out.sum() for out in outputs).backward()
            continue
        assert pair.active()
        with torch.no_grad():
            outputs[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[0].sum().backward()
        outputs[1].sum().backward()


def test_parameter_stepped_before_backward_raises():
    pair = Pair(Net)
    pair.step(0)
    x = torch.randn(2, ROWS, WIDTH)
    with pair.hooked():
        loss = pair.model(x)
    with torch.no_grad():
        pair.model.blocks[1].up.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.bias.*Step the optimizer after"):
        loss.backward()


def test_parameter_given_other_memory_before_backward_raises():
    pair = Pair(Net)
    pair.step(0)
    with pair.hooked():
        loss = pair.model(torch.randn(2, ROWS, WIDTH))
    up = pair.model.blocks[1].up
    up.weight.data = up.weight.data * 2
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight"):
        loss.backward()
