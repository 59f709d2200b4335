"""The same model twice: plain, and with rows of its blocks rebuilt."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from offload.swap.tokenwise.keeper import MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.tokenwise import TokenWise

WIDTH, ROWS = 48, 256


class Mlp(nn.Module):
    """A block of row-wise operations alone."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, make_block=Mlp, count=3):
        super().__init__()
        self.blocks = nn.ModuleList(make_block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Pair:
    """The same model twice: plain, and with rows rebuilt."""

    def __init__(self, make_model, keeper=None, rounding=False, **settings):
        torch.manual_seed(0)
        self.plain = make_model()
        self.model = copy.deepcopy(self.plain)
        self.keeper = keeper or MemoryKeeper()
        self.notices = []
        settings = {"alpha": 0.5, "min_nbytes": 1024, **settings}
        self.rows = TokenWise(
            self.model,
            self.keeper,
            Settings(**settings),
            notice=self.notices.append,
            rounding=rounding,
        )

    def hooked(self):
        return torch.autograd.graph.saved_tensors_hooks(self.rows.pack, self.rows.unpack)

    def step(self, seed=0, shape=(2, ROWS, WIDTH), run=None):
        """One forward and backward of both; asserts that they agree in each bit."""
        run = run or (lambda model, x: model(x).backward())
        results = []
        for model in (self.plain, self.model):
            torch.manual_seed(seed)
            x = torch.randn(shape, requires_grad=True)
            model.zero_grad()
            if model is self.model:
                with self.hooked():
                    run(model, x)
            else:
                run(model, x)
            results.append([x.grad, *(one.grad for one in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        return self

    def reports(self):
        return self.rows.report()

    def active(self):
        """Whether every block rebuilds rows."""
        return all(
            r.gave_up is None and r.cut < r.rows and r.rebuilt_nbytes for r in self.reports()
        )
