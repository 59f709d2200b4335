"""Finds in a recorded program what can be rebuilt from few rows, and from which tensors.

A *target* is a storage that autograd saved and whose bytes come, operation by operation, from
*sources* by row-wise operations alone. Sources are the block's inputs, tensors that are swapped
whole anyway (attention's output, a dropout's mask, whatever did not verify), and an operation's
result that autograd does not save where keeping it costs less than it lets be rebuilt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from offload.swap.tokenwise.program import Node, Program
from offload.swap.tokenwise.rows import (
    DRAWING,
    FACTORIES,
    RULES,
    Axis,
    Call,
    base_name,
    guess_axis,
    row_axes,
)

State: TypeAlias = Literal["source", "fixed", "rows", "opaque"]
"""``fixed``: the same whatever the rows; ``rows``: rebuilt row by row; ``opaque``: neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A storage that is rebuilt: the value that fills it, and where that has its rows.

    ``part``: targets of different parts have no operation in common, so each part is rebuilt
    when backward comes to it: what comes before attention, say, after what comes behind it.
    """

    part: int = 0
    storage: int
    root: int
    axis: Axis
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What is rebuilt, and how.

    Attributes:
        nodes: indices of the operations to execute, in order.
        sources: values that are kept or swapped whole for it.
        axes: where each value has its rows.
        whole: why each other saved storage is swapped whole, by storage.
        source_nbytes: of the sources that would not have been swapped otherwise.
        whole_nbytes: of everything that is swapped whole, sources included, each storage once.
    """

    program: Program
    targets: tuple[Target, ...]
    nodes: tuple[int, ...]
    sources: tuple[int, ...]
    axes: Mapping[int, Axis | None]
    whole: Mapping[int, str]
    source_nbytes: int
    whole_nbytes: int

    @property
    def target_nbytes(self) -> int:
        """Bytes of the storages that are rebuilt, all rows."""
        return sum(target.nbytes for target in self.targets)


@dataclass(slots=True)
class _Known:
    """What is known of each value during one walk through a program."""

    states: dict[int, State] = field(default_factory=dict)
    axes: dict[int, Axis | None] = field(default_factory=dict)
    barriers: dict[int, str] = field(default_factory=dict)  # why a value is opaque
    results: list[int] = field(default_factory=list)  # direct results of such operations


def find_chain(
    program: Program, *, min_nbytes: int, failed: Mapping[int, str] | None = None
) -> Chain:
    """The largest set of saved storages that can be rebuilt row by row.

    Args:
        program: what the block did.
        min_nbytes: smaller storages are swapped whole.
        failed: storages whose rebuilt rows were found to be wrong, with the reason.
    """
    failed = failed or {}
    roots = _saved_roots(program)
    bought: set[int] = set()  # sources that would not be swapped otherwise
    known = _with_free_sources(program, bought, roots, failed)
    chain = _chain_of(program, known, roots, min_nbytes, failed)
    for value in [value for value in known.results if _may_be_source(program, known, value)]:
        if program.values[value].storage in roots:
            continue
        trial = _with_free_sources(program, bought | {value}, roots, failed)
        longer = _chain_of(program, trial, roots, min_nbytes, failed)
        if longer.whole_nbytes < chain.whole_nbytes:
            bought.add(value)
            chain = longer
    if chain.target_nbytes <= chain.source_nbytes:
        return _nothing_of(chain)
    return chain


def _nothing_of(chain: Chain) -> Chain:
    """Rebuilding would cost more bytes than it saves: everything is swapped whole."""
    reason = "its sources are larger than what they rebuild"
    whole = {**chain.whole, **{target.storage: reason for target in chain.targets}}
    nbytes = sum(chain.program.storage_nbytes[storage] for storage in whole)
    return replace(
        chain, targets=(), nodes=(), sources=(), whole=whole, source_nbytes=0, whole_nbytes=nbytes
    )


