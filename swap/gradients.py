"""Gradients leave memory as backward produces them, and stay visible as ``p.grad``.

[Note: always a right gradient] While its write is in flight ``p.grad`` is the tensor that
autograd made. When the write has ended, and nobody changed that tensor meanwhile, ``p.grad``
becomes a shared mapping of the same bytes in scratch and the memory goes. Reading it faults pages
in; writing to it, by ``clip_grad_norm_``, an accumulating second backward or a logger, writes
through to scratch. Its pages can be shed at any moment.

Whether it was changed, its version counter tells; but ``p.grad.data`` and numpy change bytes
without counting. So gradients still on their way when backward gives control to the user's code
have a checksum taken there. Where parameters have hooks of the user's, which run inside backward,
every gradient has one from the moment it leaves. Hooks of modules are not looked for.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.swap.copying import storage_use_count, write_jobs
from offload.swap.departures import Departure, Departures, checksum_of, has_user_hook
from offload.swap.governor import Governor
from offload.swap.gradient_homes import GradientHomes
from offload.swap.incomplete import IncompleteGradients
from offload.swap.known_norms import KnownNorms
from offload.swap.rows_at_home import RowsAtHome
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal, Label
from offload.tiers.mapped import MappedTensor

MIN_NBYTES = 64 << 10  # smaller gradients cost more to move than to keep


class Stepper(Protocol):
    """Steps parameters inside backward, if that was asked for."""

    def take(self, parameter: nn.Parameter, *, fresh: bool) -> bool:
        """A gradient has been accumulated, the first part of it if ``fresh``; True: used up."""

    def make_room(self, nbytes: int) -> None:
        """Have so many bytes left, as far as what it holds can go."""

    def end_backward(self) -> None:
        """Backward gives control to the user's code."""


