"""Building, loading, saving and resuming: the store holds the very bits of a plain run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import ConfigError, StoreMismatchError

STEPS = 20


class Net(nn.Module):
    """Tied, re-registered, with dropout and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 128)
        self.middle = nn.Sequential(nn.Linear(128, 256), nn.Dropout(0.2), nn.Linear(256, 128))
        self.norm = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.middle[2].weight = nn.Parameter(torch.randn(128, 256) * 0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.middle(self.embedding(tokens))))


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(300, (64,), generator=generator)
        loss = F.cross_entropy(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_init_draws_the_same_numbers_and_trains_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = Net()
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    with offload.init(budget="8GiB", nvme=tmp_path):
        built = Net()
    assert torch.equal(torch.rand(1), after_plain)
    assert same_state(plain, built)
    plain_optimizer, optimizer = adamw(plain), adamw(built)
    torch.manual_seed(4)
    expected = train(plain, plain_optimizer, 0, STEPS)
    with offload.attach(built, optimizer) as engine:
        assert built.head.weight is built.embedding.weight
        torch.manual_seed(4)
        assert train(built, optimizer, 0, STEPS) == expected
        assert engine.step == STEPS
    assert same_state(plain, built)


@pytest.mark.parametrize("commit", ["step", "manual"])
def test_resuming_continues_bit_for_bit(commit: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = Net()
    begun = copy.deepcopy(plain)
    torch.manual_seed(4)
    plain_optimizer = adamw(plain)
    expected = train(plain, plain_optimizer, 0, STEPS)
    torch.manual_seed(4)
    optimizer = adamw(begun)
    losses = []
    with offload.attach(begun, optimizer, nvme=tmp_path, budget="8GiB", commit=commit) as engine:
        for step in range(10):
            losses += train(begun, optimizer, step, step + 1)
            if commit == "manual":
                engine.commit({"done": step + 1})
    torch.manual_seed(99)  # another model and other numbers: all comes from the store
    model = Net()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB", commit=commit) as engine:
        assert engine.resumed
        assert engine.step == 10
        assert engine.extra == ({"done": 10} if commit == "manual" else {})
        losses += train(model, optimizer, 10, STEPS)
    assert losses == expected
    assert same_state(plain, model)
    mine, theirs = optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"]
    for index, state in theirs.items():
        assert all(torch.equal(value, mine[index][name]) for name, value in state.items())


def test_uncommitted_steps_are_discarded(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB", commit="manual") as engine:
        train(model, optimizer, 0, 3)
        engine.commit()
        committed = copy.deepcopy(model.state_dict())
        train(model, optimizer, 3, 7)
    other = Net()
    with offload.attach(other, adamw(other), nvme=tmp_path, budget="8GiB") as engine:
        assert engine.step == 3
        assert all(torch.equal(v, committed[name]) for name, v in other.state_dict().items())


def test_without_commits_there_is_one_slot_and_nothing_to_resume(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = Net()
    model = copy.deepcopy(plain)
    torch.manual_seed(4)
    expected = train(plain, adamw(plain), 0, STEPS)
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB", commit="never") as engine:
        torch.manual_seed(4)
        assert train(model, optimizer, 0, STEPS) == expected
        with pytest.raises(ConfigError, match="keeps no slot"):
            engine.commit()
        one_slot = sum(stored.nbytes for stored in engine.weights.store.tensors.values())
        used = engine.weights.store.tier.arena.current_nbytes
        assert one_slot <= used < 1.2 * one_slot  # whole pages
    assert same_state(plain, model)
    other = Net()
    with offload.attach(other, adamw(other), nvme=tmp_path, budget="8GiB") as engine:
        assert not engine.resumed


def test_going_on_without_commits_keeps_the_last_one(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB"):
        train(model, optimizer, 0, 2)
        committed = copy.deepcopy(model.state_dict())
    again = Net()
    optimizer = adamw(again)
    with offload.attach(again, optimizer, nvme=tmp_path, budget="8GiB", commit="never"):
        train(again, optimizer, 2, 5)
    last = Net()
    with offload.attach(last, adamw(last), nvme=tmp_path, budget="8GiB") as engine:
        assert engine.step == 2
        assert all(torch.equal(v, committed[name]) for name, v in last.state_dict().items())


def test_resume_never_and_must(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(ConfigError, match="holds no commit"):
        offload.attach(model, adamw(model), nvme=tmp_path, budget="8GiB", resume="must")
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB"):
        train(model, optimizer, 0, 2)
    fresh = Net()
    before = copy.deepcopy(fresh.state_dict())
    with offload.attach(fresh, adamw(fresh), nvme=tmp_path, budget="8GiB", resume="never") as e:
        assert (e.step, e.resumed) == (0, False)
        assert all(torch.equal(v, before[name]) for name, v in fresh.state_dict().items())


def test_a_store_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, nvme=tmp_path, budget="8GiB"):
        train(model, optimizer, 0, 1)
    other = nn.Linear(300, 300)
    with pytest.raises(StoreMismatchError, match="bias is None there"):
        offload.attach(other, adamw(other), nvme=tmp_path, budget="8GiB")
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(StoreMismatchError, match="its optimizer is AdamW, this one is SGD"):
        offload.attach(model, sgd, nvme=tmp_path, budget="8GiB")


CHECKPOINTS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=600, n_positions=32, n_embd=128, n_layer=2, n_head=2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=600, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    ),
    "qwen": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=600, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("shards", ["10GB", "300KB"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_pretrained_equals_transformers_own(name: str, shards: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    CHECKPOINTS[name]().save_pretrained(tmp_path / "checkpoint", max_shard_size=shards)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    model = offload.load_pretrained(tmp_path / "checkpoint", budget="8GiB", nvme=tmp_path / "nvme")
    assert type(model) is type(expected)
    assert same_state(expected, model)
    tokens = torch.randint(600, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    optimizer = adamw(model)
    with offload.attach(model, optimizer) as engine:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        engine.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert same_state(model, saved)
        assert not same_state(expected, saved)
