"""What the tests of lookups share: tables, tokens, losses, and bits to compare."""

import torch
from torch import nn
from torch.nn import functional as F

ROWS, WIDTH = 600, 64


def tokens(seed, *shape):
    return torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(seed))


def lookup(**options):
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, **options)


def loss_of(model, indices):
    found = model(indices)
    return (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(bits(one), bits(other))


class Several(nn.Module):
    """Lookups and a head that share a weight."""

    def __init__(self, lookups, head):
        super().__init__()
        torch.manual_seed(0)
        self.lookups = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(lookups))
        for other in self.lookups[1:]:
            other.weight = self.lookups[0].weight
        self.head = head

    def forward(self, indices):
        weight = self.lookups[0].weight
        x = self.lookups[0](indices).tanh()
        for at, other in enumerate(self.lookups[1:], 1):
            x = (x + other((indices + at) % ROWS)).tanh()
        return F.linear(x, weight) if self.head else x
