"""PyTorch's caching allocator on a CUDA device beside our model of it, request by request."""

import random
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gpu_report import Outcome
from offload.allocator.caching import CachedBlock, CachingModel
from offload.allocator.lifetimes import events
from offload.swap.transients import record_step

_LAYERS, _WIDTH, _TOKENS = 8, 1024, 2048
_REQUESTS = 4000
_LIVING_NBYTES = 8 << 30

Event = tuple[int, int | None]  # which buffer, and its bytes when it comes


class _Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: torch.Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return result


def recorded_step() -> Iterator[Event]:
    """Three training steps of a small transformer, its activations kept."""
    with FakeTensorMode():
        model = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        batch = torch.randn(1, _TOKENS, _WIDTH)
        lives = record_step(lambda: model(batch).square().mean().backward()).lifetimes()
    for step in range(3):
        for position, comes in events(lives):
            yield step * len(lives) + position, lives[position].nbytes if comes else None


def random_requests(seed: int) -> Iterator[Event]:
    """Sizes from a byte to 128 MiB, evenly over their logarithms, given back in any order."""
    draw = random.Random(seed)
    living: dict[int, int] = {}
    for number in range(_REQUESTS):
        nbytes = int(2 ** draw.uniform(0, 27))
        if living and (draw.random() < 0.45 or sum(living.values()) + nbytes > _LIVING_NBYTES):
            gone = draw.choice(list(living))
            del living[gone]
            yield gone, None
        else:
            living[number] = nbytes
            yield number, nbytes
    for gone in living:
        yield gone, None


def model_agrees(requests: Callable[[], Iterable[Event]]) -> Outcome:
    """Bytes reserved and allocated after every request, in a memory pool of its own.

    Of free blocks of one size the lowest address is taken, and where segments lie is the driver's
    choice: single requests may differ by that. What is reserved in the end has to agree.
    """
    model, pool = CachingModel(), torch.cuda.MemPool()
    before_reserved, before_allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    tensors: dict[int, torch.Tensor] = {}
    blocks: dict[int, CachedBlock] = {}
    count = wrong = reserved = 0
    with torch.cuda.use_mem_pool(pool):
        for name, nbytes in requests():
            if nbytes is None:
                del tensors[name]
                model.free(blocks.pop(name))
            else:
                tensors[name] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                blocks[name] = model.allocate(nbytes)
            reserved = torch.cuda.memory_reserved() - before_reserved
            allocated = torch.cuda.memory_allocated() - before_allocated
            count += 1
            wrong += (reserved, allocated) != (model.reserved_nbytes, model.allocated_nbytes)
    apart = reserved / model.reserved_nbytes - 1
    del pool
    torch.cuda.empty_cache()
    told = (
        f"{wrong} of {count} requests differ; {reserved >> 20} MiB reserved in the end, "
        f"the model says {model.reserved_nbytes >> 20}"
    )
    return Outcome(told, holds=abs(apart) <= 0.01, value=apart, target="0 +- 0.01")
