"""How many rows to swap: alpha by block, from measured times, links and free bytes.

MEMO (SIGMOD'25, section 4) swaps the largest fraction that the link hides behind the compute of
one layer and that the host holds: with one link, ``alpha = (B T - S_in - S_attn) / S_other``. Here
the same is said as a cost to be minimised, so that several tiers, a link that can't even carry
the sources in time, and a rebuild that costs more than it hides are all cases of one formula:

    step(alpha) = max(forward + heads alpha / 2, carry(V))
                + max(backward + overhead + heads alpha / 2 + rebuild (1 - alpha), carry(V))
    V(alpha) = whole + alpha target

At alpha = 1 nothing is rebuilt, so heads (the swapped rows, which are copied out of their tensors
and back) and overhead are nothing there. ``carry(V)`` is the least time in which the links, side by
side, each no more than its free bytes, take V bytes. It is convex and piecewise linear, and so is
``step`` below 1: its least value on the grid stands beside one of the few points where a piece
ends, or it is that at 1.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A place for saved bytes and the way there.

    Attributes:
        bytes_per_s: the slower direction; infinite for memory where the bytes already are.
        free_nbytes: how many bytes of one block it takes.
    """

    name: str
    bytes_per_s: float
    free_nbytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What a block costs, measured.

    Attributes:
        forward_s: its forward, without waits.
        backward_s: its backward, without waits and without rebuilding.
        rebuild_s: rebuilding all rows of its targets.
        heads_s: copying all rows of its targets out of their tensors, and back.
        overhead_s: what rebuilding takes besides, however few the rows.
        whole_nbytes: swapped whatever alpha is: sources, and what can't be rebuilt.
        target_nbytes: what can be rebuilt, all rows.
    """

    forward_s: float
    backward_s: float
    rebuild_s: float
    heads_s: float
    overhead_s: float
    whole_nbytes: int
    target_nbytes: int

    def forward_line(self) -> tuple[float, float]:
        """Forward's compute below 1: its seconds at 0 and their slope in alpha."""
        return self.forward_s, self.heads_s / 2

    def backward_line(self) -> tuple[float, float]:
        """As ``forward_line``, for backward."""
        seconds = self.backward_s + self.overhead_s + self.rebuild_s
        return seconds, self.heads_s / 2 - self.rebuild_s

    def moved_nbytes(self, alpha: float) -> float:
        """Bytes that leave in forward and come back in backward."""
        return self.whole_nbytes + alpha * self.target_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What ``solve`` found.

    Attributes:
        cut: rows of each sequence that are swapped.
        alpha: the same as a fraction.
        step_s: forward and backward of the block under the model.
        late_s: what the links take longer for the sources alone than forward lasts.
        fits: whether the links have room for what must be swapped whatever alpha is.
    """

    cut: int
    alpha: float
    step_s: float
    late_s: float
    fits: bool


def carry_s(nbytes: float, links: Sequence[Link]) -> float:
    """Least time to carry ``nbytes`` over ``links`` side by side; infinite without the room."""
    if nbytes <= 0:
        return 0.0
    carried, now_s = 0.0, 0.0
    rate = sum(link.bytes_per_s for link in links if math.isfinite(link.bytes_per_s))
    carried = sum(link.free_nbytes for link in links if math.isinf(link.bytes_per_s))
    if carried >= nbytes:
        return 0.0
    for link in sorted(_finite(links), key=_full_after_s):
        until_s = _full_after_s(link)
        more = rate * (until_s - now_s)
        if carried + more >= nbytes:
            return now_s + (nbytes - carried) / rate
        carried, now_s = carried + more, until_s
        rate -= link.bytes_per_s
    # All links are full. Rates and times, rounded, may miss what just fits.
    return now_s if nbytes <= carried_nbytes(math.inf, links) else math.inf


def carried_nbytes(time_s: float, links: Sequence[Link]) -> float:
    """The inverse of ``carry_s``: the most bytes that the links take in ``time_s``."""
    return sum(
        link.free_nbytes
        if math.isinf(link.bytes_per_s)
        else min(link.free_nbytes, link.bytes_per_s * time_s)
        for link in links
        if link.bytes_per_s > 0
    )


def step_s(cost: BlockCost, links: Sequence[Link], alpha: float) -> float:
    """Forward and backward of one block under the model; infinite without the room."""
    carry = carry_s(cost.moved_nbytes(alpha), links)
    if alpha >= 1:
        return max(cost.forward_s, carry) + max(cost.backward_s, carry)
    lines = (cost.forward_line(), cost.backward_line())
    return sum(max(seconds + slope * alpha, carry) for seconds, slope in lines)


def solve(cost: BlockCost, links: Sequence[Link], cuts: Sequence[int]) -> Solution:
    """The cut with the shortest step; of equal ones the one that rebuilds least.

    Args:
        cost: the block's times and bytes.
        links: where its bytes may go, with the block's share of the free bytes.
        cuts: possible cuts, ascending; the last one is the number of rows.

    Raises:
        ValueError: no cut to choose from.
    """
    if not cuts:
        raise ValueError("no cut was given to choose from")
    rows = cuts[-1]
    best = _least(cost, links, cuts, rows)
    seconds = step_s(cost, links, best / rows)
    fits = math.isfinite(seconds)
    late_s = max(carry_s(cost.whole_nbytes, links) - cost.forward_s, 0.0)
    if not fits:
        best = cuts[0]  # the fewest bytes
    return Solution(cut=best, alpha=best / rows, step_s=seconds, late_s=late_s, fits=fits)


def thriftiest(
    cost: BlockCost, links: Sequence[Link], cuts: Sequence[int], *, within: float
) -> Solution:
    """The cut that moves the fewest bytes, of those whose step is ``within`` times the shortest.

    Steps that measurements can't tell apart are equal; of these the one with the least traffic
    wears a drive least, and leaves most of the link to what the model does not know of.

    Raises:
        ValueError: no cut to choose from.
    """
    best = solve(cost, links, cuts)
    if not best.fits or len(cuts) == 1:
        return best
    rows, limit_s = cuts[-1], within * best.step_s

    def seconds(cut: int) -> float:
        return step_s(cost, links, cut / rows)

    last = cuts.index(_least(cost, links, cuts[:-1], rows))
    if seconds(cuts[last]) > limit_s:
        return best  # all rows, for only 1 has a step of its own
    # Up to its least value below 1 the step only falls.
    cut = cuts[bisect.bisect_left(cuts, -limit_s, hi=last, key=lambda cut: -seconds(cut))]
    return replace(best, cut=cut, alpha=cut / rows, step_s=seconds(cut))


def less_room(links: Sequence[Link], nbytes: float) -> list[Link]:
    """``links`` after others have taken ``nbytes`` of the free bytes, of the fastest link first."""
    left: list[Link] = []
    for link in sorted(links, key=lambda link: -link.bytes_per_s):
        taken = min(nbytes, link.free_nbytes)
        nbytes -= taken
        left.append(replace(link, free_nbytes=link.free_nbytes - taken))
    return left


def _least(cost: BlockCost, links: Sequence[Link], cuts: Sequence[int], rows: int) -> int:
    """The cut with the shortest step; of equal ones the one that rebuilds least."""
    nearby = {cuts[0], cuts[-1]}
    for alpha in _breakpoints(cost, links):
        position = bisect.bisect_left(cuts, alpha * rows)
        nearby.update(cuts[max(position - 1, 0) : position + 1])
    return min(nearby, key=lambda cut: (step_s(cost, links, cut / rows), -cut))


def _breakpoints(cost: BlockCost, links: Sequence[Link]) -> list[float]:
    """Every alpha in [0, 1] where a piece of ``step_s`` may end."""
    if cost.target_nbytes == 0:
        return []
    kinks_s = sorted({0.0, *map(_full_after_s, _finite(links))})
    times_s = [
        *kinks_s,
        *(
            meeting
            for line in (cost.forward_line(), cost.backward_line())
            for begin_s, end_s in zip(kinks_s, [*kinks_s[1:], math.inf], strict=True)
            for meeting in _meetings_s(cost, links, line, (begin_s, end_s))
        ),
    ]
    alphas = [
        (carried_nbytes(time, links) - cost.whole_nbytes) / cost.target_nbytes for time in times_s
    ]
    return [alpha for alpha in alphas if 0 <= alpha <= 1]


def _meetings_s(
    cost: BlockCost,
    links: Sequence[Link],
    line: tuple[float, float],
    between_s: tuple[float, float],
) -> list[float]:
    """When, between two kinks, the links end together with the compute of ``line``.

    Carrying t seconds moves c + r t bytes, which are alpha = (c + r t - whole) / target, and then
    the compute lasts t = seconds + slope alpha.
    """
    seconds, slope = line
    begun = carried_nbytes(between_s[0], links)
    rate = sum(link.bytes_per_s for link in _finite(links) if _full_after_s(link) > between_s[0])
    base = (begun - rate * between_s[0] - cost.whole_nbytes) / cost.target_nbytes
    steepness = 1 - slope * rate / cost.target_nbytes
    if steepness == 0:
        return []
    meeting = (seconds + slope * base) / steepness
    return [meeting] if between_s[0] <= meeting <= between_s[1] else []


def _finite(links: Sequence[Link]) -> list[Link]:
    return [link for link in links if math.isfinite(link.bytes_per_s) and link.bytes_per_s > 0]


def _full_after_s(link: Link) -> float:
    return link.free_nbytes / link.bytes_per_s
