"""Which tiles of the optimizer's step a device takes, and which the host. Pure arithmetic.

[Note: who steps a tile] Kernels of two processors may round differently. So who steps a tile must
never follow from how fast either happened to be. Tiles are numbered through all parameters in the
optimizer's order, whether they have a gradient or not, and whether they are stepped in memory or
stream. Of a share s the device takes number n where floor((n + 1) s) > floor(n s): as evenly spread
as can be, every k-th one for s = 1/k, as in Deep Optimizer States (arXiv 2410.21316). The share is
chosen once, before the first step, and goes on with the store.

[Note: the performance model] While the host steps its tiles, those of the device travel there, are
stepped and travel back, one behind the other. With h seconds of the host for an element and d of
the device's whole way, a step of one element takes max((1 - s) h, s d): both end together, and the
step is shortest, with s = h / (h + d). The times that tiles take from and to files are not in it:
where files are slower than both it makes no difference who steps.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from offload.swap.tiles import Piece

_LARGEST_DENOMINATOR = 16
_WORTH = 0.9  # of the time of one processor alone: what a share must save to be taken


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRates:
    """Seconds for one element of the optimizer's step, by who steps it.

    Attributes:
        host_s: by all threads of the host.
        device_s: there, stepped and back, while others are on their way.
    """

    host_s: float
    device_s: float

    def step_s(self, share: Fraction) -> float:
        """Seconds of an element where the device steps ``share`` of them."""
        return max(float(1 - share) * self.host_s, float(share) * self.device_s)


def best_share(rates: StepRates) -> Fraction:
    """The device's share with which a step is shortest. See [Note: the performance model].

    A processor alone is taken where sharing would save less than a tenth: its results are those of
    a loop that everybody can write.
    """
    even = rates.host_s / (rates.host_s + rates.device_s)
    shared = Fraction(even).limit_denominator(_LARGEST_DENOMINATOR)
    alone = min(Fraction(0), Fraction(1), key=rates.step_s)
    return shared if rates.step_s(shared) < _WORTH * rates.step_s(alone) else alone


def parse_share(value: str | float) -> Fraction:
    """``host`` is none, ``device`` all, a number between them itself, to a sixteenth or better.

    Raises:
        ValueError: it is none of these.
    """
    if value in ("host", "device"):
        return Fraction(int(value == "device"))
    share = Fraction(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is no share of the tiles: it is between 0 and 1")
    return share.limit_denominator(_LARGEST_DENOMINATOR)


class TileShare:
    """The tiles that the device takes. See [Note: who steps a tile].

    Args:
        chunk_numel: elements of one tile.

    Attributes:
        share: of all tiles, from 0 to 1.
    """

    def __init__(self, chunk_numel: int, share: Fraction = Fraction(0)) -> None:
        self.share = share
        self._chunk_numel = chunk_numel
        self._first: dict[Hashable, int] = {}  # number of each parameter's first tile

    @property
    def is_all(self) -> bool:
        """Whether the device takes every tile."""
        return self.share == 1

    def number(self, numels: Iterable[tuple[Hashable, int]]) -> None:
        """A step begins: (parameter, elements) of all of them, in the optimizer's order."""
        self._first.clear()
        number = 0
        for parameter, numel in numels:
            self._first[parameter] = number
            number += -(-numel // self._chunk_numel)

    def split(
        self, parameters: Sequence[Hashable], pieces: Sequence[Piece]
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        """Those of ``pieces``, each of a parameter, that the device takes, and the others.

        The host steps parameters without a number, unless the device takes all.
        """
        if self.share.denominator == 1:
            return (pieces, ()) if self.is_all else ((), pieces)
        parted: tuple[list[Piece], list[Piece]] = [], []
        for piece in pieces:
            first = self._first.get(parameters[piece.index])
            parted[first is None or not self._takes(first, piece)].append(piece)
        return parted

    def _takes(self, first: int, piece: Piece) -> bool:
        number = first + piece.start // self._chunk_numel
        return floor((number + 1) * self.share) > floor(number * self.share)