def _with_free_sources(
    program: Program, bought: set[int], roots: Mapping[int, int], failed: Mapping[int, str]
) -> _Known:
    """What is known once each saved tensor that can't be rebuilt serves those after it."""
    sources = set(bought)
    while True:
        known = _classify(program, sources, failed)
        new = _next_source(program, known, roots)
        if new is None:
            return known
        sources.add(new)


def _saved_roots(program: Program) -> dict[int, int]:
    """The value that fills each saved storage, where there is one and it is always the same."""
    found: dict[int, set[int | None]] = {}
    for slot in program.slots:
        found.setdefault(slot.storage, set()).add(slot.root)
    return {
        storage: root
        for storage, roots in found.items()
        if len(roots) == 1 and (root := next(iter(roots))) is not None
    }


def _overwritten(program: Program) -> dict[int, int]:
    """By storage: the index of the last node that wrote into it in place."""
    return {
        program.values[value].storage: index
        for index, node in enumerate(program.nodes)
        for value in node.mutated
    }


def _classify(program: Program, sources: set[int], failed: Mapping[int, str]) -> _Known:
    known = _Known()
    overwritten = _overwritten(program)
    given: set[int] = set()  # storages of sources, whose views are as right as these
    for index, value in enumerate(program.values):
        if value.kind == "made":
            continue
        axis = guess_axis(value.shape, program.rows) if value.kind == "external" else None
        known.axes[index] = axis
        if value.kind == "parameter":
            known.states[index] = "fixed"
        elif value.kind == "external":
            known.states[index] = "source"
        if value.kind == "unknown" or value.storage in overwritten:
            known.states[index] = "opaque"
            known.barriers[index] = "it was changed in place"
    for index, node in enumerate(program.nodes):
        _step(program, known, node)
        for out in node.outs:
            storage = program.values[out].storage
            if out in sources and overwritten.get(storage, -1) <= index:
                known.states[out] = "source"
                given.add(storage)
            elif storage in failed and storage not in given and known.states[out] == "rows":
                known.states[out] = "opaque"
                known.barriers[out] = failed[storage]
    return known


def _step(program: Program, known: _Known, node: Node) -> None:
    """Classify the results of one operation."""
    refs = node.refs()
    states = {
        "fixed"
        if known.states[value] == "source" and known.axes[value] is None
        else known.states[value]
        for value in refs
        if program.values[value].nbytes  # an empty cache is no obstacle
    }
    name = base_name(node.op)
    call = Call(node, program.values, known.axes, program.rows)
    axes = None
    barrier = ""
    if name in DRAWING or name == "empty_like":
        barrier = f"{node.op} draws random numbers" if node.draws else "its bytes are arbitrary"
        axes = (known.axes[refs[0]] if refs else None,) * len(node.outs)
    elif (refs and states <= {"fixed"} and name in RULES) or (not refs and name in FACTORIES):
        _set(known, node, (None,) * len(node.outs), "fixed")
        return
    else:
        axes = None if node.draws else row_axes(call)
        if axes is None:
            barrier = f"{node.op} is not row-wise"
    if not barrier and "opaque" not in states:
        _set(known, node, axes, "rows")
        return
    if axes is None:
        axes = tuple(guess_axis(program.values[out].shape, program.rows) for out in node.outs)
        known.results += node.outs
    reasons = [known.barriers[value] for value in refs if value in known.barriers]
    _set(known, node, axes, "opaque", barrier or reasons[0])


def _set(
    known: _Known,
    node: Node,
    axes: tuple[Axis | None, ...] | None,
    state: State,
    barrier: str | None = None,
) -> None:
    assert axes is not None
    for out, axis in zip(node.outs, axes, strict=False):
        known.states[out] = state
        known.axes[out] = axis
        if barrier is not None:
            known.barriers[out] = barrier


def _may_be_source(program: Program, known: _Known, value: int) -> bool:
    return (
        known.states[value] == "opaque"
        and known.axes[value] is not None
        and program.values[value].is_dense()
    )


