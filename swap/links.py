"""How fast a link was seen to be."""

_SMOOTHING = 0.3  # weight of the newest measurement


class LinkRate:
    """What a link was seen to carry."""

    def __init__(self) -> None:
        self._bytes_per_s = 0.0

    def measured(self, nbytes: int, started_s: float | None, ended_s: float | None) -> None:
        """A transfer of ``nbytes`` began and ended then."""
        if started_s is None or ended_s is None or ended_s <= started_s:
            return
        rate = nbytes / (ended_s - started_s)
        before = self._bytes_per_s or rate
        self._bytes_per_s = before + _SMOOTHING * (rate - before)

    def seconds(self, nbytes: int) -> float:
        """How long ``nbytes`` take; for ever, before anything was measured."""
        return nbytes / self._bytes_per_s if self._bytes_per_s else float("inf")
