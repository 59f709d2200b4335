"""Repeated blocks as the ticks of one step: forward, backward, the optimizer.

A planner's placement in plain figures: for each block its seconds, and for each tensor class how
many bytes come and go in which phase, over which lanes, and how many ticks ahead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from offload.swap.planning.schedule import Hold, Move, Tick

Phase: TypeAlias = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one tensor class of one block, that come and go.

    Attributes:
        role: weight | gradient | state | activation.
        nbytes: of each of these moves.
        fetched, evicted: the phases before which they come, and after which they leave. Both in
            one phase: changed where they are, so that one buffer serves both.
        fetch_by, evict_by: names of the lanes, in order.
        ahead: ticks between the issue of a fetch and its use.
        room_nbytes: see ``Move``.
    """

    role: str
    nbytes: int
    fetched: tuple[Phase, ...] = ()
    evicted: tuple[Phase, ...] = ()
    fetch_by: tuple[str, ...] = ()
    evict_by: tuple[str, ...] = ()
    ahead: int = 1
    room_nbytes: int | None = None
    name: str = ""  # where a block has several of one role


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one block computes in a step, and the bytes that it moves.

    Attributes:
        backward_s: with what is recomputed.
        optimizer_s: stepping its weights, on the processor of the optimizer.
        kept: (tier, bytes) that stay from its forward to the end of its backward.
    """

    name: str
    forward_s: float
    backward_s: float
    optimizer_s: float = 0.0
    traffic: tuple[Traffic, ...] = ()
    kept: tuple[tuple[str, int], ...] = ()


def ticks_of(
    blocks: Sequence[Block],
    *,
    optimizer: Literal["after", "beside", "none"] = "after",
    last_first: bool = False,
    processors: tuple[str, str] = ("device", "cpu"),
) -> tuple[Tick, ...]:
    """The ticks of a step.

    Args:
        blocks: in the order of forward.
        optimizer: ``after``: once backward has ended, and nothing is fetched for it before;
            ``beside``: each block as soon as its backward has ended, on a processor of its own.
        last_first: ``after`` steps the last block first; ``beside`` does so anyway.
        processors: what computes, and what steps.
    """
    count = len(blocks)
    # The backward of block i stands at 2n - 1 - i, or, with its optimizer beside it, further on.
    stride = 2 if optimizer == "beside" else 1
    ticks = [
        _tick(
            block,
            "forward",
            processors[0],
            tuple(
                Hold(tier=tier, nbytes=size, until=count + stride * (count - 1 - position))
                for tier, size in block.kept
            ),
        )
        for position, block in enumerate(blocks)
    ]
    for block in reversed(blocks):
        tick = _tick(block, "backward", processors[0])
        if optimizer == "beside" and len(ticks) > count:
            tick = replace(tick, after=(len(ticks) - 2,))  # not behind another block's optimizer
        ticks.append(tick)
        if optimizer == "beside":
            ticks.append(_tick(block, "optimizer", processors[1]))
    if optimizer == "after":
        order = blocks[::-1] if last_first else blocks
        ticks += [
            _not_before(_tick(block, "optimizer", processors[1]), position)
            for position, block in enumerate(order)
        ]
    return tuple(ticks)


def _not_before(tick: Tick, position: int) -> Tick:
    """The tick at ``position`` of its phase, with fetches that are issued within the phase."""
    fetches = (replace(move, ahead=min(move.ahead, position)) for move in tick.fetches)
    return replace(tick, fetches=tuple(fetches))


def _tick(block: Block, phase: Phase, processor: str, holds: tuple[Hold, ...] = ()) -> Tick:
    seconds = {
        "forward": block.forward_s,
        "backward": block.backward_s,
        "optimizer": block.optimizer_s,
    }
    return Tick(
        name=f"{block.name} {phase}",
        seconds=seconds[phase],
        processor=processor,
        doing="optimizer" if phase == "optimizer" else "compute",
        fetches=tuple(_fetches(block, phase)),
        evicts=tuple(_evicts(block, phase)),
        holds=holds,
    )


def _fetches(block: Block, phase: Phase) -> Iterator[Move]:
    for traffic in block.traffic:
        if phase in traffic.fetched:
            yield Move(
                key=_key(block, traffic),
                role=traffic.role,
                nbytes=traffic.nbytes,
                route=traffic.fetch_by,
                ahead=traffic.ahead,
                room_nbytes=traffic.room_nbytes,
            )


def _evicts(block: Block, phase: Phase) -> Iterator[Move]:
    for traffic in block.traffic:
        if phase in traffic.evicted:
            yield Move(
                key=_key(block, traffic),
                role=traffic.role,
                nbytes=traffic.nbytes,
                route=traffic.evict_by,
                room_nbytes=traffic.room_nbytes,
                in_place=phase in traffic.fetched,
            )


def _key(block: Block, traffic: Traffic) -> str:
    return f"{block.name}.{traffic.name or traffic.role}"
