"""The memory of a simulated run: bytes of its resident set, by what they are."""

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from offload.swap.governor import LEAST_WORTH_NBYTES, WORTH_NBYTES

Role: TypeAlias = Literal[
    "fixed", "weights", "saved", "transients", "gradients", "staging", "states", "pages"
]


class Memory:
    """Bytes of the resident set by role, and their peak.

    Transients, which come and go most often, are not counted: they are what is there beside all
    else. ``pages`` are clean pages of files. Above ``limit_nbytes`` the governor takes them back,
    but not so few that it would hardly help, unless these have no room below ``budget_nbytes``.

    Attributes:
        nbytes: of all but pages of files.
        peak_roles: what the resident set was made of at its peak.
    """

    def __init__(self, limit_nbytes: int, budget_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self._budget_nbytes = budget_nbytes
        self.nbytes = 0
        self.pages_nbytes = 0
        self.peak_nbytes = 0
        self.peak_roles: dict[Role, int] = {}
        # Transients and pages stay 0 in it: they are there for the order of roles alone.
        self._counted: dict[Role, int] = dict.fromkeys(get_args(Role), 0)

    @property
    def now(self) -> dict[Role, int]:
        """The resident set by role, as if no page of a file was taken back."""
        return self._roles(self.nbytes)

    def _roles(self, nbytes: int) -> dict[Role, int]:
        counted = self._counted
        transients = nbytes - sum(counted.values())
        return {**counted, "transients": transients, "pages": self.pages_nbytes}

    def add(self, role: Role, nbytes: int) -> None:
        """``nbytes`` more are resident; neither of transients nor of pages."""
        self._counted[role] += nbytes
        self.nbytes += nbytes
        # What is resident is at most the sum: it most often tells that this is no new peak.
        if self.nbytes + self.pages_nbytes > self.peak_nbytes and nbytes:
            self._look_at(self.nbytes)

    def drop(self, role: Role, nbytes: int) -> None:
        """``nbytes`` fewer are resident; neither of transients nor of pages."""
        self._counted[role] -= nbytes
        self.nbytes -= nbytes

    def keep(self, role: Role, nbytes: int) -> None:
        """``nbytes`` of transients have this role from now on."""
        self._counted[role] += nbytes

    def add_pages(self, nbytes: int) -> None:
        """``nbytes`` more pages of files are resident, or fewer."""
        self.pages_nbytes += nbytes
        if nbytes > 0:
            self._look_at(self.nbytes)

    def add_pages_beside(self, nbytes: int) -> None:
        """As ``add_pages``, and as if they had been there at the peak, too."""
        self.add_pages(nbytes)
        self._look_at(sum(self.peak_roles.values()) - self.peak_roles.get("pages", 0))

    def pass_through(self, highs: Iterable[int]) -> None:
        """Transients come and go: as many more are left as there were.

        Args:
            highs: bytes more than now, each time that they were more than ever before.
        """
        for high in highs:
            self._look_at(self.nbytes + high)

    def _look_at(self, nbytes: int) -> None:
        """So much is there for a moment, pages of files not counted in."""
        resident = self._resident(nbytes)
        if resident > self.peak_nbytes:
            self.peak_nbytes = resident
            self.peak_roles = self._roles(nbytes)

    @property
    def resident_nbytes(self) -> int:
        """The resident set."""
        return self._resident(self.nbytes)

    def _resident(self, nbytes: int) -> int:
        """With ``nbytes`` of everything but pages of files."""
        # So many pages stay that twice as many more have room (``governor.worth_nbytes``).
        few = min((self._budget_nbytes - nbytes) // 3, WORTH_NBYTES)
        most = max(self.limit_nbytes - nbytes, few, LEAST_WORTH_NBYTES)
        return nbytes + min(self.pages_nbytes, most)

    def is_tight(self) -> bool:
        """Whether half of what is between the limit and the budget is taken."""
        return 2 * self.resident_nbytes > self._budget_nbytes + self.limit_nbytes

    def room(self) -> int:
        """Bytes left below the limit; negative above it."""
        free = self.limit_nbytes - self.nbytes
        if free <= 0:
            return free
        free -= self.pages_nbytes
        return free if free > 0 else 0

    def restart_peak(self) -> None:
        """Begin a new measurement of the peak."""
        self.peak_nbytes = self.resident_nbytes
        self.peak_roles = self.now
