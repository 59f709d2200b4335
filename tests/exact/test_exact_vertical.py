"""Micro-batches that go through the model together give the bits of a loop over them."""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from test_exact_optimizers import OPTIMIZERS
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import ConfigError, StepInterruptedError, UnsupportedError
from offload.engine import Engine
from offload.tiers.events import Move, StepFinished

STEPS = 6
MANY_STEPS = 20
VOCABULARY, WIDTH = 300, 96
IN_BACKWARD = {"step_in_backward": True}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = {thread.name for thread in threading.enumerate()}
    yield
    after = {thread.name for thread in threading.enumerate()}
    assert not {name for name in after - before if "micro-batch" in name}


@pytest.fixture
def compare(compare: Any) -> Any:
    """As everywhere, without the flush of a commit behind each step."""

    def run(*arguments: Any, **options: Any) -> Any:
        return compare(*arguments, commit="never", **options)

    return run


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return out


class Net(nn.Module):
    """Tied embeddings, blocks, a batch norm; blocks may be recomputed or skipped."""

    def __init__(
        self, *, dropout: float = 0.0, reentrant: bool | None = None, statistics: bool = True
    ) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=statistics)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, uses: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
        x = self.embedding(tokens)
        for index in uses:
            block = self.blocks[index]
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        out: torch.Tensor = self.head(self.norm(x.flatten(0, 1)))
        return out


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def token_batches(count: int, seed: int, rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (rows, 16), generator=generator) for _ in range(count)]


def loss_of(model: Any, tokens: torch.Tensor, *uses: Any) -> torch.Tensor:
    return F.cross_entropy(model(tokens, *uses), tokens.flatten())


def accumulate(engine: Engine | None, batches: list[Any], forward: Any) -> list[float]:
    """Together under an engine, a loop without."""
    if engine is not None:
        return [loss.item() for loss in engine.accumulate(batches, forward)]
    losses = []
    for batch in batches:
        loss = forward(batch)
        loss.backward()
        losses.append(loss.item())
    return losses


def loop(count: int, steps: int = STEPS, **changes: Any) -> Any:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(steps):
            batches = token_batches(count, step, **changes)
            values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / count)
            optimizer.step()
            optimizer.zero_grad()
        return values

    return run


def moves_of(engine: Engine, role: str, side: str) -> list[Move]:
    events: Any = engine._journal.recorder.events  # type: ignore[attr-defined]
    moves = [event for event in events if isinstance(event, Move) and event.role == role]
    return [move for move in moves if getattr(move, side).startswith("file")]


# The bits.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer(name: str, compare: Any) -> None:
    same = compare(Net, lambda model: OPTIMIZERS[name](list(model.parameters())), loop(3, 4))
    assert "vertical" not in " ".join(same.engine.notices)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_micro_batches(count: int, compare: Any) -> None:
    compare(Net, adamw, loop(count))


@pytest.mark.parametrize("config", [{}, {**IN_BACKWARD, "accumulation_steps": 4}])
def test_many_steps(config: dict[str, Any], compare: Any) -> None:
    same = compare(lambda: Net(dropout=0.1), adamw, loop(4, MANY_STEPS), config=config)
    assert same.engine.step == MANY_STEPS


@pytest.mark.parametrize("config", [{}, IN_BACKWARD])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks(reentrant: bool, config: dict[str, Any], compare: Any) -> None:
    config = {**config, "accumulation_steps": 3} if config else {}
    compare(lambda: Net(reentrant=reentrant, dropout=0.1), adamw, loop(3), config=config)


def test_dropout_draws_the_same_numbers(compare: Any) -> None:
    same = compare(lambda: Net(dropout=0.2), adamw, loop(3))
    assert not any("drew other numbers" in notice for notice in same.engine.notices)


