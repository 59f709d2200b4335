"""How fast links were seen to be, and the arrivals that nobody has looked at yet."""

from collections.abc import Iterable

from offload.tiers.lanes import Transfer

_SMOOTHING = 0.3  # weight of the newest measurement


class LinkRate:
    """What a link was seen to carry."""

    def __init__(self) -> None:
        self._bytes_per_s = 0.0

    def measured(self, transfer: Transfer) -> None:
        """``transfer`` has ended."""
        started_s, ended_s = transfer.started_s, transfer.ended_s
        if started_s is None or ended_s is None or ended_s <= started_s:
            return
        rate = transfer.nbytes / (ended_s - started_s)
        before = self._bytes_per_s or rate
        self._bytes_per_s = before + _SMOOTHING * (rate - before)

    def seconds(self, nbytes: int) -> float:
        """How long ``nbytes`` take; for ever, before anything was measured."""
        return nbytes / self._bytes_per_s if self._bytes_per_s else float("inf")


class Links:
    """The links of several homes.

    Attributes:
        arriving: what streams wait for, and the host does not; ``look`` takes care of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._rates = {name: LinkRate() for name in names}
        self.arriving: list[tuple[LinkRate, Transfer]] = []

    def seconds(self, name: str, nbytes: int) -> float:
        """How long ``nbytes`` take from the home ``name``."""
        return self._rates[name].seconds(nbytes)

    def arrives(self, name: str, transfer: Transfer) -> None:
        """What comes from the home ``name`` is being used; it may not have ended."""
        if transfer.done() and transfer.error is None:
            self._rates[name].measured(transfer)
        else:
            self.arriving.append((self._rates[name], transfer))

    def look(self) -> None:
        """Measure what has ended; never blocks.

        Raises:
            TierIOError: bytes that are being used could not be read back.
        """
        arriving, self.arriving = self.arriving, []
        for rate, transfer in arriving:
            if not transfer.done():
                self.arriving.append((rate, transfer))
            elif transfer.error is None:
                rate.measured(transfer)
        for _, transfer in arriving:
            if transfer.error is not None and not transfer.observed:
                transfer.wait()

    def settle(self) -> None:
        """Wait for all arrivals; never raises."""
        for _, transfer in self.arriving:
            transfer.settle()