def _next_source(program: Program, known: _Known, roots: Mapping[int, int]) -> int | None:
    """The first saved tensor that is swapped whole and has rows."""
    overwritten = _overwritten(program)
    for storage, root in sorted(roots.items(), key=lambda item: item[1]):
        node = program.values[root].node
        if (
            node is not None
            and overwritten.get(storage, -1) <= node
            and _may_be_source(program, known, root)
        ):
            return root
    return None


def _chain_of(
    program: Program,
    known: _Known,
    roots: Mapping[int, int],
    min_nbytes: int,
    failed: Mapping[int, str],
) -> Chain:
    targets: list[Target] = []
    whole: dict[int, str] = {}
    weights = {value.storage for value in program.values if value.kind == "parameter"}
    for storage in dict.fromkeys(slot.storage for slot in program.slots):
        if storage in weights:
            continue
        root = roots.get(storage)
        axis = known.axes.get(root) if root is not None else None
        reason = _why_whole(program, known, storage, root, min_nbytes)
        if reason is None and root is not None and axis is not None:
            nbytes = program.storage_nbytes[storage]
            targets.append(Target(storage=storage, root=root, axis=axis, nbytes=nbytes))
        else:
            whole[storage] = failed.get(storage) or reason or "its rows can't be told apart"
    nodes, sources = _needed(program, known, [target.root for target in targets])
    targets = _in_parts(program, known, targets)
    extra = {program.values[value].storage for value in sources} - set(whole)
    return Chain(
        program=program,
        targets=tuple(targets),
        nodes=nodes,
        sources=sources,
        axes=dict(known.axes),
        whole=whole,
        source_nbytes=sum(program.storage_nbytes[storage] for storage in extra),
        whole_nbytes=sum(program.storage_nbytes[storage] for storage in extra | set(whole)),
    )


def _why_whole(
    program: Program, known: _Known, storage: int, root: int | None, min_nbytes: int
) -> str | None:
    """Why a saved storage is not rebuilt; ``None`` if it is."""
    if program.storage_nbytes[storage] < min_nbytes:
        return f"it is smaller than {min_nbytes} bytes"
    if root is None:
        kinds = {value.kind for value in program.values if value.storage == storage}
        outside = "external" in kinds
        return "it comes from outside the block" if outside else "parts of it changed in place"
    if known.states[root] == "rows":
        value = program.values[root]
        if value.nbytes == program.storage_nbytes[storage] and value.is_dense():
            return None
        return "its elements do not fill its storage"
    if known.states[root] == "fixed":
        return "it does not depend on the rows"
    return known.barriers.get(root, "it is kept whole as a source")


def _needed(
    program: Program, known: _Known, roots: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The operations behind ``roots`` and the sources that they start from."""
    nodes: set[int] = set()
    sources: set[int] = set()
    seen: set[int] = set()
    open_values = list(roots)
    while open_values:
        index = open_values.pop()
        if index in seen:
            continue
        seen.add(index)
        value = program.values[index]
        if known.states[index] == "source":
            sources.add(index)
        elif value.node is not None:
            nodes.add(value.node)
            open_values += program.nodes[value.node].refs()
    return tuple(sorted(nodes)), tuple(sorted(sources))


def _in_parts(program: Program, known: _Known, targets: list[Target]) -> list[Target]:
    """Number the parts: sets of targets that share no operation on rows."""
    part_of: dict[int, int] = {}  # by node
    number: dict[int, int] = {}  # by position among the targets; parts that meet become one
    for position, target in enumerate(targets):
        number[position] = position
        for node in _needed(program, known, [target.root])[0]:
            if known.states[program.nodes[node].outs[0]] == "fixed":
                continue  # a view of a weight, say
            other = number[part_of.setdefault(node, position)]
            mine = number[position]
            number = {key: mine if one == other else one for key, one in number.items()}
    return [replace(target, part=number[position]) for position, target in enumerate(targets)]