def test_shapes_that_differ(compare: Any) -> None:
    """Dropout's numbers too: what is not known yet runs one after the other once."""

    def uneven(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            rows = [1 + (step + part) % 4 for part in range(3)]
            batches = [token_batches(1, step, rows=count)[0] for count in rows]
            values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / 3)
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(lambda: Net(dropout=0.1), adamw, uneven)
    assert not any("drew other numbers" in notice for notice in same.engine.notices)


def test_numbers_that_were_not_foretold_are_told(starve: Any) -> None:
    model = Net()
    engine = starve(model, adamw(model))

    def forward(count: int) -> torch.Tensor:
        torch.randn(int(count))
        return loss_of(model, token_batches(1, 0)[0])

    for counts in ([20, 20], [20, 20], [40, 20]):
        assert not any("drew other numbers" in notice for notice in engine.notices)
        engine.accumulate(counts, forward)
    assert any("drew other numbers" in notice for notice in engine.notices)


def test_the_step_in_backward(compare: Any) -> None:
    same = compare(Net, adamw, loop(4), config={**IN_BACKWARD, "accumulation_steps": 4})
    events = same.engine._journal.recorder.events
    first = next(at for at, event in enumerate(events) if isinstance(event, StepFinished))
    later = [event for event in events[first:] if isinstance(event, Move)]  # one by one before
    moved = {event.key for event in later if event.role == "gradient"}
    assert moved <= same.engine._census.lookups  # of which only rows are in memory


def test_several_calls_make_one_step(compare: Any) -> None:
    def twice(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for half in range(2):
                batches = token_batches(2, 2 * step + half)
                values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / 4)
            values.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, twice)


