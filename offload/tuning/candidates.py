"""Which settings are tried: single changes of the user's own, and what of them goes together.

What the user has set stays as it is: only what was left to its default is searched. By default
nothing is given up: results stay bit-identical, and each step is durable. What gives up either is
tried on request only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload.config import OffloadConfig
from offload.tiers.engines.registry import AUTO, DEFAULT

BASELINE_NAME = "baseline"
_THREADS = (2, 8, 16)  # requests in flight in each direction
_ALPHAS = (0.0, 0.5)  # of ``recompute``
# Until ``alpha: auto`` has been solved and held against its neighbours (docs/activations.md).
AUTO_ALPHA_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """Settings to try.

    Attributes:
        factor: what it changes; two candidates of one factor exclude each other.
        changes: values by the names of settings.
    """

    name: str
    factor: str
    changes: Mapping[str, Any]

    def config(self, base: OffloadConfig) -> OffloadConfig:
        """``base`` with the changes."""
        given = {name: getattr(base, name) for name in base.model_fields_set}
        return OffloadConfig(**{**given, **self.changes})


# The settings that a factor decides: none of them may be the user's.
_TOGETHER = {
    "step_in_backward": {"step_in_backward", "accumulation_steps", "step_in_forward"},
    "recompute": {"recompute", "alpha", "relaxed", "blocks"},
    "io_threads": {"io_threads"},
    "io_engine": {"io_engine"},
    "commit": {"commit"},
    "state_precision": {"state_precision", "step_in_forward"},
}
BASELINE = Candidate(name=BASELINE_NAME, factor="", changes={})


def list_candidates(
    base: OffloadConfig,
    *,
    steps: int,
    engines: Sequence[str] = (),
    lossy: bool = False,
    volatile: bool = False,
) -> tuple[Candidate, ...]:
    """Single changes of ``base`` that are worth a trial.

    Args:
        steps: of a trial; what takes longer to settle is left out.
        engines: I/O engines that work here.
        lossy: also those after which results are no longer those of memory.
        volatile: also those that make no step durable.
    """
    candidates = [
        _one("step in backward", step_in_backward=True),
        # Of loops that clip or scale; never both of them.
        Candidate(
            name="step in forward", factor="step_in_backward", changes={"step_in_forward": True}
        ),
        *_recomputing(steps),
        *(_one(f"{threads} I/O threads", io_threads=threads) for threads in _THREADS),
        *(
            _one(f"engine {engine}", io_engine=engine)
            for engine in engines
            if engine not in {AUTO, DEFAULT}
        ),
    ]
    if volatile:
        candidates.append(_one("commit never", commit="never"))
    if lossy:
        candidates += [_one(f"{kind} states", state_precision=kind) for kind in ("bf16", "8bit")]
    set_already = base.model_fields_set
    free = [one for one in candidates if not (_TOGETHER[one.factor] & set_already)]
    if len(base.nvme) > 1:
        free += [_one(f"only {path}", nvme=(path,)) for path in base.nvme]
    return tuple(free)


def _recomputing(steps: int) -> Iterator[Candidate]:
    alphas: tuple[float | str, ...] = _ALPHAS
    if steps >= AUTO_ALPHA_STEPS:
        alphas = (*_ALPHAS, "auto")
    for alpha in alphas:
        yield _one(f"tokenwise, alpha {alpha}", recompute="tokenwise", alpha=alpha)


def _one(name: str, **changes: Any) -> Candidate:
    return Candidate(name=name, factor=next(iter(changes)), changes=changes)


def combine(winners: Iterable[Candidate]) -> Candidate | None:
    """The first of ``winners`` of each factor, all together; None where that is only one.

    Args:
        winners: the best first; what a run refuses beside better ones is left out.
    """
    by_factor: dict[str, Candidate] = {}
    changes: dict[str, Any] = {}
    for candidate in winners:
        together = {**changes, **candidate.changes}
        if candidate.factor not in by_factor and not _exclude_each_other(together):
            by_factor[candidate.factor], changes = candidate, together
    if len(by_factor) < 2:
        return None
    name = " + ".join(part.name for part in by_factor.values())
    return Candidate(name=name, factor="several", changes=changes)


def _exclude_each_other(changes: Mapping[str, Any]) -> bool:
    return bool(changes.get("step_in_forward")) and changes.get("state_precision") == "8bit"
