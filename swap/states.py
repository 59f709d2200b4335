"""Optimizer states: their durable bytes, and how ``optimizer.state`` shows them.

Large states live in the store and appear in ``optimizer.state[p]`` as mapped tensors, so
``state_dict`` and the user's own code read right values; small ones (step counters) stay in
memory and travel in the commit record.

[Note: states in memory] A mapped state that is *held* (``tiers.mapped``) is stepped in place
(``memory_step``): memory is its newest copy, and no page of it belongs to the file. It is stored
when the store must be the newest state: at a commit, and when its memory is given back. What a
step changed is marked dirty; what the user's code wrote to a clean one, its checksums tell.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.swap.eightbit import SHARING, pack, packed_nbytes
from offload.swap.governor import Governor
from offload.swap.masters import MASTER_LOW
from offload.swap.packed_state import PackedState
from offload.swap.rounding import round_to_bf16
from offload.swap.staged_states import Rounding, rounding_key
from offload.swap.state_precision import EXACT, Form, Precision
from offload.swap.writeback import is_changed, write_back
from offload.tiers.mapped import MappedTensor
from offload.tiers.store import Store, StoredTensor, pack_tensor, unpack_tensor

SMALL_NUMEL = 1024


@dataclass(slots=True, eq=False)
class State:
    """One large state of one parameter.

    Attributes:
        form: in the store.
        shape: as the optimizer sees it.
    """

    stored: StoredTensor
    form: Form
    shape: tuple[int, ...]
    mapped: MappedTensor | None = None  # None until its first version is published
    dirty: bool = False  # a step changed it in memory since it was stored

    @property
    def held(self) -> bool:
        """Whether it is in memory ([Note: states in memory])."""
        return self.mapped is not None and self.mapped.held


class StateKeeper:
    """The large states of all parameters of one optimizer.

    Args:
        names: the name of each parameter in the store.
        chunk_numel: elements per checksummed chunk.
        precision: in which the store keeps large per-element states.
        steps: optimizer steps finished so far; a step's number names the bits that round in it.
    """

    def __init__(
        self,
        store: Store,
        governor: Governor,
        optimizer: Optimizer,
        names: dict[nn.Parameter, str],
        chunk_numel: int,
        *,
        precision: Precision = EXACT,
        steps: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store = store
        self.governor = governor
        self.optimizer = optimizer
        self.names = names
        self.chunk_numel = chunk_numel
        self.precision = precision
        self._steps = steps
        self.states: dict[nn.Parameter, dict[str, State]] = {name: {} for name in names}

    def large(self, parameter: nn.Parameter, name: str, dtype: torch.dtype) -> State:
        """The state ``name`` of ``parameter``, elementwise, made at its first use."""
        return self._state(parameter, name, dtype, tuple(parameter.shape))

    def rounding(self, state: State) -> Rounding:
        """How the present step rounds ``state``."""
        return Rounding(state.form, rounding_key(self._steps(), state.stored.name, "step"))

    def computed(self, parameter: torch.Tensor, shown: Mapping[str, Any]) -> Mapping[str, Any]:
        """The states ``shown`` of a whole parameter as the optimizer computes with them."""
        if self.precision == EXACT:
            return shown
        return {
            name: self._widened(parameter, value)
            for name, value in shown.items()
            if name != MASTER_LOW
        }

    def _widened(self, parameter: torch.Tensor, value: Any) -> Any:
        if isinstance(value, PackedState):
            return value.unpacked()
        return value.float() if self._is_narrow(parameter, value) else value

    def _is_narrow(self, parameter: torch.Tensor, value: Any) -> bool:
        """Whether the optimizer sees the state ``value`` in float32, though it is none."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
            return False
        if self.precision.has_master(parameter):
            return True
        return is_large(value) and self.precision.rounds(parameter)

    def _state(
        self, parameter: nn.Parameter, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> State:
        """The state ``name``, which comes in ``dtype`` and ``shape``."""
        form: Form = "plain"
        if shape == tuple(parameter.shape):
            form, dtype = self.precision.stored_as(parameter, name, dtype)
        stored_shape, chunk_nbytes = shape, self.chunk_numel * dtype.itemsize
        if form in ("signed", "unsigned"):
            stored_shape = (packed_nbytes(parameter.numel()),)
            chunk_nbytes = packed_nbytes(self.chunk_numel)
        states = self.states[parameter]
        found = states.get(name)
        if found is None or found.stored.dtype != dtype or found.stored.shape != stored_shape:
            full_name = f"{self.names[parameter]}#{name}"
            stored = self.store.add(full_name, dtype, stored_shape, chunk_nbytes)
            found = states[name] = State(stored, form, shape)
        return found

    def known(self, parameter: nn.Parameter, name: str) -> State | None:
        """The published state ``name`` of ``parameter``, if there is one."""
        state = self.states[parameter].get(name)
        return state if state is not None and state.stored.current is not None else None

    def show(self, state: State) -> torch.Tensor:
        """The tensor to show in ``optimizer.state``, filed at the state's current version."""
        assert state.stored.current is not None
        if state.mapped is None:
            stored = state.stored
            state.mapped = MappedTensor(self.store.tier.file, stored.dtype, stored.shape)
            self.governor.watch(state.mapped)
        state.mapped.file_as(state.stored.current)
        state.dirty = False
        if state.form in ("signed", "unsigned"):
            return PackedState.over(
                state.mapped.tensor,
                state.shape,
                self.chunk_numel,
                signed=state.form == "signed",
            )
        return state.mapped.tensor

    @staticmethod
    def shows(value: Any, state: State) -> bool:
        """Whether ``value`` is the mapping of ``state``."""
        mapped = state.mapped
        if mapped is None:
            return False
        if isinstance(value, PackedState):
            return value.packed is mapped.tensor
        return value is mapped.tensor or (
            isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and value.data_ptr() == mapped.address
        )

    def shown(self, parameter: nn.Parameter) -> list[State] | None:
        """The large states of ``parameter`` if ``optimizer.state`` shows each from its mapping.

        None: somebody put ordinary tensors there, which ``absorb`` takes.
        """
        known = self.states[parameter]
        states = []
        for name, value in self.optimizer.state.get(parameter, {}).items():
            state = known.get(name)
            if state is not None and state.mapped is not None and value is state.mapped.tensor:
                states.append(state)  # nearly always: asked for each parameter in each step
            elif isinstance(value, torch.Tensor) and is_large(value):
                if state is None or not self.shows(value, state):
                    return None
                states.append(state)
        return states

    def held_nbytes(self, *, dirty: bool = False) -> int:
        """Bytes of the states in memory; ``dirty``: of those that the store has not yet."""
        nbytes = 0
        for states in self.states.values():
            for state in states.values():
                if state.mapped is not None and state.mapped.held and (state.dirty or not dirty):
                    nbytes += state.stored.nbytes
        return nbytes

    def materialised_nbytes(self) -> int:
        """Bytes of memory that ``materialise`` takes."""
        return sum(
            state.mapped.nbytes if state.form == "plain" else 4 * math.prod(state.shape)
            for states in self.states.values()
            for state in states.values()
            if state.mapped is not None and not state.held
        )

    def materialise(self) -> None:
        """Show ordinary tensors, of the optimizer's types, from now on; held ones are such."""
        for parameter, states in self.states.items():
            shown = self.optimizer.state.get(parameter, {})
            for name, state in states.items():
                if state.mapped is None or state.held or name not in shown:
                    continue
                kept = shown[name]
                if isinstance(kept, PackedState):
                    shown[name] = kept.unpacked()
                else:
                    shown[name] = kept.clone() if state.form == "plain" else kept.float()

    def absorb(self, parameter: nn.Parameter) -> None:
        """Store what is newer in ``optimizer.state[parameter]`` than in the store.

        That is: states that an untiled step or ``load_state_dict`` put there, and mapped ones
        that somebody wrote to.
        """
        self._store_held([parameter])
        self._store_filed(parameter)

    def _store_filed(self, parameter: nn.Parameter) -> None:
        shown = self.optimizer.state.get(parameter)
        if not shown:
            self._forget(parameter, set())
            return
        for name, value in shown.items():
            if not isinstance(value, torch.Tensor) or not is_large(value):
                continue
            state = self.known(parameter, name)
            if state is not None and self.shows(value, state):
                assert state.mapped is not None
                if not state.mapped.written_while_filed():
                    continue
            state = self._state(parameter, name, value.dtype, tuple(value.shape))
            if state.form in ("signed", "unsigned"):
                self._store_packed(state, value)
            elif state.stored.dtype == value.dtype:
                self.store.write(state.stored, value)
            elif state.form == "bf16":
                self._store_rounded(state.stored, value)
            else:
                self._store_widened(state.stored, value)
            shown[name] = self.show(state)
        self._forget(parameter, set(shown))

    def _store_rounded(self, stored: StoredTensor, value: torch.Tensor) -> None:
        key = rounding_key(self._steps(), stored.name, "absorb")
        values = value.detach().contiguous().reshape(-1)

        def fill(at: int, staged: torch.Tensor) -> None:
            rounded = staged.view(stored.dtype)
            start = at // stored.dtype.itemsize
            part = values[start : start + rounded.numel()]
            round_to_bf16(part, rounded, key=key, start=start)

        self.store.fill(stored, fill)

    def _store_packed(self, state: State, value: torch.Tensor) -> None:
        key = rounding_key(self._steps(), state.stored.name, "absorb")
        plain = value.unpacked() if isinstance(value, PackedState) else value.detach().float()
        values = plain.contiguous().reshape(-1)

        def fill(at: int, staged: torch.Tensor) -> None:
            start = at * SHARING // (SHARING + 1)
            part = values[start : start + self.chunk_numel]
            pack(part, staged, signed=state.form == "signed", key=key, start=start)

        self.store.fill(state.stored, fill)

    def _store_widened(self, stored: StoredTensor, value: torch.Tensor) -> None:
        values = value.detach().contiguous().reshape(-1)

        def fill(at: int, staged: torch.Tensor) -> None:
            wide = staged.view(stored.dtype)
            start = at // stored.dtype.itemsize
            wide.copy_(values[start : start + wide.numel()])

        self.store.fill(stored, fill)

    def _store_held(self, parameters: Iterable[nn.Parameter]) -> None:
        """Store held states that are newer in memory ([Note: states in memory])."""
        newer: list[tuple[State, MappedTensor]] = []
        for parameter in parameters:
            shown = self.optimizer.state.get(parameter, {})
            for name, state in self.states[parameter].items():
                mapped, value = state.mapped, shown.get(name)
                if mapped is None or not mapped.held or not self.shows(value, state):
                    continue
                if state.dirty or is_changed(self.store, state.stored, mapped.address):
                    state.dirty = True  # until it is stored, whatever happens meanwhile
                    newer.append((state, mapped))
        write_back(self.store, [(state.stored, mapped.address) for state, mapped in newer])
        for state, mapped in newer:
            mapped.block, state.dirty = state.stored.current, False

    def _forget(self, parameter: nn.Parameter, living: set[str]) -> None:
        for name in set(self.states[parameter]) - living:
            stored = self.states[parameter].pop(name).stored
            self.store.drop(stored)

    def absorb_all(self) -> None:
        """``absorb`` for every parameter."""
        self._store_held(self.states)
        for parameter in self.states:
            self._store_filed(parameter)

    def record(self) -> dict[str, dict[str, Any]]:
        """The states by parameter name, for the commit record."""
        return {
            name: {
                key: self._record_value(parameter, key, value)
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            for parameter, name in self.names.items()
        }

    def _record_value(self, parameter: nn.Parameter, key: str, value: Any) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            state = self.known(parameter, key)
            if state is not None and is_large(value):
                return {"stored": pack_meta(value)}
            return {"tensor": pack_tensor(value)}
        return {"value": value}

    def restore(self, record: dict[str, dict[str, Any]]) -> None:
        """Show the states of a commit record whose large ones the store still holds."""
        for parameter, name in self.names.items():
            entries = record.get(name, {})
            if not entries:
                self.optimizer.state.pop(parameter, None)
                continue
            shown: dict[str, Any] = {}
            for key, entry in entries.items():
                if "stored" in entry:
                    dtype: torch.dtype = getattr(torch, entry["stored"]["dtype"])
                    shape = torch.Size(entry["stored"]["shape"])
                    state = self._state(parameter, key, dtype, tuple(shape))
                    self.store.restore(state.stored)
                    shown[key] = self.show(state)
                elif "tensor" in entry:
                    shown[key] = unpack_tensor(entry["tensor"])
                else:
                    shown[key] = entry["value"]
            self.optimizer.state[parameter] = shown


def is_large(value: torch.Tensor) -> bool:
    """Whether a state belongs in the store rather than in the commit record."""
    return value.numel() > SMALL_NUMEL and value.layout is torch.strided


def pack_meta(value: torch.Tensor) -> dict[str, Any]:
    """Type and shape of a stored state."""
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