def test_together_and_in_a_loop_by_turns(compare: Any) -> None:
    def mixed(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            chosen = engine if step % 3 else None
            batches = token_batches(3, step)
            values += accumulate(chosen, batches, lambda tokens: loss_of(model, tokens) / 3)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                values.append(loss_of(model.eval(), batches[0]).item())
            model.train()
        return values

    compare(Net, adamw, mixed)


WAYS = [(0, 1, 2, 3), (3, 1), (0, 0, 2, 3), (2,), (3, 2, 1, 0), (0, 1, 2, 3)]


@pytest.mark.parametrize("config", [{}, {**IN_BACKWARD, "accumulation_steps": 6}])
def test_micro_batches_that_go_different_ways(config: dict[str, Any], compare: Any) -> None:
    """Blocks that are skipped, used twice, in another order: each sum has the loop's order."""

    def different(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            batches = list(zip(token_batches(6, step), WAYS[step % 6 :] + WAYS, strict=False))
            values += accumulate(engine, batches, lambda batch: loss_of(model, *batch) / 6)
            optimizer.step()
            optimizer.zero_grad()
        return values

    # Running statistics are not sums of parts: they come in the order of the turns.
    compare(lambda: Net(statistics=False), adamw, different, config=config)


def test_a_reentrant_checkpoint_that_is_used_twice_is_refused(starve: Any) -> None:
    model = Net(reentrant=True)
    engine = starve(model, adamw(model))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(model, tokens, (0, 1, 0, 1))

    engine.accumulate(token_batches(2, 0), forward)  # one after the other, to see what is drawn
    model.zero_grad()
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        engine.accumulate(token_batches(2, 0), forward)


def test_settings_of_the_caller_hold_in_each_micro_batch(compare: Any) -> None:
    def autocast(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                values += accumulate(
                    engine, token_batches(3, step), lambda tokens: loss_of(model, tokens)
                )
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, autocast)


def test_settings_inside_a_micro_batch_are_its_own(compare: Any) -> None:
    """One switches what belongs to the process around the model; the others must not see it."""

    def switching(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        def forward(batch: tuple[int, torch.Tensor]) -> torch.Tensor:
            index, tokens = batch
            if index != 1:
                return loss_of(model, tokens)
            torch.set_default_dtype(torch.float64)
            with (
                torch.autocast("cpu", torch.bfloat16),
                torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
            ):
                loss = loss_of(model, tokens)
            torch.set_default_dtype(torch.float32)
            return loss + torch.zeros(1)[0]

        before = torch.nn.attention._cur_sdpa_kernel_backends()
        values = accumulate(engine, list(enumerate(token_batches(3, 0))), forward)
        optimizer.step()
        assert torch.nn.attention._cur_sdpa_kernel_backends() == before
        assert torch.get_default_dtype() == torch.float32
        return values

    compare(Net, adamw, switching)


def llama(checkpointing: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )
    model = transformers.LlamaForCausalLM(config)
    if checkpointing:
        old = type(model).gradient_checkpointing_enable
        enable = getattr(type(model), "activation_checkpointing_enable", old)
        enable(model, {"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(checkpointing: bool, compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        model.train()
        values = []
        for step in range(STEPS):
            values += accumulate(
                engine,
                token_batches(3, step),
                lambda tokens: model(input_ids=tokens, labels=tokens).loss / 3,
            )
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(lambda: llama(checkpointing), adamw, train)
    assert "weight" in same.moved_roles()


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(200, 200) for _ in range(3))
        self.right = nn.ModuleList(nn.Linear(200, 200) for _ in range(3))
        self.head = nn.Linear(200, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for block in self.left:
            x = block(x).relu()
        for block in self.right:
            y = block(y + 1).relu()
        out: torch.Tensor = self.head(x + y)
        return out


def test_two_lists_of_blocks_and_inputs_with_gradients(compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            for batch in batches:
                batch.requires_grad_()
            values += accumulate(engine, batches, lambda x: model(x).square().mean())
            values += [float(batch.grad.norm()) for batch in batches if batch.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(TwoTowers, adamw, train)


# What moves.


def moved_nbytes(starve: Any, tmp_path: Any, count: int, **options: Any) -> dict[str, int]:
    """Bytes of one step, the third, by role and direction; and how often each gradient left."""
    torch.manual_seed(0)
    model = TwoTowers()
    engine = starve(model, adamw(model), nvme=tmp_path / f"{count}", **options)
    engine.weights.window_nbytes = 400_000  # two layers of nine
    for step in range(3):
        engine._journal.recorder.events.clear()
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randn(5, 200, generator=generator) for _ in range(count)]
        engine.accumulate(batches, lambda x: model(x).square().mean() / count)
        engine._runtime.lanes.drain()
        read = {role: moves_of(engine, role, "src") for role in ("weight", "gradient")}
        written = {role: moves_of(engine, role, "dst") for role in ("weight", "gradient")}
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    times = Counter(move.key for move in written["gradient"])
    assert set(times.values()) <= {1}
    return {
        **{f"{role} read": sum(move.nbytes for move in moves) for role, moves in read.items()},
        **{f"{role} out": sum(move.nbytes for move in moves) for role, moves in written.items()},
    }


def test_what_moves_does_not_depend_on_the_number(starve: Any, tmp_path: Any) -> None:
    one = moved_nbytes(starve, tmp_path, 1)
    streamed = 7 * 200 * 201 * 4
    assert one["weight read"] >= streamed
    assert one["gradient out"] == 7 * 200 * 200 * 4
    for count in (2, 4, 8):
        many = moved_nbytes(starve, tmp_path, count)
        assert many["weight read"] <= one["weight read"] + 2 * 200 * 200 * 4
        assert many["gradient out"] == one["gradient out"]
        assert many["weight out"] == one["weight out"] == many["gradient read"] == 0


def test_no_gradient_moves_with_the_step_in_backward(starve: Any, tmp_path: Any) -> None:
    config = {**IN_BACKWARD, "accumulation_steps": 4}
    moved = moved_nbytes(starve, tmp_path, 4, config=config)
    assert moved["gradient out"] == moved["gradient read"] == 0


# Errors.


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_error_in_one_micro_batch(where: str, which: int, starve: Any) -> None:
    torch.manual_seed(0)
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer, twin_optimizer = adamw(model), adamw(twin)
    engine = starve(model, optimizer)
    batches = token_batches(3, 0)

    def fail(_: Any) -> None:
        raise ArithmeticError("out of luck")

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        chosen = tokens is batches[which]
        x = model.embedding(tokens)
        for index, block in enumerate(model.blocks):
            x = block(x)
            if chosen and index == 2 and where == "forward":
                fail(x)
            if chosen and index == 2 and where == "backward":
                x.register_hook(fail)
        loss = F.cross_entropy(model.head(model.norm(x.flatten(0, 1))), tokens.flatten())
        return loss if not chosen or where != "loss" else "no tensor"  # type: ignore[return-value]

    expected = UnsupportedError if where == "loss" else ArithmeticError
    with pytest.raises(expected) as caught:
        engine.accumulate(batches, forward)
    assert caught.value.__notes__ == [f"in micro-batch {which} of 3"]
    optimizer.zero_grad()
    model.norm.load_state_dict(twin.norm.state_dict())
    for step in range(3):
        mine = accumulate(engine, token_batches(3, step), lambda tokens: loss_of(model, tokens))
        theirs = accumulate(None, token_batches(3, step), lambda tokens: loss_of(twin, tokens))
        assert mine == theirs
        optimizer.step()
        twin_optimizer.step()
        optimizer.zero_grad()
        twin_optimizer.zero_grad()


def test_an_error_in_a_step_in_backward_stops_the_engine(starve: Any) -> None:
    model = Net()
    optimizer = adamw(model)
    engine = starve(model, optimizer, config={**IN_BACKWARD, "accumulation_steps": 2})

    def fail(_: Any) -> None:
        raise ArithmeticError("out of luck")

    engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))
    optimizer.step()
    optimizer.zero_grad()
    model.blocks[0].up.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))
    with pytest.raises(StepInterruptedError):
        optimizer.step()
    with pytest.raises(StepInterruptedError):
        engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))


