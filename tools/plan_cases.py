"""What predictions are held against: configurations, and the machine as each of them sees it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fit_job import Decoder, Shape, loss_of
from offload.config import OffloadConfig
from offload.swap.planning.program import Program
from offload.swap.planning.row_steps import Alpha
from offload.swap.planning.striping import striped
from offload.swap.planning.tracing import fake_mode, trace_step
from offload.swap.state_precision import MasterWeights, Precision, StatePrecision
from offload.tiers.machine import Link, Machine
from plan_job import making

_REBUILD_NBYTES = OffloadConfig().min_swap_nbytes


@dataclass(frozen=True)
class Case:
    """A model, a micro-batch, a budget by its factor over the least one, a drive, settings."""

    layers: int
    width: int
    heads: int
    sequence: int
    factor: float
    batch: int = 1
    bytes_per_s: float | None = None  # throttled to that
    dtype: str = "float32"
    states: StatePrecision = "exact"
    masters: MasterWeights = "none"
    in_backward: bool = False
    in_forward: bool = False
    paths: int = 1  # directories of the store, all on the one drive
    alpha: Alpha | None = None  # of token-wise recompute
    micro_batches: int = 1  # of a step

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.sequence

    @property
    def precision(self) -> Precision:
        """Of what the optimizer keeps."""
        return Precision(states=self.states, masters=self.masters)

    @property
    def config(self) -> dict[str, Any]:
        """The settings of its run."""
        rows = {} if self.alpha is None else {"recompute": "tokenwise", "alpha": self.alpha}
        parts = {"accumulation_steps": self.micro_batches} if self.in_backward else {}
        return {
            "step_in_backward": self.in_backward,
            "step_in_forward": self.in_forward,
            "state_precision": self.states,
            "master_weights": self.masters,
            **rows,
            **parts,
        }

    @property
    def kind(self) -> Literal["usual", "rebuilt", "others"]:
        """What it is about."""
        if self.alpha is not None:
            return "rebuilt"
        return "usual" if self.settings == "-" else "others"

    @property
    def settings(self) -> str:
        """What it has beside the defaults, for people."""
        names: dict[str, object] = {
            "dtype": "float32", "states": "exact", "masters": "none", "paths": 1, "alpha": None,
            "micro_batches": 1,
        }  # fmt: skip
        given = [
            f"{n}={getattr(self, n)}" for n, usual in names.items() if getattr(self, n) != usual
        ]
        given += ["in backward"] * self.in_backward + ["in forward"] * self.in_forward
        return ", ".join(given) or "-"


_M10, _M20, _M70 = (2, 128, 4), (4, 256, 4), (12, 512, 8)
_STATES: tuple[StatePrecision, ...] = ("exact", "bf16", "8bit")
_ALPHAS: tuple[Alpha, ...] = (0.0, 0.5, "auto")
_MASTERS: tuple[MasterWeights, ...] = ("none", "fp32")
_M134, _M350 = (12, 768, 12), (24, 1024, 16)
QUICK = (
    Case(*_M10, sequence=64, factor=1.3),
    Case(*_M20, sequence=128, factor=1.1),
    Case(*_M20, sequence=128, factor=1.5, bytes_per_s=500e6),
)
FULL = (
    *(Case(*_M10, sequence=64, factor=factor) for factor in (1.1, 1.5)),
    Case(*_M10, sequence=512, factor=1.2, batch=2),
    *(Case(*_M20, sequence=128, factor=factor) for factor in (1.1, 1.5, 2.0)),
    *(Case(*_M20, sequence=length, factor=1.2) for length in (512, 1024, 4096)),
    *(Case(*_M70, sequence=128, factor=factor) for factor in (1.1, 1.5, 3.0)),
    *(Case(*_M70, sequence=length, factor=1.2) for length in (512, 1024, 2048)),
    Case(*_M70, sequence=256, factor=1.2, batch=4),
    *(Case(*_M70, sequence=128, factor=1.2, bytes_per_s=rate) for rate in (250e6, 500e6, 1e9)),
    *(Case(*_M134, sequence=128, factor=factor) for factor in (1.1, 1.5, 3.0)),
    Case(*_M134, sequence=1024, factor=1.3),
    Case(*_M134, sequence=128, factor=1.2, bytes_per_s=500e6),
    *(Case(*_M350, sequence=128, factor=factor) for factor in (1.1, 2.0)),
    Case(*_M350, sequence=64, factor=1.2, bytes_per_s=1e9),
    *(Case(*_M70, sequence=128, factor=1.2, in_backward=True, states=s) for s in _STATES),
    *(Case(*_M70, sequence=128, factor=1.2, bytes_per_s=500e6, states=s) for s in _STATES[1:]),
    *(Case(*_M70, sequence=128, factor=1.2, dtype="bfloat16", masters=m) for m in _MASTERS),
    Case(*_M70, 128, 1.2, dtype="bfloat16", masters="fp32", states="8bit", in_backward=True),
    *(Case(*_M70, sequence=128, factor=1.2, paths=2, in_backward=each) for each in (False, True)),
    *(Case(*_M70, sequence=length, factor=1.5, in_forward=True) for length in (128, 512)),
    *(Case(*_M70, sequence=128, factor=f, micro_batches=4) for f in (1.2, 3.0)),
    Case(*_M70, sequence=128, factor=1.2, micro_batches=4, in_backward=True),
    *(Case(*_M20, sequence=1024, factor=1.2, alpha=alpha) for alpha in _ALPHAS),
    Case(*_M20, sequence=2048, factor=1.2, alpha=0.5),
    Case(*_M70, sequence=1024, factor=1.2, alpha=0.25),
)


def program_of(case: Case) -> Program:
    """The program of one of its micro-batches."""
    with fake_mode(), making(getattr(torch, case.dtype)):
        model = Decoder(Shape(case.layers, case.width, case.heads))
        tokens = torch.zeros(case.batch, case.sequence + 1, dtype=torch.int64)
        return trace_step(
            model,
            lambda model: loss_of(model, tokens),
            tokens=case.tokens,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
            precision=case.precision,
            rebuild_nbytes=None if case.alpha is None else _REBUILD_NBYTES,
        )


def throttled(machine: Machine, drive: str, bytes_per_s: float | None) -> Machine:
    """``machine`` with a drive whose reads and writes share ``bytes_per_s``."""
    if bytes_per_s is None:
        return machine
    return replace(machine, links=tuple(_slower(machine.links, drive, bytes_per_s)))


def spread(machine: Machine, drive: str, paths: int) -> tuple[Machine, str]:
    """``machine`` with a tier for so many directories of ``drive`` together, and its name."""
    if paths == 1:
        return machine, drive
    names = [f"{drive}/{number}" for number in range(paths)]
    tiers = tuple(replace(machine.tier(drive), name=name) for name in names)
    links = tuple(
        replace(
            link,
            source=name if link.source == drive else link.source,
            target=name if link.target == drive else link.target,
        )
        for name in names
        for link in machine.links
        if drive in {link.source, link.target}
    )
    several = replace(machine, tiers=(*machine.tiers, *tiers), links=(*machine.links, *links))
    found = striped(several, names)
    return found.machine, found.drive


def _slower(links: tuple[Link, ...], drive: str, bytes_per_s: float) -> Iterator[Link]:
    for link in links:
        if drive not in {link.source, link.target}:
            yield link
            continue
        most = bytes_per_s / 2 if link.source == link.target else bytes_per_s
        rates = (link.low_bytes_per_s, link.bytes_per_s, link.high_bytes_per_s)
        low, median, high = (min(rate, most) for rate in rates)
        yield replace(link, low_bytes_per_s=low, bytes_per_s=median, high_bytes_per_s=high)
