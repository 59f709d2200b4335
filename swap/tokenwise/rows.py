"""Which operations are row-wise in the token dimension, and where their results have the rows.

One rule per family of operations, in tables by operation name. A rule is given where the
arguments have their token rows and answers where each result has them, or ``None`` where a row
of the result depends on other rows. Rules speak of shapes only: whether a kernel really gives
the same bits for fewer rows is verified when the rows are first rebuilt.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from offload.swap.tokenwise.program import Node, Ref, Value


@dataclass(frozen=True, slots=True)
class Axis:
    """Where a tensor has its token rows: its dimension ``dim`` is ``outer`` sequences of them."""

    dim: int
    outer: int = 1


Axes: TypeAlias = tuple[Axis | None, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A node with what is known of its arguments."""

    node: Node
    values: tuple[Value, ...]
    axes: Mapping[int, Axis | None]
    rows: int

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return dict(self.node.kwargs).get(name, default)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.values[ref.value].shape

    def axis(self, ref: Ref) -> Axis | None:
        return self.axes.get(ref.value)

    def first(self) -> tuple[tuple[int, ...], Axis | None]:
        """Shape and axis of the first argument."""
        ref = self.node.args[0]
        return self.shape(ref), self.axis(ref)

    def out_shapes(self) -> list[tuple[int, ...]]:
        return [self.values[out].shape for out in self.node.outs]


Rule: TypeAlias = Callable[[Call], Axes | None]


