"""Token rows of saved tensors rebuilt in backward on a device, for ``gpu_check``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import gpu_alpha
from gpu_report import Outcome
from gpu_training import UnderTest
from offload.swap.activations import ActivationCache
from offload.swap.places import DevicePlace
from offload.swap.selective import put_on, take_off
from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise

_WIDTH, _BATCH, _ROWS, _LAYERS, _STEPS = 256, 2, 1024, 3, 4


class _Layer(nn.Module):
    """A residual MLP, with an operation that no row of another can enter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, width) to the same."""
        result: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, width) to a loss."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@dataclass(frozen=True)
class Rebuilt:
    """What some steps computed, and how.

    Attributes:
        results: losses and gradients.
        nbytes, whole_nbytes: saved bytes that were rebuilt, and those that were swapped whole.
        why_whole: the reasons for the latter.
    """

    results: list[torch.Tensor]
    nbytes: int = 0
    whole_nbytes: int = 0
    why_whole: tuple[str, ...] = ()


def train(
    place: torch.device, dtype: torch.dtype, cache: ActivationCache | None, settings: Settings
) -> Rebuilt:
    """Some steps on ``place``; with ``cache``, rows are rebuilt from what it swaps."""
    torch.manual_seed(7)
    model = _Model().to(place, dtype)
    batches = [torch.randn(_BATCH, _ROWS, _WIDTH).to(place, dtype) for _ in range(_STEPS)]
    tokenwise = None
    if cache is not None:
        cache.fixed.know_model(model)
        at = cache.spiller.place
        timer = Timer(accelerator=at.accelerator if isinstance(at, DevicePlace) else None)
        tokenwise = TokenWise(model, CacheKeeper(cache), settings, timer=timer, rounding=True)
    results = []
    for batch in batches:
        if cache is not None:
            cache.begin_pass("model")
            put_on(cache, tokenwise)
        try:
            loss = model(batch)
        finally:
            if cache is not None:
                take_off()
        loss.backward()
        results.append(loss.detach())
    results += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    results = [result.cpu() for result in results]
    if tokenwise is None:
        return Rebuilt(results)
    tokenwise.remove()
    reports = tokenwise.report()
    return Rebuilt(
        results,
        nbytes=sum(report.rebuilt_nbytes for report in reports),
        whole_nbytes=sum(report.whole_nbytes for report in reports),
        why_whole=tuple(dict.fromkeys(why for report in reports for why, _ in report.whole)),
    )


class AlphaChecks:
    """What ``gpu_check`` asks of one link. The first check measures, for all of them."""

    def __init__(self, device: UnderTest, times: int = 2) -> None:
        self._device = device
        self._times = times
        self._measured: gpu_alpha.Measured | None = None
        self._error: Exception | None = None

    def all(self) -> dict[str, Callable[[], Outcome]]:
        """By name."""
        return {
            "forward of a block, measured": partial(self._figure, "forward_s"),
            "backward of a block, measured": partial(self._figure, "backward_s"),
            "link, measured": self._link,
            "solved alpha against fixed ones": self._solved,
        }

    def _get(self) -> gpu_alpha.Measured:
        if self._error is not None:
            raise self._error
        if self._measured is None:
            try:
                self._measured = gpu_alpha.measure(
                    self._device, gpu_alpha.FULL, self._times, rounds=5, limit_s=8.0
                )
            except Exception as error:
                self._error = error
                raise
        return self._measured

    def _figure(self, name: str) -> Outcome:
        """Time as the solver knows it against events around the same block, hooks off."""
        measured = self._get()
        mine = float(getattr(measured.report.cost, name))
        return _against(mine, float(getattr(measured.plain, name)), "s")

    def _link(self) -> Outcome:
        """Rate as the solver knows it against copies of the device alone."""
        measured = self._get()
        return _against(measured.link_bytes_per_s, measured.plain_bytes_per_s, "bytes/s")

    def _solved(self) -> Outcome:
        """Its step against that of the best of some fixed ones, in the same rounds."""
        measured = self._get()
        ratio = measured.over(measured.best)
        steps = {f"{one.alpha}": f"{one.median_s:.4f}" for one in measured.fixed}
        solution = measured.report.solution
        solved = solution.alpha if solution is not None else None
        settled = measured.report.settled
        told = (
            f"alpha {solved}, trials settled on {gpu_alpha.name_of(settled)}, step "
            f"{measured.solved.median_s:.4f} s; fixed {steps}; "
            f"trials {gpu_alpha.trial_times(measured.report)}"
        )
        return Outcome(told, holds=ratio <= 1.05, value=ratio, target="<= 1.05")


def _against(mine: float, reference: float, unit: str) -> Outcome:
    ratio = mine / reference
    told = f"{mine:.4g} {unit}, reference {reference:.4g} {unit}"
    return Outcome(
        told,
        holds=gpu_alpha.in_band(ratio),
        value=ratio,
        target=f"{gpu_alpha.BAND[0]}..{gpu_alpha.BAND[1]}",
    )
