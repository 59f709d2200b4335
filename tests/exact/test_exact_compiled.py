"""Compiled models train under Offload as the same compiled models do in memory."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine

STEPS = 2  # compiling is slow, and each step runs the same code
VOCABULARY = 512
BACKEND = "aot_eager"

# PyTorch's compiler looks at each tensor's ``.grad``.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
            for _ in range(1)
        )
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(128, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(self.dropout(x))
        return self.head(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Each test compiles by itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# What compiles the model, and gives the function that is trained.


def whole(model: nn.Module, backend: str) -> Callable[..., torch.Tensor]:
    compiled = torch.compile(model, backend=backend)
    return lambda tokens: loss_of(compiled, tokens)


def by_method(model: nn.Module, backend: str) -> Callable[..., torch.Tensor]:
    model.compile(backend=backend)
    return lambda tokens: loss_of(model, tokens)


def block_by_block(model: Any, backend: str) -> Callable[..., torch.Tensor]:
    for block in model.blocks:
        block.compile(backend=backend)
    return lambda tokens: loss_of(model, tokens)


def around_the_loss(model: nn.Module, backend: str) -> Callable[..., torch.Tensor]:
    return torch.compile(lambda tokens: loss_of(model, tokens), backend=backend)


WAYS = [whole, by_method, block_by_block, around_the_loss]


def train(model: Any, optimizer: Any, step_loss: Callable[..., torch.Tensor]) -> list[float]:
    values = []
    for _ in range(STEPS):
        loss = step_loss(tokens_of(4, 32))
        loss.backward()
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            values += [loss.item(), step_loss(tokens_of(2, 32)).item()]
        model.train()
    return values


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model(way: Any, compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        return train(model, optimizer, way(model, BACKEND))

    same = compare(Net, adamw, loop)
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}


@pytest.mark.parametrize("way", [whole, block_by_block])
def test_a_model_that_ran_compiled_before(way: Any, starve: Any, tmp_path: Any) -> None:
    """The compiler doesn't look whether hooks have come or gone: what it made before must go."""

    def run(model: nn.Module, nvme: str = "", *, warm: bool = True) -> tuple[list[float], int]:
        optimizer, packed = adamw(model), 0
        step_loss = way(model, BACKEND)
        if warm:
            step_loss(tokens_of(4, 32)).backward()
            optimizer.zero_grad()
        torch.manual_seed(1)
        if nvme:
            engine = starve(model, optimizer, nvme=tmp_path / nvme)
            values = train(model, optimizer, step_loss)
            packed = engine.activations._packed_count
            engine.detach()
        else:
            values = train(model, optimizer, step_loss)
        return values + train(model, optimizer, step_loss), packed  # on without us

    torch.manual_seed(0)
    model = Net()
    models = [copy.deepcopy(model) for _ in range(2)]
    plain, _ = run(model)
    late, late_count = run(models[0], "late")
    early, early_count = run(models[1], "early", warm=False)
    assert late == early == plain
    assert late_count == early_count > 0


def test_a_compiled_model_is_attached_by_its_plain_names(starve: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    compiled: Any = torch.compile(model, backend=BACKEND)
    engine = starve(compiled, adamw(compiled))
    assert engine.model is model
    loss_of(compiled, tokens_of(2, 32)).backward()
    engine.optimizer.step()
    engine.detach()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    twin = Net()
    again = starve(twin, adamw(twin))  # the same store, not compiled
    assert again.resumed
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("way", ["model", "loss"])
def test_one_graph_for_all_is_refused_with_what_to_do(way: str, starve: Any) -> None:
    model = Net()
    starve(model, adamw(model))
    if way == "model":
        compiled: Any = torch.compile(model, backend=BACKEND, fullgraph=True)
    else:
        compiled = torch.compile(
            lambda tokens: loss_of(model, tokens), backend=BACKEND, fullgraph=True
        )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile without fullgraph=True, or"):
        compiled(tokens_of(2, 32))
    loss_of(model, tokens_of(2, 32)).backward()  # nothing is left behind


def test_compiled_functions_inside_a_model(compare: Any) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(128, 512), nn.Linear(256, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(gate(self.up(x)))

    @torch.compile(backend=BACKEND, fullgraph=True)
    def gate(x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        return F.silu(one) * other

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        def step_loss(tokens: torch.Tensor) -> torch.Tensor:
            return model((tokens / VOCABULARY).repeat(64, 1)).square().mean()

        return train(model, optimizer, step_loss)

    same = compare(lambda: nn.Sequential(nn.Linear(32, 128), Gated(), Gated()), adamw, loop)
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}
