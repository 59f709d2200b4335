"""Programs of decoders without torch: the same under every version of it."""

from collections.abc import Callable  # noqa: TC003 (as all of ours)

from offload.swap.census import Census, ModuleInfo, WeightInfo
from offload.swap.planning.program import (
    Event,
    Lookup,
    Operation,
    OperationKind,
    Program,
    Stepping,
    What,
)

ITEMSIZE = 4


class _Writer:
    """Writes a program while a decoder is walked forward and, by its tape, back."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.weights: dict[str, tuple[int, bool]] = {}  # bytes, trainable
        self.modules: list[ModuleInfo] = []
        self.operations: dict[Operation, int] = {}
        self.storages: list[int] = []
        self.uses: dict[tuple[str, ...], int] = {}
        self.events: list[Event] = []
        self.tape: list[Callable[[int], int]] = []  # from the gradient of a result to the next one
        self.held: dict[int, int] = {}  # how often what is saved is
        self.again = False  # a forward inside of backward: nothing is new

    def note(self, what: What, which: int) -> None:
        self.events.append(Event(what, which))

    def compute(self, kind: OperationKind, flops: int, nbytes: int) -> None:
        rows = self.tokens if kind == "matmul" else 0
        operation = Operation(
            name=kind, kind=kind, flops=flops, nbytes=nbytes, rows=rows, dtype="float32"
        )
        self.note(What.COMPUTE, self.operations.setdefault(operation, len(self.operations)))

    def make(self, numel: int) -> int:
        self.storages.append(numel * ITEMSIZE)
        self.note(What.ALLOCATE, len(self.storages) - 1)
        return len(self.storages) - 1

    def free(self, storage: int) -> None:
        self.note(What.FREE, storage)

    def save(self, storage: int) -> None:
        if storage not in self.held:
            self.note(What.SAVE, storage)
        self.held[storage] = self.held.get(storage, 0) + 1

    def unsave(self, *storages: int) -> None:
        for storage in storages:
            self.note(What.UNSAVE, storage)

    def forget(self, *storages: int) -> None:
        for storage in storages:
            self.held[storage] -= 1
            if not self.held[storage]:
                del self.held[storage]
                self.note(What.FORGET, storage)

    def use(self, names: tuple[str, ...]) -> None:
        self.note(What.USE, self.uses.setdefault(names, len(self.uses)))

    def weight(self, name: str, numel: int, *, trainable: bool = True) -> None:
        self.weights.setdefault(name, (numel * ITEMSIZE, trainable))

    def gradient(self, name: str) -> None:
        nbytes, trainable = self.weights[name]
        if trainable:
            self.compute("matmul", self.tokens * nbytes // 2, 2 * nbytes)
            self.free(self.make(nbytes // ITEMSIZE))
            self.note(What.GRADIENT, list(self.weights).index(name))

    # Layers: each frees what it got, and gives the storage of its result.

    def linear(self, x: int, name: str, columns: int, rows: int, *, trainable: bool = True) -> int:
        names = (f"{name}.weight",)
        if not self.again:
            self.weight(names[0], rows * columns, trainable=trainable)
            self.modules.append(ModuleInfo(name=name, weights=names))
        self.use(names)
        flops = 2 * self.tokens * rows * columns
        y = self.make(self.tokens * rows)
        self.compute("matmul", flops, ITEMSIZE * rows * columns)
        self.save(x)
        self.free(x)

        def back(gradient: int) -> int:
            self.use(names)
            before = self.make(self.tokens * columns)
            self.compute("matmul", flops, ITEMSIZE * rows * columns)
            self.unsave(x)
            self.gradient(names[0])
            self.forget(x)
            self.free(gradient)
            return before

        self.tape.append(back)
        return y

    def norm(self, x: int, name: str, width: int) -> int:
        names = (f"{name}.weight", f"{name}.bias")
        if not self.again:
            for one in names:
                self.weight(one, width)
            self.modules.append(ModuleInfo(name=name, weights=names))
        self.use(names)
        y, mean = self.make(self.tokens * width), self.make(self.tokens)
        self.compute("heavy", 0, 2 * ITEMSIZE * self.tokens * width)
        for saved in (x, mean):
            self.save(saved)
            self.free(saved)

        def back(gradient: int) -> int:
            self.unsave(x, mean)
            self.use(names)
            before = self.make(self.tokens * width)
            self.compute("heavy", 0, 3 * ITEMSIZE * self.tokens * width)
            for one in names:
                self.gradient(one)
            self.forget(x, mean)
            self.free(gradient)
            return before

        self.tape.append(back)
        return y

    def pointwise(self, x: int, wide: int, narrow: int, kind: OperationKind) -> int:
        y = self.make(self.tokens * narrow)
        self.compute(kind, 10 * self.tokens * wide, ITEMSIZE * self.tokens * (wide + narrow))
        self.save(x)
        self.free(x)

        def back(gradient: int) -> int:
            self.unsave(x)
            before = self.make(self.tokens * wide)
            self.compute(kind, 20 * self.tokens * wide, 2 * ITEMSIZE * self.tokens * wide)
            self.forget(x)
            self.free(gradient)
            return before

        self.tape.append(back)
        return y

    def back(self, gradient: int) -> int:
        for step in reversed(self.tape):
            gradient = step(gradient)
        self.tape.clear()
        return gradient


def decoder(
    *,
    blocks: int = 3,
    width: int = 256,
    tokens: int = 64,
    vocabulary: int = 1000,
    recomputed: bool = False,
    frozen: bool = False,
    fused: bool = True,
) -> Program:
    """A step of a decoder.

    Args:
        recomputed: each block saves its input alone, and runs again in backward.
        frozen: the matrices of blocks get no gradient.
    """
    writer = _Writer(tokens)

    def block(x: int, name: str) -> int:
        x = writer.norm(x, f"{name}.norm", width)
        x = writer.linear(x, f"{name}.qkv", width, 3 * width, trainable=not frozen)
        x = writer.pointwise(x, 3 * width, width, "attention")
        x = writer.linear(x, f"{name}.up", width, 4 * width, trainable=not frozen)
        x = writer.pointwise(x, 4 * width, 4 * width, "heavy")
        return writer.linear(x, f"{name}.down", 4 * width, width, trainable=not frozen)

    def recomputed_block(x: int, name: str) -> int:
        inner, writer.tape = writer.tape, []
        writer.save(x)
        before = set(writer.held)
        y = block(x, name)
        writer.tape = inner
        for storage in sorted(writer.held.keys() - before):
            writer.held.pop(storage)
            writer.note(What.FORGET, storage)
        writer.held[x] = 1  # its first layer has saved it, too

        def back(gradient: int) -> int:
            outer, writer.tape, writer.again = writer.tape, [], True
            writer.unsave(x)
            copy = writer.make(tokens * width)
            writer.free(block(copy, name))
            gradient = writer.back(gradient)
            writer.forget(x)
            writer.tape, writer.again = outer, False
            return gradient

        writer.tape.append(back)
        return y

    table = "embedding.weight"
    writer.weight(table, vocabulary * width)
    writer.note(What.FORWARD, 0)
    writer.note(What.LOOKUP, 0)
    x = writer.make(tokens * width)
    writer.compute("pointwise", 0, 2 * ITEMSIZE * tokens * width)
    for number in range(blocks):
        x = (recomputed_block if recomputed else block)(x, f"blocks.{number}")
    logits = writer.linear(x, "head", width, vocabulary)
    writer.note(What.RETURN, 0)
    loss = writer.pointwise(logits, vocabulary, 1, "heavy")
    writer.free(writer.back(loss))
    writer.gradient(table)
    writer.note(What.STEP, 0)
    names = [name for name, (_, trainable) in writer.weights.items() if trainable]
    return Program(
        census=Census(
            weights=tuple(
                WeightInfo(name=name, nbytes=nbytes, trainable=trainable)
                for name, (nbytes, trainable) in writer.weights.items()
            ),
            modules=tuple(writer.modules),
            lookups=frozenset([table]),
        ),
        itemsizes=dict.fromkeys(writer.weights, ITEMSIZE),
        buffers_nbytes=4096,
        tokens=tokens,
        operations=tuple(writer.operations),
        storages=tuple(writer.storages),
        uses=tuple(writer.uses),
        lookups=(Lookup(weight=table, rows=tokens),),
        events=tuple(writer.events),
        stepping=Stepping(
            name="AdamW",
            states_nbytes={name: (writer.weights[name][0],) * 2 for name in names},
            fused=fused,
        ),
    )
