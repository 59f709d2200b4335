"""``offload plan`` in the tests: a tiny model, a script, and what the verb answers."""

import json
from typing import Any

import pytest

from offload.cli import main

CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
    "max_position_embeddings": 4096,
}  # fmt: skip
LAPTOP = ["--machine", "laptop-16gb", "--baseline", "300MiB"]
SCRIPT = """
import sys, torch
import offload
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(300, 500)
        self.b = nn.Linear(500, 300)
        self.register_buffer("scale", torch.ones(300))
    def forward(self, x):
        return self.b(torch.relu(self.a(x * self.scale)))
with offload.init(budget="host=1GiB"):
    model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
engine = offload.attach(model, optimizer, budget="host=1GiB")
print("on stdout", engine.step)
for step in range(3):
    x = torch.randn(64, 300)
    loss = ((model(x) - x) ** 2).mean()
    if "--log" in sys.argv:
        print(loss.item())
    if "--early" in sys.argv:
        sys.exit()
    loss.backward()
    raise AssertionError("backward has been seen")
"""

BATCH_SCRIPT = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
    def forward(self, input_ids, labels):
        return self.table(input_ids).sum(-1) - labels
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
ids = torch.zeros(2, 48, dtype=torch.int64)
model(input_ids=ids, labels=ids).sum().backward()
"""


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) in {0, 3}
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == 1
    return document


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["plan", *map(str, words)]) == code
    output = capsys.readouterr()
    assert output.out == ""
    return output.err