class GradientSwapper:
    """Moves gradients to scratch; called on the training thread only.

    Args:
        scratch: the volatile tier.
        governor: sheds the pages of gradients that the user's code reads.
        limit_nbytes: bytes of gradients that may wait for their write (back-pressure).
    """

    def __init__(
        self, scratch: FileTier, journal: Journal, governor: Governor, limit_nbytes: int
    ) -> None:
        self.scratch = scratch
        self.journal = journal
        self.governor = governor
        self.limit_nbytes = limit_nbytes
        self._names: dict[nn.Parameter, str] = {}
        self.places = GradientHomes(scratch, journal, governor, self._names)
        self.rows = RowsAtHome(scratch, journal, self.places, self._names)
        self._leaving = Departures()
        self._incomplete = IncompleteGradients(governor)
        self._kept: frozenset[nn.Parameter] = frozenset()
        self.stepper: Stepper | None = None  # uses gradients up as they arrive
        self.before_backward: Callable[[], None] = lambda: None  # called at its first gradient
        self.before_end: Callable[[], None] = lambda: None  # called as a backward ends
        # Of gradients that come from a device (``device_gradients``):
        self.guard: AbstractContextManager[Any] = nullcontext()  # entered on each gradient
        self.is_arriving: Callable[[torch.Tensor], bool] = lambda _parameter: False  # or has
        self._watched_task = -1  # of autograd; at its end ``_end_backward`` is called
        self._is_hooked = False  # by the user's code, which runs inside of this backward
        self._hooks: list[RemovableHandle] = []

    def watch(self, name: str, parameter: nn.Parameter) -> None:
        """Take charge of the gradients of ``parameter`` from now on."""
        if parameter.requires_grad and parameter.nbytes >= MIN_NBYTES:
            self._names[parameter] = name
            self._incomplete.watch(parameter)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave the gradients of ``parameters`` in memory, and of these alone, from now on."""
        self._kept = frozenset(parameters)

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let gradients leave that were kept until now.

        Raises:
            TierIOError: a write failed.
        """
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None and parameter in self._names and _movable(gradient, parameter):
                self._send(parameter, gradient)

    def watches(self, parameter: nn.Parameter) -> bool:
        """Whether ``watch`` has put a hook on ``parameter``."""
        return parameter in self._names

    def keeps(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of ``parameter`` stays in memory."""
        return parameter in self._kept or parameter not in self._names

    def settle(self, parameter: nn.Parameter) -> None:
        """Have no gradient of ``parameter`` on its way.

        Raises:
            TierIOError: its write failed.
        """
        self.watch_backward()  # first of all, as in ``_take``
        self.poll()
        while self._leaving.of(parameter):
            self._await_oldest("drain")

    def name_of(self, parameter: nn.Parameter) -> str:
        """The name of the weight behind ``parameter``, which is watched."""
        return self._names[parameter]

    def arrived(self, parameter: nn.Parameter) -> None:
        """The gradient of ``parameter`` has been accumulated, but not by autograd."""
        if parameter in self._names:
            self._take(parameter)

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        with self.guard:
            if not self.is_arriving(parameter):
                self._take(parameter)

    def _take(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self.watch_backward()  # first of all: to poll may send a gradient on its way again
        self.poll()
        gradient = parameter.grad
        begun = self.rows.accumulated(parameter)
        if gradient is None or not _movable(gradient, parameter):
            return
        if self.stepper is not None and self._step(parameter, self.stepper, begun=begun):
            self.rows.written.discard(parameter)
            return
        if self._stays_incomplete(parameter, gradient):
            return
        self._send(parameter, gradient)

    def _send(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Let ``gradient`` leave, unless it has left, is on its way, or is kept."""
        home = self.homes.get(parameter)
        if home is not None and gradient.data_ptr() == home.address:
            self._accumulated(parameter, gradient, home)
            return
        if self._leaving.has(gradient):
            return  # accumulated in place while it leaves: ``_finish`` will see its version
        if parameter in self._kept:
            return
        while self._leaving.of(parameter):
            self._await_oldest("drain")  # a dropped one must not land on top of this one
        self._leave(parameter, gradient)
        while self._leaving and (
            self._leaving.nbytes > self.limit_nbytes or self.governor.room() < 0
        ):
            self._await_oldest("full")

    def _accumulated(
        self, parameter: nn.Parameter, gradient: torch.Tensor, home: MappedTensor
    ) -> None:
        """In place, through the mapping."""
        self.places.share(home)
        if parameter in self._kept:
            parameter.grad = gradient.clone()
        elif parameter in self.rows.written:  # its norm would bring all of it into memory
            self.norms.forget(home)
        elif self.norms.wanted and self.stepper is None:
            self.norms.take(home, gradient)
            self.places.watch_writes(parameter, home)
        self.rows.written.discard(parameter)
        home.shed()

    def _step(self, parameter: nn.Parameter, stepper: Stepper, *, begun: bool) -> bool:
        """Whether the gradient was used up; an earlier part of it is back from its way by then."""
        assert parameter.grad is not None
        address, home = parameter.grad.data_ptr(), self.homes.get(parameter)
        earlier = [left.tensor.data_ptr() for left in self._leaving.of(parameter)]
        if (incomplete := self._incomplete.of(parameter)) is not None:
            earlier.append(incomplete.data_ptr())
        known = address in [*earlier, home.address if home is not None else None]
        fresh = begun or not known
        while self._leaving.of(parameter):
            self._await_oldest("drain")
        if not stepper.take(parameter, fresh=fresh):
            return False
        self._incomplete.drop(parameter)
        return True

    @contextmanager
    def in_turns(
        self, expects_more: Callable[[nn.Parameter], bool], most_nbytes: int
    ) -> Iterator[None]:
        """Several backward passes run in turns inside; see ``incomplete``.

        Args:
            expects_more: whether more parts of a gradient are to come.
            most_nbytes: of gradients that wait for them.

        Raises:
            TierIOError: a write failed.
        """
        self._incomplete.expects_more, self._incomplete.most_nbytes = expects_more, most_nbytes
        self._is_hooked = any(map(has_user_hook, self._names))
        self.norms.skip()
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            self._incomplete.expects_more = None
            while self._incomplete:
                self._release_oldest()
            self._note_bytes()
            if is_whole and self.stepper is not None:
                self.stepper.end_backward()

    def _stays_incomplete(self, parameter: nn.Parameter, gradient: torch.Tensor) -> bool:
        """Whether ``gradient`` stays in memory now, for more parts of it."""
        incomplete = self._incomplete
        incomplete.drop(parameter)
        if incomplete.expects_more is None or parameter in self._kept:
            return False
        if self._leaving.of(parameter):
            return False
        if self.home_of(parameter) is not None or not incomplete.expects_more(parameter):
            return False
        incomplete.put(parameter, gradient)
        leaving, limit = self._leaving.nbytes, self.limit_nbytes
        if self.stepper is not None and incomplete.nbytes <= incomplete.most_nbytes:
            self.stepper.make_room(incomplete.wanted_nbytes(leaving, limit))  # they go on anyway
        while incomplete and incomplete.is_short(self._leaving.nbytes, limit):
            self._release_oldest()
        return True

    def _release_oldest(self) -> None:
        parameter, gradient = self._incomplete.take_oldest()
        if parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr():
            self._send(parameter, gradient)

    def _leave(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        home = self.places.take(parameter, gradient.dtype)
        assert home.block is not None
        name = self._names[parameter]
        label = Label(name, "gradient", "host", self.scratch.spec.name)
        jobs = write_jobs(self.scratch.file, home.block, gradient.data_ptr(), gradient.nbytes)
        version = gradient._version
        in_backward = torch._C._current_graph_task_id() != -1
        digest = checksum_of(gradient) if self._is_hooked or not in_backward else None
        if in_backward and self.norms.wanted and self.stepper is None:
            self.norms.take(home, gradient)
        else:
            self.norms.forget(home)
        transfer = self.scratch.lanes.writes.submit(jobs, label, gradient.nbytes, owner=gradient)
        self._leaving.add(Departure(parameter, gradient, version, home, transfer, digest))

    def watch_backward(self) -> None:
        """Be called at the end of the backward that runs now, if one does."""
        task = torch._C._current_graph_task_id()
        if self._incomplete.expects_more is not None:
            return  # others run when it ends, and ``in_turns`` knows when all have
        if task not in (-1, self._watched_task):
            self.before_backward()
            if task > self._watched_task:
                self.norms.begin()
            else:
                self.norms.disable()  # the backward around the one that was watched last
            self._watched_task = task
            self._is_hooked = any(map(has_user_hook, self._names))
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """The user's code runs next: note the bytes of the gradients that it could change."""
        self._note_bytes()
        if self.stepper is not None:
            self.stepper.end_backward()

    def _note_bytes(self) -> None:
        self.before_end()
        self.poll()
        if self.norms.wanted:
            self.drain()
        self.places.share_all()
        self.norms.prove()
        self._leaving.note_bytes()

    def poll(self) -> None:
        """Let go of the gradients whose write has ended; never blocks."""
        if torch._C._current_graph_task_id() == -1:
            self.places.share_all()  # backward failed
        for left in self._leaving.ended():
            self._finish(left)

    def has_failed(self) -> bool:
        """Whether the write of a gradient has failed, and nobody has been told yet."""
        return self._leaving.has_failed()

    def drain(self) -> None:
        """Wait until every gradient has left."""
        while self._leaving:
            self._await_oldest("drain")

    def _await_oldest(self, reason: str) -> None:
        oldest = self._leaving[0]
        if not oldest.transfer.done():
            lane = self.scratch.lanes.writes.name
            with self.journal.stall(self._names[oldest.parameter], "gradient", lane, reason):
                oldest.transfer.settle()
        self.poll()

    def _finish(self, left: Departure) -> None:
        left.transfer.wait()
        gradient = left.parameter.grad
        if gradient is None or gradient.data_ptr() != left.tensor.data_ptr():
            return  # the user dropped or replaced it meanwhile
        if left.is_changed():
            self._leave(left.parameter, gradient)  # changed while it was written: again
            return
        if self.norms.has(left.home):
            if torch._C._current_graph_task_id() == -1:
                self.norms.forget(left.home)  # backward failed
            else:
                self.places.watch_writes(left.parameter, left.home)
        # A tensor of its own over the same bytes: who keeps it is seen as an owner of them.
        left.parameter.grad = left.home.tensor.detach()

    @property
    def homes(self) -> dict[nn.Parameter, MappedTensor]:
        """The present home of each parameter's gradient, whether it is there or not."""
        return self.places.homes

    @property
    def norms(self) -> KnownNorms:
        """Of the gradients in scratch."""
        return self.places.norms

    def home_of(self, parameter: nn.Parameter) -> MappedTensor | None:
        """The mapping behind ``parameter.grad``, or None if the gradient is ordinary memory."""
        return self.places.of(parameter)

    def is_alone(self, parameter: nn.Parameter) -> bool:
        """Whether nobody holds the bytes of ``parameter.grad`` but itself."""
        home, gradient = self.home_of(parameter), parameter.grad
        assert gradient is not None
        return self.places.is_alone(home) if home is not None else storage_use_count(gradient) == 2

    def stop(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def materialise(self) -> None:
        """Make the gradients that live in scratch ordinary tensors."""
        self.drain()
        self.places.share_all()
        for parameter in self.homes:
            if self.home_of(parameter) is not None:
                assert parameter.grad is not None
                parameter.grad = parameter.grad.clone()


def gradient_nbytes(parameter: torch.Tensor) -> int:
    """What the gradient of ``parameter`` takes of scratch, if it moves."""
    if parameter.nbytes < MIN_NBYTES:
        return 0
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None)  # not every torch has it
    return parameter.numel() * (dtype or parameter.dtype).itemsize


def _movable(gradient: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Whether the bytes of ``gradient`` can go to a file and come back the same tensor."""
    return (
        type(gradient) is torch.Tensor
        and gradient.layout is torch.strided
        and gradient.is_contiguous()
        and not gradient.requires_grad  # create_graph: it is part of a graph
        and gradient.dtype in (parameter.dtype, torch.float32)  # see torch's ``grad_dtype``
        and gradient.nbytes >= MIN_NBYTES
    )
