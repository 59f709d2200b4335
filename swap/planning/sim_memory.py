"""The memory of a simulated run: bytes of its resident set, by what they are."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

Role: TypeAlias = Literal[
    "fixed", "weights", "saved", "transients", "gradients", "staging", "states", "pages"
]


class Memory:
    """Bytes of the resident set by role, and their peak.

    ``pages`` are clean pages of files, which the governor takes back above ``limit_nbytes``.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.now: dict[Role, int] = dict.fromkeys(get_args(Role), 0)
        self.nbytes = 0  # pages of files are not counted in
        self.peak_nbytes = 0
        self.peak_roles: dict[Role, int] = {}

    def add(self, role: Role, nbytes: int) -> None:
        """``nbytes`` more are resident; not of pages."""
        now = self.now
        now[role] += nbytes
        self.nbytes += nbytes
        # What is resident is at most the sum: it most often tells that this is no new peak.
        if self.nbytes + now["pages"] > self.peak_nbytes and nbytes:
            self._look_at_peak()

    def drop(self, role: Role, nbytes: int) -> None:
        """``nbytes`` fewer are resident; not of pages."""
        self.now[role] -= nbytes
        self.nbytes -= nbytes

    def add_pages(self, nbytes: int) -> None:
        """``nbytes`` more pages of files are resident, or fewer."""
        self.now["pages"] += nbytes
        if nbytes > 0:
            self._look_at_peak()

    def _look_at_peak(self) -> None:
        resident = self.resident_nbytes
        if resident > self.peak_nbytes:
            self.peak_nbytes = resident
            self.peak_roles = dict(self.now)

    def turn(self, role: Role, into: Role, nbytes: int) -> None:
        """``nbytes`` have another role from now on; neither is that of pages."""
        self.now[role] -= nbytes
        self.now[into] += nbytes

    def look_at(self, highs: Sequence[int]) -> None:
        """Transients have come and gone: see whether that was a new peak.

        Args:
            highs: bytes more than now, each time that they were more than ever before.
        """
        now = self.now
        for high in highs:
            resident = self._resident(self.nbytes + high)
            if resident > self.peak_nbytes:
                self.peak_nbytes = resident
                self.peak_roles = {**now, "transients": now["transients"] + high}

    @property
    def resident_nbytes(self) -> int:
        """The resident set."""
        return self._resident(self.nbytes)

    def _resident(self, nbytes: int) -> int:
        """With ``nbytes`` of everything but pages of files."""
        return nbytes + min(self.now["pages"], max(self.limit_nbytes - nbytes, 0))

    def room(self) -> int:
        """Bytes left below the limit; negative above it."""
        free = self.limit_nbytes - self.nbytes
        if free <= 0:
            return free
        free -= self.now["pages"]
        return free if free > 0 else 0

    def restart_peak(self) -> None:
        """Begin a new measurement of the peak."""
        self.peak_nbytes = self.resident_nbytes
        self.peak_roles = dict(self.now)