def test_what_is_refused(starve: Any, tmp_path: Any) -> None:
    model = Net()
    engine = starve(model, adamw(model), config={**IN_BACKWARD, "accumulation_steps": 2})

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(model, tokens)

    with pytest.raises(ConfigError, match="no micro-batch"):
        engine.accumulate([], forward)
    with pytest.raises(ConfigError, match="accumulation_steps=2: set it to 3"):
        engine.accumulate(token_batches(3, 0), forward)
    with pytest.raises(ConfigError, match="no module 'layers'"):
        engine.accumulate(token_batches(2, 0), forward, blocks=["layers"])
    with pytest.raises(ConfigError, match="inside of a forward"):
        engine.accumulate(
            token_batches(2, 0), lambda _: engine.accumulate(token_batches(2, 0), forward)[0]
        )
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        engine.accumulate(token_batches(2, 0), forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, as it imports its compiler
        compiled = torch.compile(forward, backend="eager")
    with pytest.raises(UnsupportedError, match="compile"):
        engine.accumulate(token_batches(2, 0), compiled)
    engine.detach()
    with pytest.raises(ConfigError, match="detached"):
        engine.accumulate(token_batches(2, 0), forward)
    other = Net()
    tokenwise = starve(
        other, adamw(other), nvme=tmp_path / "other", config={"recompute": "tokenwise"}
    )
    with pytest.raises(UnsupportedError, match="token-wise"):
        tokenwise.accumulate(token_batches(2, 0), lambda tokens: loss_of(other, tokens))


def test_a_model_without_blocks_is_a_loop(compare: Any) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 200))

    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            values += accumulate(engine, batches, lambda x: model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(make, adamw, train)
    assert [notice for notice in same.engine.notices if "one after the other" in notice]


def test_blocks_can_be_named(compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            if engine is None:
                values += accumulate(None, batches, lambda x: model(x).square().mean())
            else:
                losses = engine.accumulate(
                    batches, lambda x: model(x).square().mean(), blocks=["0", "2"]
                )
                values += [loss.item() for loss in losses]
            optimizer.step()
            optimizer.zero_grad()
        return values

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 200))

    compare(make, adamw, train)
