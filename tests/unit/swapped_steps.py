"""A step of a small model, with what autograd saves swapped or not: every bit of its gradients."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 160


class Net(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(WIDTH))
            for _ in range(3)
        )
        self.recompute = recompute

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.recompute is None else checkpoint(block, x, **self.recompute))
        return x.square().mean()


def inputs():
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(make_loss, context=None, *, inside=False, model=None):
    """Bits of every gradient of one step."""
    torch.manual_seed(0)
    x = inputs()
    if context is None:
        make_loss(x).backward()
    else:
        with context:
            loss = make_loss(x)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    parameters = list(model.parameters()) if model is not None else []
    found = [x.grad, *(parameter.grad for parameter in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return found


def assert_same(found, right):
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        assert one is other is None or torch.equal(one, other)