def base_name(op: str) -> str:
    """``aten.add_.Tensor`` is ``add``: changing in place is told by the node."""
    name = op.split(".")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def guess_axis(shape: tuple[int, ...], rows: int) -> Axis | None:
    """Where a tensor of unknown making has its rows, by its sizes; verified when it is used."""
    last = len(shape) - 2
    if last >= 0 and shape[last] == rows:
        return Axis(last)
    matching = [dim for dim, size in enumerate(shape) if size == rows]
    if matching:
        return Axis(matching[0])
    if len(shape) == 2 and shape[0] and shape[0] % rows == 0:
        return Axis(0, shape[0] // rows)
    return None


def row_axes(call: Call) -> Axes | None:
    """Where each result of ``call`` has its rows, or ``None`` if it is not row-wise."""
    rule = RULES.get(base_name(call.node.op))
    return rule(call) if rule is not None else None


def resized_args(node: Node, axes: Axes, old: int, new: int) -> tuple[Any, ...]:
    """The arguments of ``node`` for sequences of ``new`` rows instead of ``old``."""
    position = SIZED.get(base_name(node.op))
    axis = axes[0] if axes else None
    if position is None or axis is None:
        return node.args
    sizes = list(node.args[position])
    if sizes[axis.dim] == axis.outer * old:  # else -1
        sizes[axis.dim] = axis.outer * new
    return (*node.args[:position], tuple(sizes), *node.args[position + 1 :])


# The rules.


def _pointwise(call: Call) -> Axes | None:
    """Dimensions are aligned from the right; all arguments with rows have them in one place."""
    shapes = call.out_shapes()
    found: Axis | None = None
    refs = [Ref(value) for value in call.node.refs()]
    for ref in refs:
        axis = call.axis(ref)
        if axis is None:
            continue
        here = Axis(axis.dim + len(shapes[0]) - len(call.shape(ref)), axis.outer)
        if found not in (None, here):
            return None
        found = here
    if found is None or shapes[0][found.dim] != found.outer * call.rows:
        return None
    for ref in refs:
        shape = call.shape(ref)
        dim = found.dim - len(shapes[0]) + len(shape)
        if call.axis(ref) is None and dim >= 0 and shape[dim] != 1:
            return None
    return (found,) * len(shapes)


def _view(call: Call) -> Axes | None:
    """The rows stay whole if the sizes before and behind them can be told apart."""
    shape, axis = call.first()
    (out,) = call.out_shapes()
    if axis is None or 0 in shape:
        return None
    before = math.prod(shape[: axis.dim]) * axis.outer
    passed = 1
    for dim, size in enumerate(out):
        outer = before // passed
        if outer * passed == before and size == outer * call.rows and size > 1:
            return (Axis(dim, outer),)
        passed *= size
    return None


def _permuted(order: Callable[[Call, int], list[int]]) -> Rule:
    def rule(call: Call) -> Axes | None:
        shape, axis = call.first()
        if axis is None:
            return None
        return (Axis(order(call, len(shape)).index(axis.dim), axis.outer),)

    return rule


def _permute_order(call: Call, ndim: int) -> list[int]:
    return [dim % ndim for dim in call.arg(1, "dims")]


def _transpose_order(call: Call, ndim: int) -> list[int]:
    order = list(range(ndim))
    one, other = call.arg(1, "dim0") % ndim, call.arg(2, "dim1") % ndim
    order[one], order[other] = other, one
    return order


def _t_order(_call: Call, ndim: int) -> list[int]:
    return list(reversed(range(ndim)))


def _unsqueeze(call: Call) -> Axes | None:
    shape, axis = call.first()
    if axis is None:
        return None
    dim = call.arg(1, "dim") % (len(shape) + 1)
    return (Axis(axis.dim + (dim <= axis.dim), axis.outer),)


def _squeeze(call: Call) -> Axes | None:
    shape, axis = call.first()
    if axis is None:
        return None
    dims = call.arg(1, "dim", tuple(range(len(shape))))
    gone = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
    lost = sum(dim < axis.dim and shape[dim] == 1 for dim in gone)
    return (Axis(axis.dim - lost, axis.outer),)


def _expand(call: Call) -> Axes | None:
    shape, axis = call.first()
    (out,) = call.out_shapes()
    return None if axis is None else (Axis(axis.dim + len(out) - len(shape), axis.outer),)


def _beside(position: int, name: str, *, removes: bool = False) -> Rule:
    """Operations along one dimension, which must not be that of the rows."""

    def rule(call: Call) -> Axes | None:
        shape, axis = call.first()
        dim = call.arg(position, name, 0)
        if axis is None or dim % len(shape) == axis.dim:
            return None
        moved = Axis(axis.dim - (removes and dim % len(shape) < axis.dim), axis.outer)
        return (moved,) * len(call.node.outs)

    return rule


def _slice(call: Call) -> Axes | None:
    shape, axis = call.first()
    dim = call.arg(1, "dim", 0) % len(shape)
    if axis is None or (axis.dim == dim and call.out_shapes()[0] != shape):
        return None
    if axis.dim == dim and (call.arg(2, "start") or 0) != 0:
        return None
    return (axis,)


def _cat(call: Call) -> Axes | None:
    filled = [ref for ref in call.node.args[0] if math.prod(call.shape(ref))]
    axes = {call.axis(ref) for ref in filled}
    axis = axes.pop() if axes else None
    if axes or axis is None:
        return None
    dim = call.arg(1, "dim", 0) % len(call.out_shapes()[0])
    return (axis,) if dim != axis.dim or len(filled) == 1 else None


def _stack(call: Call) -> Axes | None:
    axes = {call.axis(ref) for ref in call.node.args[0]}
    axis = axes.pop()
    if axes or axis is None:
        return None
    dim = call.arg(1, "dim", 0) % len(call.out_shapes()[0])
    return (Axis(axis.dim + (dim <= axis.dim), axis.outer),)


def _reduced(position: int, name: str) -> Rule:
    """Reductions over dimensions other than that of the rows."""

    def rule(call: Call) -> Axes | None:
        shape, axis = call.first()
        dims = call.arg(position, name)
        if axis is None or dims is None or dims == ():
            return None
        gone = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
        if axis.dim in gone:
            return None
        kept = len(call.out_shapes()[0]) == len(shape)
        lost = 0 if kept else sum(dim < axis.dim for dim in gone)
        return (Axis(axis.dim - lost, axis.outer),) * len(call.node.outs)

    return rule


def _normalised(call: Call) -> Axes | None:
    """Norms over the last dimensions: (input, normalized_shape, …)."""
    shape, axis = call.first()
    if axis is None or axis.dim >= len(shape) - len(call.arg(1, "normalized_shape")):
        return None
    others = [Ref(value) for value in call.node.refs()[1:]]
    if any(call.axis(ref) is not None for ref in others):
        return None
    return (axis,) * len(call.node.outs)


def _product(position: int) -> Rule:
    """Matrix products: rows of the left factor, at ``position``, are rows of the result."""

    def rule(call: Call) -> Axes | None:
        left = call.node.args[position]
        others = [Ref(value) for value in call.node.refs() if value != left.value]
        axis = call.axis(left)
        if axis is None or any(call.axis(ref) is not None for ref in others):
            return None
        if call.node.args[position + 1] == left:
            return None
        last = len(call.shape(left)) - 1
        batched = base_name(call.node.op) in BATCHED
        if axis.dim == last or (batched and axis.dim != last - 1):
            return None
        bias = call.arg(0, "self") if position else None
        if isinstance(bias, Ref) and len(call.shape(bias)) > 1:
            return None  # a bias with rows of its own
        return (axis,)

    return rule


# fmt: off
POINTWISE = frozenset([
    "_to_copy", "abs", "add", "addcdiv", "addcmul", "alias", "bitwise_and", "bitwise_not",
    "bitwise_or", "celu", "clamp", "clamp_max", "clamp_min", "clone", "copy", "cos", "detach",
    "div", "elu", "eq", "erf", "exp", "expm1", "fill", "floor", "ge", "gelu", "gt",
    "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu", "lift_fresh", "log", "log1p",
    "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum",
    "mish", "mul", "ne", "neg", "pow", "reciprocal", "relu", "remainder", "round", "rsqrt",
    "rsub", "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "sub", "tanh",
    "threshold", "where", "zero",
])
# fmt: on
LIKE = frozenset(["full_like", "ones_like", "zeros_like"])
BATCHED = frozenset({"bmm", "baddbmm"})
RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE | LIKE, _pointwise),
    **dict.fromkeys(("view", "_unsafe_view"), _view),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), _beside(1, "dim")),
    **dict.fromkeys(("split", "split_with_sizes"), _beside(2, "dim")),
    **dict.fromkeys(("cumsum", "cumprod"), _beside(1, "dim")),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "var_mean"), _reduced(1, "dim")),
    "linalg_vector_norm": _reduced(2, "dim"),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normalised),
    **dict.fromkeys(("mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    "glu": _beside(1, "dim"),
    "select": _beside(1, "dim", removes=True),
    "unbind": _beside(1, "dim", removes=True),
    "permute": _permuted(_permute_order),
    "transpose": _permuted(_transpose_order),
    "t": _permuted(_t_order),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "cat": _cat,
    "stack": _stack,
}
SIZED = {"view": 1, "_unsafe_view": 1, "expand": 1}  # where the sizes stand
DRAWING = frozenset({"bernoulli", "native_dropout", "rand_like", "randn_like", "normal", "uniform"})
"""Random operations of which each result has the rows of the first argument."""
FACTORIES = frozenset(["arange", "full", "ones", "scalar_tensor", "zeros"])
"""Operations that make the same tensor each time, from constants alone."""
