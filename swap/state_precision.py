"""In which precision the store keeps what a step changes, and what may be rounded.

Of optimizer states, ``exact`` keeps them as the optimizer makes them. ``bf16`` keeps float32 states
with an element for each of their parameter's as bfloat16 (``rounding``), ``8bit`` in 8 bits
(``eightbit``), both rounded stochastically; the optimizer itself computes in float32. Small states,
which stay in memory, are exact with either. Of bfloat16 weights it keeps float32 masters, if these
are asked for (``masters``).

[Note: what may be rounded] Rounding is right on average, so a state may be rounded if the step
takes it as it is: an average of gradients or of their squares. Where a step subtracts one state
from another (a centered RMSprop: the square root of the variance), errors can turn a sign. ASGD's
average is of weights, whose last bits are what counts. Of optimizers that we don't know we know no
state. In 8 bits errors are so large that they must be forgotten again, as averages with a decay do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

from offload.allocator.errors import UnsupportedError
from offload.swap.eightbit import packed_nbytes

StatePrecision = Literal["exact", "bf16", "8bit"]
MasterWeights = Literal["none", "fp32"]
Form = Literal["plain", "bf16", "signed", "unsigned"]  # the last two: see ``eightbit``
_ROUNDABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)
# See [Note: what may be rounded].
_EIGHT_BIT: Mapping[type[Optimizer], Mapping[str, Form]] = {
    torch.optim.SGD: {"momentum_buffer": "signed"},
    torch.optim.Adam: {"exp_avg": "signed", "exp_avg_sq": "unsigned"},
    torch.optim.AdamW: {"exp_avg": "signed", "exp_avg_sq": "unsigned"},
    torch.optim.NAdam: {"exp_avg": "signed", "exp_avg_sq": "unsigned"},
    torch.optim.RAdam: {"exp_avg": "signed", "exp_avg_sq": "unsigned"},
    torch.optim.RMSprop: {"square_avg": "unsigned", "momentum_buffer": "signed"},
}
_FORMS: Mapping[str, Form] = {
    name: form for forms in _EIGHT_BIT.values() for name, form in forms.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What the store keeps of the parameters that are stepped, and how.

    Attributes:
        states: of float32 states with an element for each of their parameter's.
        masters: ``fp32``: bfloat16 parameters are stepped in float32 (``masters``).
    """

    states: StatePrecision = "exact"
    masters: MasterWeights = "none"

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless what ``optimizer`` steps may be kept so.

        Raises:
            UnsupportedError: it may not, with the reason ([Note: what may be rounded]).
        """
        _check_states(self.states, optimizer)
        if self.masters != "none":
            _check_masters(optimizer)

    def has_master(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` is stepped in float32 though it is none."""
        return self.masters == "fp32" and parameter.dtype == torch.bfloat16

    def step_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """The type in which the optimizer sees ``parameter``, and makes its states."""
        return torch.float32 if self.has_master(parameter) else parameter.dtype

    def stored_as(
        self, parameter: torch.Tensor, name: str, dtype: torch.dtype
    ) -> tuple[Form, torch.dtype]:
        """How and in which type the store keeps a large per-element state that has ``dtype``."""
        narrow = dtype == torch.bfloat16 and (self.has_master(parameter) or self.states != "exact")
        if self.step_dtype(parameter) != torch.float32 or not (narrow or dtype == torch.float32):
            return "plain", dtype
        if self.states == "bf16":
            return "bf16", torch.bfloat16
        if self.states == "8bit" and name in _FORMS:
            return _FORMS[name], torch.uint8
        return "plain", torch.float32

    def stored_nbytes(self, parameter: torch.Tensor, name: str, dtype: torch.dtype) -> int:
        """Bytes of such a state in the store."""
        _, stored = self.stored_as(parameter, name, dtype)
        numel = parameter.numel()
        return packed_nbytes(numel) if stored == torch.uint8 else numel * stored.itemsize

    def rounds(self, parameter: torch.Tensor) -> bool:
        """Whether the store has states of ``parameter`` in less bits than the optimizer needs."""
        return self.states != "exact" and self.step_dtype(parameter) == torch.float32

    def keeps_in_memory(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` may be stepped in memory, in place.

        Memory rounds no states, and does not tell the user's writes to a weight from a step's: the
        bits would depend on the budget.
        """
        return not self.has_master(parameter) and not self.rounds(parameter)


EXACT = Precision()


def _check_states(precision: StatePrecision, optimizer: Optimizer) -> None:
    if precision == "exact":
        return
    roundable = _ROUNDABLE if precision == "bf16" else tuple(_EIGHT_BIT)
    if type(optimizer) not in roundable:
        known = ", ".join(kind.__name__ for kind in roundable)
        raise UnsupportedError(
            f"state_precision={precision!r} rounds states that are averages of gradients, as those "
            f"of {known} are; it is not known that those of {type(optimizer).__name__} may be "
            "rounded: set state_precision='exact'"
        )
    if precision == "8bit" and any(group.get("amsgrad") for group in optimizer.param_groups):
        raise UnsupportedError(
            "amsgrad keeps the largest of all second moments, in 8 bits that of all rounding "
            "errors: set amsgrad=False, or state_precision='bf16'"
        )
    if any(group.get("centered") for group in optimizer.param_groups):
        raise UnsupportedError(
            "a centered RMSprop takes the root of a difference of two states, which rounding can "
            f"make negative: set centered=False, or state_precision='exact' for {precision!r}"
        )


def _check_masters(optimizer: Optimizer) -> None:
    half = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.dtype == torch.float16 and parameter.requires_grad
    ]
    if half:
        raise UnsupportedError(
            f"master_weights='fp32' keeps the bits that a bfloat16 weight lacks of a float32 one; "
            f"{len(half)} parameters of the optimizer, the first of shape {tuple(half[0].shape)}, "
            "are float16, whose exponent is another: load the model in torch.bfloat16, or set "
            "master_weights='none'"
        )
