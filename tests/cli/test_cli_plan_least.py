"""A budget that ``offload plan`` names trains, and what a script holds is counted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from offload.planner.baseline import measure_baseline
from offload.planner.script_memory import Held
from offload.planner.scripts import _trace
from offload.swap.planning.program import Product
from offload.swap.state_precision import EXACT

MIB = 1 << 20
SMALL = """
import sys, torch
{first}
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
model(torch.ones(2, 300)).sum().backward()
"""
LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=16000, max_position_embeddings=256))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
for step in range(5):
    tokens = torch.randint(0, 16000, (1, 128))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item(), flush=True)
"""
GPT2 = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(
    n_embd=512, n_layer=8, n_head=8, vocab_size=20000, bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    tokens = torch.randint(0, 20000, (2, 64))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item(), flush=True)
"""
LAYERS = """
import torch
from torch import nn
torch.manual_seed(0)
data = torch.randn(512, 2048)
model = nn.Sequential(*[
    nn.Sequential(nn.Linear(2048, 4096), nn.GELU(), nn.Linear(4096, 2048)) for _ in range(4)])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
for step in range(5):
    batch = data[step * 64:(step + 1) * 64]
    loss = ((model(batch) - batch) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item(), flush=True)
"""
LONG_LOSS = (
    LLAMA.replace("512", "256")
    .replace("1408", "704")
    .replace("12", "4", 1)
    .replace("16000", "32000")
    .replace("(1, 128)", "(2, 512)")
    .replace("max_position_embeddings=256", "max_position_embeddings=512")
)


def _offload(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offload", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [LLAMA, GPT2, LAYERS, LONG_LOSS], ids=["llama", "gpt2", "layers", "long loss"]
)
def test_the_least_budget_that_is_named_trains_within_it(content: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(content)
    planned = _offload("plan", script, "--machine", "laptop-16gb", "--solve", "host")
    named = re.search(r"--budget host=(\d+)MiB is the least", planned.stdout)
    assert named is not None, planned.stderr
    budget, nvme = f"host={named[1]}MiB", tmp_path / "nvme"
    done = _offload("run", "--budget", budget, "--nvme", nvme, "--record", tmp_path / "r", script)
    assert done.returncode == 0, done.stderr
    plain = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:5] == plain.stdout.splitlines()
    peak = re.search(r"peak ([\d.]+) MiB", done.stderr)
    assert peak is not None
    assert float(peak[1]) <= int(named[1])


def _held(script: Path, first: str) -> Held:
    script.write_text(SMALL.format(first=first))
    return _trace(script, (), EXACT, None)[1]


def test_what_a_script_holds_when_its_model_is_called_is_counted(tmp_path: Path) -> None:
    bare = _held(tmp_path / "bare.py", "")
    data = _held(tmp_path / "data.py", "data = torch.ones(24 << 20)")
    assert abs(data.nbytes - bare.nbytes - 96 * MIB) < 2 * MIB
    assert bare.nbytes < 8 * MIB


def test_libraries_that_tracing_itself_needs_are_told_by_name(tmp_path: Path) -> None:
    assert "sympy" not in _held(tmp_path / "bare.py", "").imports
    asked = _held(tmp_path / "more.py", "import sympy, json, offload")
    assert "sympy" in asked.imports
    assert not {"json", "offload"} & set(asked.imports)


def test_a_baseline_counts_what_is_held_and_the_buffers_of_products() -> None:
    bare = measure_baseline()
    products = [
        Product(128, 512, columns, first_turned=False, second_turned=True, dtype="float32")
        for columns in (1408, 1 << 20)  # the larger one is made smaller: it would take seconds
    ]
    full = measure_baseline(Held(nbytes=40 * MIB), products)
    assert abs(full.attach_nbytes - bare.attach_nbytes - 40 * MIB) < 4 * MIB
    assert full.running_nbytes > bare.running_nbytes + 4 * MIB
