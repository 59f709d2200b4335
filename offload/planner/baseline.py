"""What a process takes without a model: measured by training a tiny one in a child process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from offload.allocator.errors import OffloadError
from offload.planner.script_memory import Held
from offload.swap.planning.predict import Baseline
from offload.swap.planning.program import Product

# Where it is given rather than measured.
RUNNING_NBYTES = 25 << 20
_NOTHING = Held()
# Buffers are as large for larger products, which would take long.
_MOST_FLOPS = 8e9

_JOB = """\
import json, sys
import {imports}
import torch
import offload
from offload.tiers.hostmem import resident_nbytes

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4096, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.up = torch.nn.Linear(64, 192)
        self.head = torch.nn.Linear(64, 4096)

    def forward(self, tokens):
        q, k, v = (each.unflatten(-1, (4, 16)).transpose(1, 2) for each in
                   self.up(self.norm(self.embedding(tokens))).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(torch.nn.functional.gelu(mixed.transpose(1, 2).flatten(2)))

with offload.init(budget="host=64GiB", nvme=sys.argv[1]):
    model = Tiny()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
engine = offload.attach(model, optimizer)
engine.keep_streaming()
tokens = torch.zeros(1, 256, dtype=torch.int64)
for _ in range(2):
    logits = model(tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    del logits
    optimizer.step()
    optimizer.zero_grad()
for rows, inner, columns, first_turned, second_turned, dtype in {products}:
    def matrix(height, width, turned):
        shape = (width, height) if turned else (height, width)
        made = torch.zeros(shape, dtype=getattr(torch, dtype))
        return made.t() if turned else made
    matrix(rows, inner, first_turned) @ matrix(inner, columns, second_turned)
engine.weights.evict_streaming()
attach_nbytes = engine.plan.baseline_nbytes
print(json.dumps([attach_nbytes, max(resident_nbytes()[0] - attach_nbytes, 0)]))
"""


def measure_baseline(held: Held = _NOTHING, products: Sequence[Product] = ()) -> Baseline:
    """The resident set of a process that has attached to a tiny model, and holds ``held``.

    Args:
        products: of the model that will be trained: libraries keep buffers for them, of sizes that
            depend on which ones came before (16.8 MB at most were seen of MKL's).

    Raises:
        OffloadError: the child failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as directory:
        job = _JOB.format(
            imports=", ".join(["os", *held.imports]),
            products=[tuple(_bounded(product)) for product in products],
        )
        done = subprocess.run(
            [sys.executable, "-c", job, directory], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise OffloadError(
            "can't measure what a process takes without a model "
            f"({said[-1] if said else f'exit code {done.returncode}'}): give it with --baseline"
        )
    attach_nbytes, running_nbytes = json.loads(done.stdout.splitlines()[-1])
    return Baseline(attach_nbytes=attach_nbytes + held.nbytes, running_nbytes=running_nbytes)


def _bounded(product: Product) -> Product:
    """A smaller product, if this one is large, whose buffers are about as large."""
    while 2 * product.rows * product.inner * product.columns > _MOST_FLOPS:
        longest = max(("rows", "inner", "columns"), key=lambda name: int(getattr(product, name)))
        product = product._replace(**{longest: getattr(product, longest) // 2})
    return product
